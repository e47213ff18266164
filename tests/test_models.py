"""The networks: sizes, logits by hand, dropout, and the order of the 2016 checkpoints."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prunelib import models


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("build", "variables"), [("mlp", 47_410), ("lenet300", 266_610), ("lenet5", 431_080)]
)
def test_number_of_variables(build, variables):
    network = getattr(models, build)()
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert count(shapes) == variables
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    images = jax.ShapeDtypeStruct((3, 784), np.uint8)
    assert jax.eval_shape(network.apply, shapes, images).shape == (3, 10)


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
    network = models.mlp((4, 3, 2))
    one, again, other = (network.init(jax.random.key(k)) for k in (0, 0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (one, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.ndim == 1 or (a != c).all()
    kernels = [one["dense1"]["kernel"], one["dense2"]["kernel"][:, :1]]
    assert len(np.unique(np.concatenate([np.ravel(k) for k in kernels]))) == 15


def test_equal_networks_are_one_for_the_compiler():
    assert models.mlp((4, 3, 2)) == models.mlp((4, 3, 2))
    assert hash(models.mlp((4, 3, 2))) == hash(models.mlp((4, 3, 2)))
    for other in (models.mlp((4, 4, 2)), models.mlp((4, 3, 3, 2)), models.mlp((4, 3, 2), jnp.tanh)):
        assert models.mlp((4, 3, 2)) != other


# Dropout -----------------------------------------------------------------------------------------


def ones(x):
    return jnp.ones_like(x)


def test_dropout_is_off_unless_a_key_is_given():
    network = models.mlp((4, 3, 2))
    params, images = network.init(jax.random.key(0)), jnp.ones((2, 4))
    plain = network.apply(params, images)
    np.testing.assert_array_equal(network.apply(params, images, keep=0.5), plain)
    kept = network.apply(params, images, keep=1.0, key=jax.random.key(0))
    np.testing.assert_array_equal(kept, plain)
    assert not np.allclose(network.apply(params, images, keep=0.5, key=jax.random.key(1)), plain)


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_dropout_keeps_the_share_and_the_mean(keep):
    """Hidden activations of one, copied to the output: each is 0 or 1/keep, and 1 on average."""
    units = 2000
    network = models.Network([("dense1", partial(nnx.Linear, 2, units)), ones, models.dropout_here])
    params = network.init(jax.random.key(0))
    found = np.asarray(network.apply(params, jnp.ones((3, 2)), keep=keep, key=jax.random.key(1)))
    np.testing.assert_allclose(np.unique(found), [0, 1 / keep], rtol=1e-6)
    error = np.sqrt(keep * (1 - keep) / units)
    assert np.abs((found > 0).mean(1) - keep).max() < 4 * error
    assert (found[0] != found[1]).any(), "each example has its own noise"


def test_each_place_and_key_has_its_own_noise():
    network = models.Network(
        [("dense1", partial(nnx.Linear, 2, 10_000)), ones, models.dropout_here, models.dropout_here]
    )
    params = network.init(jax.random.key(0))
    noise = [
        np.asarray(network.apply(params, jnp.ones((1, 2)), keep=0.5, key=jax.random.key(k)))
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(noise[0], noise[1])
    assert (noise[0] != noise[2]).any()
    assert (noise[0] > 0).mean() == pytest.approx(0.25, abs=0.02)  # 0.5 if both were the same


# LeNet-5 -----------------------------------------------------------------------------------------


def test_convolution_and_pooling_against_xla():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (5, 5, 3, 4))

    def xla(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def own(x, kernel):
        return models.convolve(x, kernel, (1, 1), "VALID")

    np.testing.assert_allclose(own(x, kernel), xla(x, kernel), atol=1e-4)
    signal = jax.random.normal(jax.random.key(2), (2, 4, 4, 4))
    for found, expected in zip(
        *(jax.vjp(f, x, kernel)[1](signal) for f in (own, xla)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(models.max_pool(x), pooled)


# The 2016 checkpoints ----------------------------------------------------------------------------


def test_flat_order_is_weights_then_biases():
    params = models.params_from_flat(np.arange(47_410, dtype=np.float32))
    assert params["dense1"]["kernel"][1, 0] == 50  # row by row
    assert params["dense2"]["kernel"][0, 0] == 784 * 50
    assert params["dense1"]["bias"][0] == 47_200
    assert params["dense5"]["bias"][-1] == 47_409
    np.testing.assert_array_equal(models.flat_from_params(params), np.arange(47_410))


def test_ten_layers_and_more():
    network = models.mlp((4, *[3] * 10, 2))
    assert list(network.init(jax.random.key(0)))[::10] == ["dense01", "dense11"]


def test_flat_order_without_biases():
    linear = partial(nnx.Linear, use_bias=False)
    layers = [("dense1", partial(nnx.Linear, 3, 4)), jax.nn.relu, ("dense2", partial(linear, 4, 2))]
    network = models.Network(layers)
    params = network.init(jax.random.key(0))
    flat = models.flat_from_params(params, network)
    assert flat.shape == (3 * 4 + 4 * 2 + 4,)
    again = models.params_from_flat(flat, network)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_flat_order_knows_kernels_and_biases_only():
    network = models.Network([("a", partial(nnx.LayerNorm, 3)), ("b", partial(nnx.Linear, 3, 2))])
    params = network.init(jax.random.key(0))
    for function, argument in (
        (models.flat_from_params, params),
        (models.params_from_flat, np.zeros(14, np.float32)),
    ):
        with pytest.raises(ValueError, match=r"\['scale'\]; use"):
            function(argument, network)


def test_shapes_are_those_of_init():
    for network in (models.mlp((4, 3, 2)), models.lenet5()):
        found = jax.eval_shape(network.init, jax.random.key(0))
        assert jax.tree.map(lambda s: (s.shape, s.dtype), network.shapes) == jax.tree.map(
            lambda s: (s.shape, s.dtype), found
        )


def test_flat_order_of_another_network():
    network = models.mlp((4, 3, 2))
    params = network.init(jax.random.key(0))
    back = models.params_from_flat(models.flat_from_params(params, network), network)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
