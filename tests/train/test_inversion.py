"""Textual inversion: what is trained, kept, read and written; mistakes."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import ldm_jax
from ldm_jax import inversion, publish, publish_folder
from ldm_jax.conditioning import tokenizers
from ldm_jax.config import UserError
from ldm_jax.convert import embedding_files
from ldm_jax.nets import t5, text_encoder
from ldm_jax.train import loop
from tests import runs, test_frozen, test_publish

pytestmark = pytest.mark.usefixtures("fast_compile")
OPTION = inversion.OPTION


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run of the debug preset with random params."""
    workdir = tmp_path_factory.mktemp("runs") / "other"
    runs.untrained(workdir, runs.debug())
    return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of four pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        picture.save(folder / f"{i}.png")
    return folder


def config_of(other, pictures, *overrides):
    """The debug preset, to find a token for what the pictures show."""
    config = runs.debug(f"init_from={other}", f"{OPTION}.placeholder_token=<toy>")
    captions = ("a <toy>", "a red <toy>")
    options = dict(path=str(pictures), caption=captions, heldout_percent=5)
    config.data.update(dict(source="folder", train_split="all", heldout_split="all"))
    config.data.options = ConfigDict(options)
    config.diffusion_stage.optim.learning_rate = 0.1
    for item in overrides:
        ldm_jax.config.override(config, *item.split("=", 1))
    return config


def test_only_the_tokens_embeddings_are_trained(other, pictures, tmp_path):
    config = config_of(other, pictures, f"{OPTION}.num_vectors=2")
    assert loop.train(config, tmp_path / "heir")
    before, after = ldm_jax.load(other), ldm_jax.load(tmp_path / "heir")
    text = after.params["conditioners"]["text"]
    assert text["added_emb"].shape == (2, config.conditioners.text.net.dim)
    theirs = before.params["conditioners"]["text"]
    mean = theirs["token_emb"].mean(axis=0, keepdims=True)
    assert (np.abs(text["added_emb"] - mean).max(axis=-1) > 1e-3).all()
    rest = {name: x for name, x in text.items() if name != "added_emb"}
    jax.tree.map(np.testing.assert_array_equal, rest, theirs)
    jax.tree.map(
        np.testing.assert_array_equal, after.params["unet"], before.params["unet"]
    )
    # The token is a word of its own, all others are what they were.
    net = after.model.conditioners["text"].net
    ids = after.model.conditioners["text"].prepare(["a red <toy>", "a red"])
    own = before.model.conditioners["text"].prepare(["a red", "a red"])
    assert ids[0][3:5].tolist() == [net.vocab_size, net.vocab_size + 1]
    np.testing.assert_array_equal(ids[1], own[1])

    def drawn(model, prompt):
        return model.sample(prompt, steps=2, guidance_scale=1.0)

    np.testing.assert_array_equal(drawn(after, "a red"), drawn(before, "a red"))
    assert (drawn(after, "a red <toy>") != drawn(after, "a red")).any()

    # Into a file, and from it into another model of the same text net.
    path = tmp_path / "toy.safetensors"
    with pytest.raises(UserError, match="^path: .* has no token of textual inversion"):
        before.save_tokens(path)
    with pytest.raises(UserError, match="^token: 'x'; choose one of <toy>$"):
        after.save_tokens(path, "x")
    after.save_tokens(path)
    with pytest.raises(UserError, match="^path: .* is there already"):
        after.save_tokens(path)
    given = before.with_tokens(path)
    np.testing.assert_array_equal(
        drawn(given, "a red <toy>"), drawn(after, "a red <toy>")
    )
    both = given.with_tokens(path, token="zwx")
    np.testing.assert_array_equal(drawn(both, "a red zwx"), drawn(after, "a red <toy>"))
    np.testing.assert_array_equal(
        drawn(both, "a red <toy>"), drawn(after, "a red <toy>")
    )
    with pytest.raises(UserError, match="^token: None; choose one of <toy>, zwx$"):
        both.save_tokens(tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="'<toy>' is in the vocabulary already"):
        given.with_tokens(path)
    with pytest.raises(
        UserError, match="^conditioners.text: has a token .*save_tokens"
    ):
        publish.write_file(after, tmp_path / "whole.safetensors")
    with pytest.raises(
        UserError, match="has trained a LoRA or embeddings, and no nets"
    ):
        loop.train(runs.debug(f"init_from={tmp_path / 'heir'}"), tmp_path / "grandson")


