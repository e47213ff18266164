"""What every test runs under: JAX strict about shapes, no window, no chance."""

import os
import sys

# Most of the time of these tests goes into compiling, for data that is tiny. The notebooks, which
# are compared too, run as a reader would run them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import hypothesis
import jax
import matplotlib
import pytest

matplotlib.use("Agg")
# A silent broadcast of [n] against [n, m] is how a saliency goes wrong without an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Eight devices for the tests of sharding; all else uses the first and doesn't notice.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def x64():
    """Float64 inside this test only: what it makes is float64 unless it says otherwise."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between dtypes inside this test.

    Not for all tests: Optax's Adam divides by ``1 - decay**count`` with an integer count.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
