"""Who may import whom, read from the source."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((REPO / "ldm_jax").rglob("*.py"))
CONFIGS = sorted((REPO / "configs").glob("*.py"))


def imported(text: str) -> set[str]:
    """Dotted names of all that a source imports, at any depth; relative ones dotted."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def _within(name: str, prefixes) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def _part(path: pathlib.Path) -> str:
    """`nets` for ldm_jax/nets/unet.py, `sample` for ldm_jax/sample.py.

    A folder's command is a part by itself: it may import what its modules may not.
    """
    if path.name == "__main__.py":
        return f"{path.parent.name} command"
    return path.relative_to(REPO / "ldm_jax").parts[0].removesuffix(".py")


# Part of the package -> the parts of it that it may import besides itself.
MAY_IMPORT = {
    "nets": {"resample"},
    "diffusion": {"config"},
    "conditioning": {"nets", "diffusion", "config"},
    "convert": {"nets", "config"},
    "data": {"config", "picture", "resample"},
    "config": set(),
    "defaults": set(),
    "picture": set(),
    "resample": set(),
}
# Third party -> the parts, or single files, that may import it.
ONLY_IN = {
    "tensorflow": {"data", "train"},
    "tensorflow_datasets": {"data", "train"},
    "clu": {"train"},
    "torch": {"convert/check.py", "convert/references.py"},
    "diffusers": {"convert/references.py"},
    "jax._src": set(),
}


def broken_rules(path: pathlib.Path, text: str) -> list[str]:
    """What `text`, were it at `path`, imports against the rules."""
    part, faults = _part(path), []
    places = {part, path.relative_to(REPO / "ldm_jax").as_posix()}
    for name in imported(text):
        if name.startswith("."):
            faults.append(f"relative import {name}")
        for module, parts in ONLY_IN.items():
            if _within(name, [module]) and not places & parts:
                faults.append(f"{name} in {part}")
        if _within(name, ["ldm_jax"]) and part in MAY_IMPORT:
            legal = [f"ldm_jax.{p}" for p in MAY_IMPORT[part] | {part}]
            if not _within(name, legal):
                faults.append(f"{name} in {part}")
    return faults


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_point_one_way(path):
    assert broken_rules(path, path.read_text()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configs_import_next_to_nothing(path):
    legal = ["functools", "ml_collections", "ldm_jax.config", "ldm_jax.defaults"]
    for name in imported(path.read_text()):
        assert _within(name, legal), name


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(REPO)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500


def test_package_itself_imports_nothing_heavy():
    tree = ast.parse((REPO / "ldm_jax" / "__init__.py").read_text())
    at_import = ast.Module([n for n in tree.body if isinstance(n, ast.Import)], [])
    at_import.body += [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert imported(ast.unparse(at_import)) <= {"os", "typing"}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nets/unet.py", "from ldm_jax.diffusion import schedules"),
        ("nets/unet.py", "from ldm_jax import config"),
        ("diffusion/samplers.py", "from ldm_jax.nets import unet"),
        ("data/sources.py", "def f():\n    from ldm_jax.train import state"),
        ("conditioning/tokenizers.py", "import ldm_jax.sample"),
        ("convert/compvis.py", "import torch"),
        ("convert/networks.py", "def f():\n    from diffusers import UNet2DModel"),
        ("check.py", "import torch"),
        ("convert/check.py", "import tensorflow"),
        ("sample.py", "import tensorflow as tf"),
        ("evaluate/metrics.py", "from clu import metric_writers"),
        ("train/loop.py", "from jax._src import core"),
        ("train/loop.py", "from . import state"),
    ],
)
def test_the_rules_notice(path, text):
    assert len(broken_rules(REPO / "ldm_jax" / path, text)) == 1
