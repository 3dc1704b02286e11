"""Strict JAX for every test: no silent promotion, eight devices, a warm cache."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools  # noqa: E402

import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE / "ldm_jax" / "xla_tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _lenient(make):
    """optax raises floats to integer powers, which strict promotion forbids."""

    @functools.wraps(make)
    def made(*args, **kwargs):
        tx = make(*args, **kwargs)

        def update(*args, **kwargs):
            with jax.numpy_dtype_promotion("standard"):
                return tx.update(*args, **kwargs)

        return optax.GradientTransformation(tx.init, update)

    return made


optax.adamw = _lenient(optax.adamw)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where prepared data sets of this test session live."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module", autouse=True)
def programs_let_go():
    """Keeps a worker's memory flat: what a file compiled would stay to the end."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def fast_compile():
    """Compiles in a third of the time to slower programs: for what runs a few steps."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compile(fast_compile):
    """As users have it, for a test of such a file: the fast programs round worse."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