def test_stopped_and_gone_on_ends_with_the_same_bits(
    other, pictures, tmp_path, monkeypatch
):
    config = config_of(other, pictures, f"{OPTION}.initializer_token=red")
    assert loop.train(config, tmp_path / "whole")

    class Stop:
        def now(self):
            return True

    with monkeypatch.context() as patched:
        patched.setattr(loop, "StopSignal", Stop)
        assert not loop.train(config, tmp_path / "halves")
    assert loop.train(config, tmp_path / "halves")
    texts = [
        ldm_jax.load(tmp_path / run).params["conditioners"]["text"]
        for run in ("whole", "halves")
    ]
    np.testing.assert_array_equal(*(text["added_emb"] for text in texts))
    assert loop.train(config, tmp_path / "halves")  # it is found finished
    config.diffusion_stage.inversion.num_vectors = 2
    with pytest.raises(UserError, match="another config .*num_vectors: None -> 2"):
        loop.train(config, tmp_path / "halves")


@pytest.mark.parametrize(
    ("word", "count", "wanted"),
    [
        (None, 2, lambda table, ids: table.mean(axis=0, keepdims=True)),
        ("red", 1, lambda table, ids: table[ids]),
        ("red", 3, lambda table, ids: table[ids]),
        ("red circle", 2, lambda table, ids: table[ids]),
    ],
)
def test_the_embeddings_start_from_a_word(other, pictures, word, count, wanted):
    option = f"{OPTION}.initializer_token={word}"
    config = config_of(other, pictures, f"{OPTION}.num_vectors={count}", option)
    model = ldm_jax.load(other)
    params, tokenizers = model.params["conditioners"], model.tokenizers
    rows = inversion.start(config, tokenizers, params)(None)["conditioners"]["text"]
    ids = tokenizers["text"].convert_tokens_to_ids((word or "red").split())
    table = np.asarray(params["text"]["token_emb"])
    expected = np.broadcast_to(wanted(table, ids), (count, table.shape[1]))
    np.testing.assert_array_equal(rows["added_emb"], expected)


