"""Checkpoints: bit for bit, several kept, damage found, a full disk survived."""

import collections
import errno
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, sharding
from ldm_jax.train import state as train_state

TX = optax.sgd(0.1, momentum=0.9)


def _state(step, size=300):
    rng = np.random.default_rng(step)
    params = {
        "w": jnp.asarray(rng.normal(size=(size, 7)).astype(np.float32)),
        "odd": {"nan": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32)},
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    }
    state = train_state.create(params, TX, 0.9)
    return state.replace(step=jnp.int32(step))


def _abstract(state):
    return checkpoint.single_device(jax.eval_shape(lambda: state))


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _save(folder, *steps, max_to_keep=None):
    saved = checkpoint.Checkpoints(folder, max_to_keep)
    for step in steps:
        saved.save(_state(step), {"step": step, "complete": False})
    saved.close()


def _restore(folder):
    return checkpoint.Checkpoints(folder).restore_newest(_abstract(_state(0)))


@pytest.fixture
def folder(tmp_path):
    _save(tmp_path / "stage", 2, 4)
    return tmp_path / "stage"


def test_newest_comes_back_bit_for_bit(folder):
    state, meta = _restore(folder)
    assert meta["step"] == 4 and meta["complete"] is False
    assert int(state.step) == 4
    assert _bits(state) == _bits(_state(4))
    assert jax.tree.structure(state) == jax.tree.structure(_state(4))


def test_averaged_params_alone(folder):
    params, meta = checkpoint.Checkpoints(folder).load_averaged(
        _abstract(_state(0)).ema
    )
    assert meta["step"] == 4
    assert _bits(params) == _bits(_state(4).ema)


def test_an_empty_folder_is_no_run_and_is_not_made(tmp_path):
    assert _restore(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="no sound checkpoint in"):
        checkpoint.Checkpoints(tmp_path / "none").load_averaged({})


def test_max_to_keep(tmp_path):
    _save(tmp_path, 1, 2, 3, 4, max_to_keep=2)
    assert checkpoint.Checkpoints(tmp_path).steps() == [4, 3]


def test_restores_onto_another_mesh(folder, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 8)
    mesh = jax.make_mesh((2, 4, 1), sharding.AXES)
    abstract = jax.eval_shape(lambda: _state(0))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        sharding.tree_shardings(abstract, mesh),
    )
    state, _ = checkpoint.Checkpoints(folder).restore_newest(abstract)
    assert not state.params["w"].sharding.is_fully_replicated
    assert _bits(state) == _bits(_state(4))


# ---- Damage --------------------------------------------------------------------------


def _array_files(step_folder):
    """The files that hold arrays, largest first."""
    files = [p for p in step_folder.rglob("*") if p.is_file() and "/d/" in str(p)]
    return sorted(files, key=lambda p: -p.stat().st_size)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def _empty(path):
    path.write_bytes(b"")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _largest(step_folder):
    return _array_files(step_folder)[:1]


def _all_arrays(step_folder):
    return _array_files(step_folder)


def _params_metadata(step_folder):
    return [p for p in (step_folder / "params").iterdir() if p.is_file()]


def _meta(step_folder):
    return [p for p in (step_folder / "meta").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "damage",
    [_truncate, _zero, _empty, lambda p: p.unlink()],
    ids=["truncated", "zeroed", "emptied", "deleted"],
)
@pytest.mark.parametrize("files", [_largest, _all_arrays, _params_metadata, _meta])
def test_a_damaged_newest_gives_way_to_the_one_before(folder, damage, files, caplog):
    chosen = files(folder / "4")
    assert chosen
    for path in chosen:
        damage(path)
    with caplog.at_level(logging.WARNING):
        state, meta = _restore(folder)
    # What orbax can do without, it may do without; a wrong array never comes back.
    assert meta["step"] in (2, 4)
    assert _bits(state) == _bits(_state(meta["step"]))
    said = "going back to the one before it" in caplog.text
    assert said == (meta["step"] == 2)
    if files is not _params_metadata:
        assert meta["step"] == 2
    if said:
        assert f"checkpoint {folder / '4'} is damaged" in caplog.text


def test_an_item_that_is_gone(folder, caplog):
    shutil.rmtree(folder / "4" / "opt_state")
    assert _restore(folder)[1]["step"] == 2
    assert f"checkpoint {folder / '4'} is damaged" in caplog.text


