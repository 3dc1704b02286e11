"""Presets, overrides and what a run may change when it goes on."""

import pathlib

import pytest
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.config import UserError

TXT2IMG = str(pathlib.Path(__file__).parents[1] / "configs" / "txt2img.py")


def small():
    return ConfigDict(
        dict(
            preset="",
            steps=10,
            rate=0.5,
            name="abc",
            flag=True,
            sizes=(1, 2),
            nothing=None,
            unet=dict(model_channels=32, channel_mult=(1, 2)),
            report=dict(log_steps=1),
            mesh=dict(data=-1),
        )
    )


PRESETS = {"small": small, "large": lambda: small()}


def test_first_preset_is_the_default_and_named():
    assert config_lib.get_preset(PRESETS, None).preset == "small"
    assert config_lib.get_preset(PRESETS, "").preset == "small"
    assert config_lib.get_preset(PRESETS, "large").preset == "large"
    assert config_lib.get_preset(PRESETS, "steps=3").preset == "small"


def test_overrides_follow_the_preset():
    config = config_lib.get_preset(
        PRESETS, "large,steps=3,unet.channel_mult=(1,4,4),name=x y"
    )
    assert (config.preset, config.steps, config.name) == ("large", 3, "x y")
    assert config.unet.channel_mult == (1, 4, 4)


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("larg", r"no preset 'larg'; did you mean 'large'\?"),
        ("zzz", "no preset 'zzz'; choose one of large, small"),
        ("large,stesp=3", r"--config.stesp: no such field; did you mean 'steps'\?"),
        (
            "unet.model_chanels=3",
            r"unet.model_chanels.*did you mean 'unet.model_channels'\?",
        ),
        ("steps.more=3", "steps is a value, not a section"),
        ("unet=3", "a section; set one of its fields: unet.channel_mult"),
        ("steps=fast", r"'fast' is not of type int \(the default is 10\)"),
        ("steps=1.5", "'1.5' is not of type int"),
        ("flag=1", "'1' is not of type bool"),
        ("sizes=3", "'3' is not of type tuple"),
        ("large,small", "'small' is not of the form key=value"),
    ],
)
def test_mistakes_are_named(arg, words):
    with pytest.raises(UserError, match=words):
        config_lib.get_preset(PRESETS, arg)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("3", "rate", 3.0),
        ("1e-4", "rate", 1e-4),
        ("12", "name", "12"),
        ("None", "name", None),
        ("[3,4]", "sizes", (3, 4)),
        ("()", "sizes", ()),
        ("7", "nothing", 7),
        ("False", "flag", False),
    ],
)
def test_values_take_the_type_of_the_field(text, key, value):
    config = small()
    config_lib.override(config, key, text)
    assert config[key] == value
    assert type(config[key]) is type(value)


def test_split_arg_leaves_brackets_whole():
    assert config_lib.split_arg("a,b=(1,2),c=[3,(4,5)],d={1:2,3:4}") == [
        "a",
        "b=(1,2)",
        "c=[3,(4,5)]",
        "d={1:2,3:4}",
    ]


def test_load_reads_a_file_and_applies_overrides_in_order():
    config = config_lib.load(f"{TXT2IMG}:debug,seed=1", ["seed=2", "seed=3"])
    assert (config.preset, config.seed) == ("debug", 3)
    with pytest.raises(UserError, match="no file 'configs/nothing.py'"):
        config_lib.load("configs/nothing.py:debug")
    with pytest.raises(UserError, match="write --config.seed=VALUE"):
        config_lib.load(TXT2IMG, ["seed"])


def test_json_gives_an_equal_config_back():
    config = config_lib.load(f"{TXT2IMG}:debug")
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.unet.channel_mult, tuple)
    assert again.data.ops == (("to_float", ConfigDict()),) or again.data.ops == (
        ("to_float", {}),
    )
    assert config_lib.differences(config, again) == ""


def test_differences_name_what_changes_the_result():
    old, new = small(), small()
    new.report.log_steps, new.mesh.data, new.preset = 7, 2, "other"
    assert config_lib.differences(old, new) == ""
    new.steps = 20
    new.unet.channel_mult = (1, 4)
    assert config_lib.differences(old, new) == (
        "steps: 10 -> 20, unet.channel_mult: (1, 2) -> (1, 4)"
    )
    del new["steps"]
    with new.unlocked():
        new.extra = 1
    words = config_lib.differences(old, new)
    assert "steps: 10 -> None" in words
    assert "extra: None -> 1" in words
    with old.unlocked():
        old.later_option = None  # an option that a newer version has
    assert config_lib.differences(old, new) == words


def test_a_user_error_is_one_line_and_exit_code_two(capsys):
    with pytest.raises(SystemExit) as exit_, config_lib.exit_on_user_error():
        raise UserError("field: value; mend")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: field: value; mend\n"