@pytest.mark.slow
def test_a_frozen_net_has_the_token_too(pictures, tmp_path):
    weights = test_frozen.write(tmp_path / "clip")
    assert loop.train(test_frozen.config(weights), tmp_path / "before")
    config = config_of(tmp_path / "before", pictures)
    config.conditioners = test_frozen.config("nobody/nothing").conditioners
    assert loop.train(config, tmp_path / "heir")
    before, after = (ldm_jax.load(tmp_path / run) for run in ("before", "heir"))
    text = dict(after.first_stage.encoders["text"])
    rows = text.pop("added_emb")
    same = np.testing.assert_array_equal
    jax.tree.map(same, text, before.first_stage.encoders["text"])
    jax.tree.map(same, after.params, before.params)
    assert rows.shape == (1, 32)
    mean = text["token_emb"].mean(axis=0, keepdims=True)
    assert np.abs(rows - mean).max() > 1e-3
    # Its table has more rows than the tokenizer has words.
    (ids,) = after.model.conditioners["text"].prepare(["<toy>"])
    assert ids.max() == 2048
    drawn = [after.sample(prompt, steps=2) for prompt in ("a <toy>", "a")]
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.usefixtures("full_compile")
def test_diffusers_reads_the_token(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    runs.untrained(tmp_path / "run", test_publish._config())
    model = ldm_jax.load(tmp_path / "run")
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    mine = model.with_tokens({"<toy>": rows})
    mine.save_tokens(tmp_path / "toy.safetensors")
    publish_folder.write(model, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    length = model.config.conditioners.text.length
    pipeline.tokenizer.model_max_length = length
    pipeline.load_textual_inversion(tmp_path / "toy.safetensors")
    prompt = "a <toy> on blue, <toy>"
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    text = mine.model.conditioners["text"]
    params = mine.params["conditioners"]["text"]
    ours = text.net.apply({"params": params}, text.prepare([prompt]))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=5e-5)


@pytest.mark.parametrize("layer", ["pooled", "last"])
def test_the_text_ends_where_it_did_without_the_token(layer):
    """At its end token, though a new one has a higher id."""
    net = text_encoder.CLIPTextTransformer(
        10, 5, dim=8, depth=1, heads=2, layer=layer, zero_padding=layer == "last"
    )
    tokens = np.array([[8, 1, 9, 9, 9]])
    params = net.init(jax.random.key(0), tokens)["params"]
    added = {**params, "added_emb": params["token_emb"][1:2]}
    wanted = net.apply({"params": params}, tokens)
    tokens[0, 1] = 10
    given = net.apply({"params": added}, tokens)
    np.testing.assert_array_equal(given, wanted)
    assert np.isnan(net.apply({"params": params}, tokens)).any()
    tokens[0, 1] = 11
    assert np.isnan(net.apply({"params": added}, tokens)).any()


def test_t5_has_the_token_too():
    net = t5.T5Encoder(10, dim=8, depth=1, heads=2, dim_head=4, dim_ff=8)
    params = net.init(jax.random.key(0), np.array([[1, 2]]))["params"]
    wanted = net.apply({"params": params}, np.array([[3, 2]]))
    added = {**params, "added_emb": params["token_emb"][3:4]}
    given = net.apply({"params": added}, np.array([[10, 2]]))
    np.testing.assert_array_equal(given, wanted)


def test_tokens_are_words_as_they_are_written():
    tokenizer = runs.tokenizer()
    tokens = ("<Toy>", "<Toy>_1", "zwx")
    grown = tokenizers.with_tokens(tokenizer, tokens)
    own, before = len(tokenizer), tokenizer("a red circle")["input_ids"]

    def read(text):
        text = tokenizers.spelled_out(text, tokens)
        ids = grown(text, add_special_tokens=False)["input_ids"]
        return [i - own for i in ids if i >= own]

    assert read("a <Toy>") == read("a <Toy> <Toy>_1") == [0, 1]
    assert read("a zwx, zwx.") == [2, 2]
    assert read("zwxs azwx <toy> ZWX") == []
    assert read("<Toy>s") == [0, 1]
    assert tokenizer("a red circle")["input_ids"] == before
    assert len(tokenizer) == own
    for words, said in (
        (("red",), "^'red' is in the vocabulary already; choose another, such as <red"),
        (("<x>", "<x>"), "^'<x>' is in the vocabulary already"),
        (("<a b>",), "^'<a b>'; give one word without spaces"),
        (("",), "^''; give one word"),
    ):
        with pytest.raises(UserError, match=said):
            tokenizers.with_tokens(tokenizer, words)


@pytest.mark.parametrize(
    ("held", "token"),
    [
        ({"<toy>": np.ones((2, 4))}, "<toy>"),
        ({"<toy>": np.ones(4)}, "<toy>"),
        ({"string_to_param": {"*": np.ones((2, 4))}, "name": "cat"}, "cat"),
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": np.ones(4)}}, "f"),
        ({"emb_params": np.ones((2, 4), np.float16)}, "f"),
    ],
)
def test_files_of_others_are_read(tmp_path, held, token):
    torch = pytest.importorskip("torch")

    def tensors(tree):
        if isinstance(tree, dict):
            return {key: tensors(value) for key, value in tree.items()}
        return torch.from_numpy(tree) if isinstance(tree, np.ndarray) else tree

    path = tmp_path / "f.pt"
    torch.save(tensors(held), path)
    name, rows = embedding_files.read(path, None, 4)
    (value,) = held.get("string_to_param", held).values()
    assert name == token
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.atleast_2d(value))
    assert embedding_files.read(path, "mine", 4)[0] == "mine"