@pytest.mark.parametrize("offset", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_no_flipped_bit_comes_back_unnoticed(folder, offset):
    path = _array_files(folder / "4")[0]
    data = bytearray(path.read_bytes())
    data[int(len(data) * offset)] ^= 16
    path.write_bytes(data)
    state, meta = _restore(folder)
    assert _bits(state) == _bits(_state(meta["step"]))


def test_fingerprint_notices_a_bit_and_a_swap():
    tree = {"a": jnp.arange(1.0, 9.0), "b": jnp.arange(8)}
    prints = checkpoint.fingerprint(tree)
    assert checkpoint.fingerprint(jax.tree.map(jnp.copy, tree)) == prints
    a = np.asarray(tree["a"])
    flipped = a.view(np.uint32).copy()
    flipped[3] ^= 1
    swapped = a.copy()
    swapped[[2, 5]] = swapped[[5, 2]]
    for other in (flipped.view(np.float32), swapped, np.zeros_like(a)):
        changed = checkpoint.fingerprint(tree | {"a": jnp.asarray(other)})
        assert changed[0] != prints[0] and changed[1] == prints[1]


def test_other_arrays_than_were_saved_are_damage(folder, caplog):
    """Bits that decode without complaint are still not the ones that were saved."""
    path = next((folder / "4" / "meta").rglob("metadata"))
    meta = json.loads(path.read_text())
    meta["fingerprints"]["ema"][0] ^= 1
    path.write_text(json.dumps(meta))
    assert _restore(folder)[1]["step"] == 2
    assert "ema is not what was saved" in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(folder):
    for step in ("2", "4"):
        for path in _array_files(folder / step):
            _truncate(path)
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged.*4, 2"):
        _restore(folder)
    with pytest.raises(UserError, match="no sound checkpoint"):
        checkpoint.Checkpoints(folder).load_averaged(_abstract(_state(0)).ema)


def test_half_written_steps_do_not_count(folder):
    shutil.copytree(folder / "4", folder / "6.orbax-checkpoint-tmp-0")
    assert checkpoint.Checkpoints(folder).steps() == [4, 2]
    assert _restore(folder)[1]["step"] == 4


def test_a_damaged_step_is_written_again(folder):
    for path in _array_files(folder / "4"):
        _zero(path)
    assert _restore(folder)[1]["step"] == 2
    _save(folder, 4)
    assert _restore(folder)[1]["step"] == 4


# ---- A full disk ---------------------------------------------------------------------


def test_too_little_space_is_said_before_writing(folder, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(UserError, match=r"0 MB free.*free some space or lower"):
        _save(folder, 6)
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_disk_that_fills_up_leaves_the_older_ones(folder, monkeypatch, wrapped):
    saved = checkpoint.Checkpoints(folder)

    def full(*args, **kwargs):
        error = OSError(errno.ENOSPC, "No space left on device")
        if wrapped:
            raise RuntimeError("async save failed") from error
        raise error

    monkeypatch.setattr(saved.manager, "save", full)
    with pytest.raises(UserError, match=r"the disk of .* is full.*intact"):
        saved.save(_state(6), {"step": 6})
    saved.manager.close()
    assert _restore(folder)[1]["step"] == 4


def test_other_errors_stay_what_they_are(folder, monkeypatch):
    saved = checkpoint.Checkpoints(folder)

    def broken(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saved.manager, "save", broken)
    with pytest.raises(PermissionError):
        saved.save(_state(6), {"step": 6})


def test_a_real_limit_on_file_size(folder):
    """The kernel itself refuses to write: SIGXFSZ ignored, it gives EFBIG."""
    resource = pytest.importorskip("resource")
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = _state(6, size=20_000)
    saved = checkpoint.Checkpoints(folder)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(UserError, match="is full"):
            saved.save(large, {"step": 6, "complete": False})
            saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert _restore(folder)[1]["step"] == 4


# ---- Donation ------------------------------------------------------------------------


def test_what_is_saved_is_what_was_there_although_the_buffers_move_on(tmp_path):
    """Writing goes on while the loop trains, and the loop donates its buffers."""
    state = jax.jit(lambda: _state(2, size=200_000))()
    expected = _bits(state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    update.lower(state).compile()
    saved = checkpoint.Checkpoints(tmp_path / "stage")
    saved.save(state, {"step": 2, "complete": False})
    moving = state
    for _ in range(50):
        moving = update(moving)
    jax.block_until_ready(moving)
    saved.close()
    restored, _ = checkpoint.Checkpoints(tmp_path / "stage").restore_newest(
        _abstract(moving)
    )
    assert _bits(restored.replace(step=jnp.int32(2))) == expected
