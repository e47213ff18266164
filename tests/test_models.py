"""The networks: sizes, logits by hand, dropout, and the order of the 2016 checkpoints."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import flat

from prunelib import models


@pytest.mark.parametrize(
    ("build", "variables"), [("mlp", 47_410), ("lenet300", 266_610), ("lenet5", 431_080)]
)
def test_number_of_variables(build, variables):
    network = getattr(models, build)()
    found = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == variables
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    for one, two in zip(*map(jax.tree.leaves, (found, network.shapes)), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
    images = jax.ShapeDtypeStruct((3, 784), np.uint8)
    assert jax.eval_shape(network.apply, found, images).shape == (3, 10)


def test_logits_by_hand():
    network = models.mlp((4, 3, 3, 2))
    params = network.init(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (5, 4)).astype(np.uint8)
    x = images / 255
    for name in ("dense1", "dense2", "dense3"):
        x = x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        x = np.maximum(x, 0) if name != "dense3" else x
    for apply in (network.apply, jax.jit(network.apply)):
        np.testing.assert_allclose(apply(params, images), x, atol=1e-6)


def test_init_is_the_keys_alone():
    network = models.mlp((4, *[3] * 10, 2))
    one, again, other = (flat(network.init(jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    drawn = one[one != 0]  # biases start at zero
    assert len(np.unique(drawn)) == drawn.size == 4 * 3 + 9 * 9 + 6
    assert not np.isin(drawn, other).any()
    assert list(network.shapes)[::10] == ["dense01", "dense11"], "names are in order beyond nine"


# Dropout -----------------------------------------------------------------------------------------


def ones(x):
    return jnp.ones_like(x)


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_dropout_keeps_the_share_and_the_mean(keep):
    """Hidden activations of one, copied to the output: each is 0 or 1/keep, and 1 on average."""
    units = 2000
    network = models.Network([("dense1", partial(nnx.Linear, 2, units)), ones, models.dropout_here])
    params = network.init(jax.random.key(0))
    found = np.asarray(network.apply(params, jnp.ones((3, 2)), keep=keep, key=jax.random.key(1)))
    np.testing.assert_allclose(np.unique(found), [0, 1 / keep], rtol=1e-6)
    assert np.abs((found > 0).mean(1) - keep).max() < 4 * np.sqrt(keep * (1 - keep) / units)
    assert (found[0] != found[1]).any(), "each example has its own noise"


# LeNet-5 -----------------------------------------------------------------------------------------


def test_convolution_and_pooling_against_xla():
    x = jax.random.normal(jax.random.key(0), (2, 8, 10, 3))
    kernel = jax.random.normal(jax.random.key(1), (5, 3, 3, 4))
    own = partial(models.convolve, window_strides=(1, 1), padding="VALID")
    xla = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(own(x, kernel), xla(x, kernel), atol=1e-4)
    signal = jax.random.normal(jax.random.key(2), (2, 4, 8, 4))
    gradients = [jax.vjp(f, x, kernel)[1](signal) for f in (own, xla)]
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(models.max_pool(x), pooled)


# The flat order of other networks ----------------------------------------------------------------


@pytest.mark.parametrize("use_bias", [True, False])
def test_flat_order_of_another_network(use_bias):
    last = partial(nnx.Linear, 4, 2, use_bias=use_bias)
    network = models.Network([("dense1", partial(nnx.Linear, 3, 4)), jax.nn.relu, ("dense2", last)])
    params = network.init(jax.random.key(0))
    found = models.flat_from_params(params)
    assert found.shape == (3 * 4 + 4 * 2 + 4 + 2 * use_bias,)
    again = models.params_from_flat(found, network)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
