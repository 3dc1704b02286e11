"""The runs that training starts from: `init_from` and `autoencoder_from`.

Either names a run, or a released model as `python -m ldm_jax.convert` takes it: a file,
a folder of diffusers or a hub id. Of that a run is made once, in
~/.cache/ldm_jax/data/released or $LDM_JAX_DATA/released, and found there the next time.
"""

import copy
import hashlib
import os
import pathlib

import jax
import ml_collections

from ldm_jax import released
from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, report

FIELDS = {"init_from": "diffusion", "autoencoder_from": "autoencoder"}


def run_of(config: ml_collections.ConfigDict, field: str) -> pathlib.Path:
    """The run that `config[field]` names, or the one that is made of it."""
    source = os.fspath(config[field])
    if not released.is_source(source):
        return pathlib.Path(source)
    path = pathlib.Path(source).expanduser()
    sign = [source]  # an id on the hub
    if path.exists():
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        facts = [(file, file.stat()) for file in files]
        sign = [str(path.resolve())]
        sign += [f"{file.name} {s.st_size} {s.st_mtime_ns}" for file, s in facts]
    sign.append(config.diffusion.parameterization)
    digest = hashlib.sha256("\n".join(sign).encode()).hexdigest()[:12]
    root = os.environ.get("LDM_JAX_DATA") or "~/.cache/ldm_jax/data"
    return pathlib.Path(root).expanduser() / "released" / f"{path.stem}-{digest}"


def make(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Makes the runs of released models that `config` names and `workdir` still needs.

    A model is that of `config` itself where it fits its nets, else it is recognised,
    and what its files don't say is as in `config`: eps or v, and the tokenizers. Raises
    UserError where neither can be.
    """
    for field, stage in FIELDS.items():
        source = config.get(field)
        begun = checkpoint.Checkpoints(workdir / stage).steps()
        if not source or begun or not released.is_source(source):
            continue
        run = run_of(config, field)
        if run.exists():
            continue
        if jax.process_count() > 1:  # orbax would wait for the others
            raise UserError(
                f"{field}: {source} is no run, and several processes can't make one of"
                f" it; run python -m ldm_jax.convert {source} RUN first and give RUN"
            )
        report.say(f"{field}: making a run of {source} in {run}")
        try:
            opened = _open(config, os.fspath(source))
        except UserError as error:
            raise UserError(
                f"{field}: {source}: {error}; or make a run of it with python -m"
                " ldm_jax.convert, and give that"
            ) from error
        if stage not in opened.config.stages:
            raise UserError(
                f"{field}: {source} is a first stage alone; give it as autoencoder_from"
            )
        released.write(run, opened, field)


def _open(config, source) -> released.Opened:
    """A released model, as `config` where that fits it."""
    whole = released.open_source(source)
    own = copy.deepcopy(config)
    own.update({field: None for field in FIELDS})
    # What something is added to has none of it itself.
    own.diffusion_stage.lora.update(dict(rank=None, init_from=None))
    own.diffusion_stage.inversion.update(dict.fromkeys(own.diffusion_stage.inversion))
    try:
        return released.open_parts(whole, own)
    except UserError:
        predicts = config.diffusion.parameterization
        whole, theirs = released.settle(source, predicts=predicts)
    for name, section in theirs.get("conditioners", {}).items():
        ours = config.conditioners.get(name, {})
        if "tokenizer" in section and "tokenizer" in ours:
            section.tokenizer = ours.tokenizer
    return released.open_parts(whole, theirs)
