"""Units and filters, against masked networks, whole Hessians and least squares, in float64."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from prunelib import chains, curvature, models, pruning, units
from prunelib.data import Examples
from prunelib.passes import cross_entropy

pytestmark = pytest.mark.usefixtures("x64")


def convolutional(**options):
    """A small network of two convolutions: padding, strides, a flattening, two dense layers."""
    conv = partial(nnx.Conv, **options)
    first = partial(conv, 1, 3, kernel_size=(3, 3), padding="SAME")
    second = partial(conv, 3, 4, kernel_size=(2, 3), padding="VALID", strides=(2, 1))
    dense1, dense2 = (partial(nnx.Linear, *sizes, **options) for sizes in ((32, 5), (5, 3)))
    return models.Network(
        [lambda x: x.reshape(len(x), 8, 12, 1), ("conv1", first), jax.nn.relu, models.max_pool,
         ("conv2", second), jax.nn.relu, models.flatten, ("dense1", dense1), jax.nn.relu,
         ("dense2", dense2)]
    )  # fmt: skip


def dense_without_bias():
    sizes = ((6, 5), (5, 4), (4, 3))
    layers = []
    for number, (inputs, outputs) in enumerate(sizes, 1):
        build = partial(nnx.Linear, inputs, outputs, use_bias=False)
        layers += [(f"dense{number}", build), jax.nn.relu]
    return models.Network(layers[:-1])


NETWORKS = {
    "one hidden": partial(models.mlp, (6, 5, 3)),
    "three hidden": partial(models.mlp, (6, 5, 4, 4, 3)),
    "tanh": partial(models.mlp, (6, 5, 4, 3), jnp.tanh),
    "sigmoid": partial(models.mlp, (6, 5, 4, 3), jax.nn.sigmoid),
    "no bias": dense_without_bias,
    "convolutional": convolutional,
    "convolutional, no bias": partial(convolutional, use_bias=False),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def made(name, seed=0, n=40):
    """A network with random params, examples, and units of which some go."""
    network, rng = NETWORKS[name](), np.random.default_rng(seed)
    params = jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape) / np.sqrt(w.shape[0])), network.shapes
    )
    inputs = 96 if "conv" in name else 6
    data = Examples(rng.random((n, inputs)), rng.integers(0, 3, n))
    chosen = {}
    for layer in list(params)[:-1]:
        chosen[layer] = rng.random(params[layer]["kernel"].shape[-1]) > 0.4
        chosen[layer][0] = True
    return network, params, data, chosen


@each_network
@pytest.mark.parametrize("seed", range(3))
def test_the_shrunk_network_is_the_masked_one(name, seed):
    network, params, data, chosen = made(name, seed)
    small, fewer = units.shrink(network, params, chosen)
    masked = pruning.apply_mask(params, units.mask(network, params, chosen))
    expected = network.apply(masked, data.images)
    np.testing.assert_allclose(small.apply(fewer, data.images), expected, atol=1e-13)
    left = jax.tree.map(jnp.size, fewer)
    ones = jax.tree.map(lambda k: int(k.sum()), units.mask(network, params, chosen))
    assert left == ones  # not a weight more than the mask keeps
    shapes = jax.tree.map(jnp.shape, fewer)
    assert jax.tree.map(jnp.shape, small.shapes) == shapes
    assert jax.tree.map(jnp.shape, small.init(jax.random.key(0))) == shapes
    assert pruning.shrink is units.shrink


@each_network
def test_its_curvature_is_the_masked_networks_on_what_remains(name):
    network, params, data, chosen = made(name)
    small, fewer = units.shrink(network, params, chosen)
    kept = units.mask(network, params, chosen)
    masked = pruning.apply_mask(params, kept)
    expected = curvature.hessian_diagonal(network, masked, data, "one_hot")
    found = curvature.hessian_diagonal(small, fewer, data)
    expected = jax.tree.map(lambda h, k: h[k], expected, kept)
    jax.tree.map(
        lambda h, e: np.testing.assert_allclose(h.ravel(), e, atol=1e-12), found, expected
    )


def test_a_layer_that_is_not_named_stays_whole():
    network, params, data, chosen = made("three hidden")
    small, fewer = units.shrink(network, params, {"dense2": chosen["dense2"]})
    assert fewer["dense1"]["kernel"].shape == (6, 5)
    again, same = units.shrink(small, fewer, {})
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, fewer))
    np.testing.assert_array_equal(again.apply(same, data.images), small.apply(fewer, data.images))


@each_network
def test_gate_is_the_joint_quadratic_of_all_outgoing_weights(name):
    if name in ("tanh", "sigmoid"):
        pytest.skip("there Gauss-Newton is not the Hessian")
    network, params, data, _ = made(name, n=12)
    flat, unravel = ravel_pytree(params)

    def loss(w):
        return cross_entropy(network.apply(unravel(w), data.images), data.labels).mean()

    hessian, found = jax.hessian(loss)(flat), units.gate(network, params, data)
    for layer, own in found.items():
        for u in range(own.size):
            only = jnp.arange(own.size) != u
            kept = units.mask(network, params, {layer: only})
            kept[layer] = jax.tree.map(np.ones_like, kept[layer])  # the outgoing weights alone
            d = ravel_pytree(pruning.apply_mask(params, kept))[0] - flat
            np.testing.assert_allclose(own[u], 0.5 * d @ hessian @ d, atol=1e-12)


@each_network
def test_summed_adds_what_the_mask_takes(name):
    network, params, _, _ = made(name)
    scores = pruning.magnitude(params)
    for layer, own in units.summed(network, scores).items():
        for u in range(own.size):
            kept = units.mask(network, params, {layer: jnp.arange(own.size) != u})
            gone = jax.tree.map(lambda s, k: float(s[~k].sum()), scores, kept)
            np.testing.assert_allclose(own[u], sum(jax.tree.leaves(gone)), rtol=1e-12)


def patches_of(network, params, images, name):
    """What meets the kernel of a layer, a row for each example and place, and what comes out."""
    x = images
    for layer in network.layers:
        if layer.name == name:
            kernel, z = params[name]["kernel"], layer(params, x)
            if kernel.ndim == 2:
                return np.asarray(x), np.asarray(z)
            eye = jnp.eye(kernel[..., 0].size).reshape(*kernel.shape[:3], -1)
            module = layer.module(params)
            rows = jax.lax.conv_general_dilated(
                x, eye, np.resize(module.strides, 2), module.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            return (np.asarray(y).reshape(-1, y.shape[-1]) for y in (rows, z))
        x = layer(params, x)
    raise AssertionError(name)


def fitted(x, z, old, rows, damping, bias):
    """Ridge regression as one dense least-squares problem, and its bias."""
    mean, target = (x.mean(0), z.mean(0)) if bias else (0 * x[0], 0 * z[0])
    a = (x - mean) / np.sqrt(len(x))
    ridge = np.sqrt(damping * (a**2).sum(0).mean())
    left = np.concatenate([a, ridge * np.eye(a.shape[1])])[:, rows]
    right = np.concatenate([(z - target) / np.sqrt(len(x)), ridge * old])
    # towards the old weights on the rows that stay; on those that go there is no pull
    right[len(x) :][~rows] = 0
    kernel = np.zeros_like(old)
    kernel[rows] = np.linalg.lstsq(left, right)[0]
    return kernel, target - mean @ kernel


@each_network
@pytest.mark.parametrize("damping", [0.01, 1e-9])
def test_refit_is_a_dense_least_squares_layer_by_layer(name, damping):
    network, params, data, chosen = made(name, n=60)
    found = units.refit(network, params, chosen, data, damping)
    kept = units.mask(network, params, chosen)
    assert jax.tree.all(jax.tree.map(lambda w, k: bool((w[~k] == 0).all()), found, kept))
    names = list(params)
    for before, after in pairwise(names):
        x, _ = patches_of(network, found, data.images, after)
        _, z = patches_of(network, params, data.images, after)
        old = np.asarray(params[after]["kernel"]).reshape(x.shape[1], -1)
        rows = np.resize(chosen[before], x.shape[1])
        kernel, bias = fitted(x, z, old, rows, damping, "bias" in params[after])
        kernel = kernel.reshape(params[after]["kernel"].shape) * kept[after]["kernel"]
        np.testing.assert_allclose(found[after]["kernel"], kernel, atol=1e-6)
        if "bias" in params[after]:
            np.testing.assert_allclose(found[after]["bias"], bias * kept[after]["bias"], atol=1e-6)


@pytest.mark.parametrize("name", ["one hidden", "sigmoid"])
def test_a_unit_that_always_says_the_same_goes_into_the_next_bias(name):
    network, params, data, _ = made(name)
    params["dense1"]["kernel"] = params["dense1"]["kernel"].at[:, 1].set(0)
    params["dense1"]["bias"] = params["dense1"]["bias"].at[1].set(2.0)
    chosen = {"dense1": np.arange(5) != 1}
    expected = network.apply(params, data.images)
    dropped, fewer = units.shrink(network, params, chosen)
    assert jnp.abs(dropped.apply(fewer, data.images) - expected).max() > 0.1  # its share is gone
    found = units.refit(network, params, chosen, data)
    np.testing.assert_allclose(network.apply(found, data.images), expected, atol=1e-9)


@each_network
def test_obs_takes_the_unit_that_the_others_replace_most_cheaply(name):
    """The first price, and the last but one, by trying all units with a dense least squares."""
    if name in ("tanh", "sigmoid"):
        pytest.skip("there Gauss-Newton is not the Hessian")
    network, params, data, _ = made(name, n=60)
    found = units.obs(network, params, data)
    names = list(params)
    for before, after in pairwise(names):
        x, z = patches_of(network, params, data.images, after)
        old = np.asarray(params[after]["kernel"]).reshape(x.shape[1], -1)
        bias = "bias" in params[after]

        def of_shift(shift, images, after=after):
            return chains.shifted(network, params, images, {after: shift})[0]

        shift = jnp.zeros((1,) * (params[after]["kernel"].ndim - 1) + z.shape[1:])
        currency = np.asarray(curvature.hessian_diagonal(of_shift, shift, data, "one_hot")).ravel()
        a = x - x.mean(0) if bias else x
        hessian = a.T @ a / len(a)
        hessian = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(len(hessian))

        def price(gone, hessian=hessian, old=old, currency=currency, own=found[before]):
            rows = np.resize(~np.isin(np.arange(own.size), gone), len(old))
            delta = -old.copy()
            target = hessian[rows][:, ~rows] @ old[~rows]
            delta[rows] = np.linalg.solve(hessian[rows][:, rows], target)
            return 0.5 * (currency * (delta * (hessian @ delta))).sum()

        width = found[before].size
        prices = [price([u]) for u in range(width)]
        first = int(found[before].argmin())
        np.testing.assert_allclose(found[before][first], min(prices), rtol=1e-6)
        assert first == int(np.argmin(prices))
        second = min(price([first, u]) for u in range(width) if u != first) - min(prices)
        expected = max(second, min(prices))  # the running maximum
        np.testing.assert_allclose(np.sort(found[before])[1], expected, rtol=1e-6)


def test_spared_keeps_the_order_and_one_unit_of_each_layer():
    scores = {"a": jnp.array([1.0, 3.0, 2.0]), "b": jnp.array([9.0, 8.0])}
    kept = pruning.mask(units.spared(scores), 60)
    assert kept["a"].tolist() == [False, True, False]
    assert kept["b"].tolist() == [True, False]


def test_bad_input_is_refused_in_words():
    network, params, data, _ = made("three hidden")
    all_of = {name: np.ones(len(layer["bias"]), bool) for name, layer in params.items()}
    with pytest.raises(ValueError, match=r"the last layer's are the classes"):
        units.shrink(network, params, {"dense4": all_of["dense4"]})
    with pytest.raises(ValueError, match=r"expected booleans for some of \['dense1'"):
        units.shrink(network, params, {"conv1": all_of["dense1"]})
    with pytest.raises(ValueError, match=r"units\['dense2'\]: expected 4 booleans"):
        units.shrink(network, params, {"dense2": all_of["dense1"]})
    with pytest.raises(ValueError, match=r"units\['dense2'\]: .* got 0 True"):
        units.shrink(network, params, {"dense2": ~all_of["dense2"]})
    with pytest.raises(TypeError, match=r"units: expected booleans, got float64"):
        units.shrink(network, params, {"dense2": np.ones(4)})
    with pytest.raises(ValueError, match=r"network: units need a models.Network"):
        units.shrink(network.apply, params, {})
    joined = models.Network(
        [("dense1", partial(nnx.Linear, 6, 4)), lambda x: x[:, :3] + x[:, 1:],
         ("dense2", partial(nnx.Linear, 3, 3))]
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"nothing between may join or split"):
        units.gate(joined, joined.init(jax.random.key(0)), data)
