"""What configs and commands share: presets, overrides, one-line errors.

A config file defines `get_config(arg)`; `--config=configs/txt2img.py:sd2,seed=1`
passes `arg="sd2,seed=1"`. Sections of a config are constructor keyword arguments, so
a misspelt one fails where it is used. Imports neither JAX nor TensorFlow.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import json
import logging
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections


class UserError(Exception):
    """A mistake of the user's: one line with field, value and mend; exit code 2."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def setup_logging() -> None:
    """Warnings in one line each; of the libraries below us only their errors."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: print(
        f"warning: {message}", file=sys.stderr
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for an unknown `name`, or the legal ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose one of {', '.join(known)}"


def construct(name: str, make: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """`make(**kwargs)` of the config section `name`; UserError where one is unknown."""
    known = inspect.signature(make).parameters
    for field in kwargs:
        if field not in known:
            raise UserError(f"{name}.{field}: no such option; {nearest(field, known)}")
    return make(**kwargs)


def parse_value(text: str) -> object:
    """Reads `text` as a Python literal (1e-4, (1, 2), True, None), else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def get_preset(
    presets: dict[str, Callable[[], ml_collections.ConfigDict]], arg: str | None
) -> ml_collections.ConfigDict:
    """Resolves `"preset,key=value,…"` against a file's presets; the first is default.

    `key` is dotted, `unet.model_channels=64`. Raises UserError for an unknown preset
    or key, with the nearest known one.
    """
    words = [word for word in split_arg(arg or "") if word]
    name = next(iter(presets))
    if words and "=" not in words[0]:
        name = words.pop(0)
    if name not in presets:
        raise UserError(f"--config: no preset {name!r}; {nearest(name, presets)}")
    config = presets[name]()
    config.preset = name
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise UserError(f"--config: {word!r} is not of the form key=value")
        override(config, key, value)
    return config


def split_arg(arg: str) -> list[str]:
    """Splits at commas outside of brackets: "a,b=(1,2)" -> ["a", "b=(1,2)"]."""
    words, depth = [""], 0
    for letter in arg:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return words


def override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` of `config` to `text` read as the field's own type.

    Raises UserError where the key does not exist (it names the nearest one) or the
    value is of another type.
    """
    section, parts = config, key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if not isinstance(section, ml_collections.ConfigDict):
            raise UserError(f"--config.{key}: {where} is a value, not a section")
        if part not in section:
            names = [f"{where}.{name}" if where else name for name in section]
            hint = nearest(".".join(parts[: depth + 1]), names)
            raise UserError(f"--config.{key}: no such field; {hint}")
        if depth < len(parts) - 1:
            section = section[part]
    value, old = parse_value(text), section[parts[-1]]
    if isinstance(old, ml_collections.ConfigDict):
        fields = ", ".join(f"{key}.{name}" for name in old)
        raise UserError(f"--config.{key}: a section; set one of its fields: {fields}")
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    comparable = old is not None and value is not None
    if comparable and type(value) is not type(old):
        if isinstance(old, str):
            value = text
        else:
            raise UserError(
                f"--config.{key}: {text!r} is not of type {type(old).__name__}"
                f" (the default is {old!r})"
            )
    with section.ignore_type():
        section[parts[-1]] = value


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Loads "path.py:arg" and applies "dotted.key=value" overrides, in order."""
    path, _, arg = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config: no file {path!r}; see configs/ for those that ship")
    config = _module(path).get_config(arg or None)
    for item in overrides:
        override(config, *split_override(item))
    return config


def split_override(item: str) -> tuple[str, str]:
    """(key, text) of "dotted.key=value"."""
    key, separator, text = item.partition("=")
    if not separator:
        raise UserError(f"--config.{item}: write --config.{key}=VALUE")
    return key, text


def presets_of(
    path: pathlib.Path,
) -> dict[str, Callable[[], ml_collections.ConfigDict]]:
    """The presets of a config file, {name: what makes its config}."""
    return _module(path).PRESETS


def _module(path):
    module_spec = importlib.util.spec_from_file_location("ldm_jax_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def to_json(config: ml_collections.ConfigDict) -> str:
    """Serialises a config; `from_json` gives an equal one back."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads what `to_json` wrote. Lists come back as tuples, as configs hold them."""

    def frozen(value):
        if isinstance(value, dict):
            return {key: frozen(item) for key, item in value.items()}
        return tuple(frozen(v) for v in value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(frozen(json.loads(text)))


def flatten(section: ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    """Returns {"dotted.key": value} of all leaves."""
    flat = {}
    for key, value in section.items():
        if isinstance(value, ml_collections.ConfigDict) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> str:
    """Says which fields differ in what is computed: "a.b: 1 -> 2, …"; "" if none.

    What stands under `report` and `mesh` changes what is shown and where it runs, not
    what is computed, so a run may be continued with other values there; and with other
    learning rates and clipping, for that is how one is mended that went astray. None is
    as good as absent, so that a newer version with one more option goes on too.
    """
    old, new = flatten(old), flatten(new)
    free = re.compile(r"(report|mesh)\..*|preset|.*optim\.(learning_rate|clip_norm)")
    fields = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if not free.fullmatch(key) and old.get(key) != new.get(key)
    ]
    return ", ".join(fields)