def test_files_of_compvis_trainer_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    param = torch.nn.Parameter(torch.arange(8.0).reshape(2, 4))
    held = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": param}),
    }
    torch.save(held, tmp_path / "embeddings.pt")
    name, rows = embedding_files.read(tmp_path / "embeddings.pt", None, 4)
    assert name == "embeddings"
    np.testing.assert_array_equal(rows, np.arange(8.0).reshape(2, 4))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({}, "holds 0 entries; give a file of one token"),
        ({"a": np.ones(4), "b": np.ones(4)}, "holds 2 entries"),
        ({"string_to_param": 3}, "holds no dict"),
        ({"a": "text"}, "holds no array"),
        ({"a": np.ones((2, 5))}, r"holds \[2, 5\] under 'a', but .* are 4 wide"),
        ({"a": np.ones((0, 4))}, r"holds \[0, 4\] under"),
        ({"a": np.full(4, np.nan)}, "has values that are infinite or NaN"),
        ({"emb_params": np.ones(4)}, "doesn't say what its token is called; give tok"),
    ],
)
def test_what_is_no_embedding_is_a_line(held, words):
    with pytest.raises(UserError, match=f"^tokens_file {words}"):
        embedding_files.read(held, None, 4)


def test_files_that_are_none_are_a_line(tmp_path):
    with pytest.raises(UserError, match="^tokens_file: no file .*gone.pt'; give"):
        embedding_files.read(tmp_path / "gone.pt", None, 4)
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(b"rubbish" * 9)
        with pytest.raises(UserError, match=name):
            embedding_files.read(tmp_path / name, None, 4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("init_from=None", "but there is no model that draws it; set init_from"),
        ("diffusion_stage.lora.rank=2", "with diffusion_stage.lora.rank; of these"),
        ("diffusion_stage.preserve.prompt=x", "with diffusion_stage.preserve.prompt"),
        (f"{OPTION}.num_vectors=0", "num_vectors: 0; choose 1 or more"),
        (f"{OPTION}.placeholder_token=red", "'red' is in the vocabulary already"),
        (f"{OPTION}.placeholder_token=<other>", "'<other>' is in no caption of the da"),
        (f"{OPTION}.placeholder_token=None", "but no token is trained"),
        (f"{OPTION}.initializer_token=red blue", "is 2 tokens .red blue. for 1 embed"),
        (f"{OPTION}.initializer_token=天", "is not in the vocabulary, nor are its"),
    ],
)
def test_mistakes_are_a_line(other, pictures, tmp_path, override, words):
    config = config_of(other, pictures, f"{OPTION}.num_vectors=1", override)
    with pytest.raises(UserError, match=words) as caught:
        loop.train(config, tmp_path / "heir")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "heir").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("num_vectors=1.5", "num_vectors: 1.5; choose 1 or more, or None"),
        ("placeholder_token=7", "placeholder_token: 7 is no word; write it as one, su"),
        ("initializer_token=7", "initializer_token: 7 is no word"),
    ],
)
def test_values_of_other_types_are_a_line(option, words):
    overrides = [f"{OPTION}.placeholder_token=<toy>"] * option.startswith(("n", "i"))
    config = runs.debug("init_from=x", *overrides, f"{OPTION}.{option}")
    with pytest.raises(UserError, match=f"^{OPTION}.{words}"):
        inversion.check(config)


def test_a_token_belongs_to_one_text(other, pictures):
    config = config_of(other, pictures)
    config.conditioners.second = config.conditioners.text
    with pytest.raises(UserError, match="^conditioners: 2 text conditions"):
        inversion.check(config)
    del config.conditioners.second, config.conditioners.text
    with pytest.raises(UserError, match="^conditioners: no text condition"):
        inversion.check(config)
