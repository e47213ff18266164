"""OBS and its heirs, against constrained minima and brute force, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prunelib import curvature, models, pruning, surgeon
from prunelib.data import Examples, scaled

SEEDS = range(3)
pytestmark = pytest.mark.usefixtures("x64")


def problem(seed, n=8):
    """Weights and a positive definite Hessian."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2 * n, n))
    return jnp.asarray(rng.normal(size=n)), jnp.asarray(rows.T @ rows / n + 0.1 * np.eye(n))


def constrained(w, hessian, gone):
    """The minimum of ½ δᵀHδ with δ = -w on `gone`, from its KKT system."""
    n, m = len(w), len(gone)
    rows = np.eye(n)[list(gone)]
    system = np.block([[np.asarray(hessian), rows.T], [rows, np.zeros((m, m))]])
    right = np.concatenate([np.zeros(n), -np.asarray(w)[list(gone)]])
    return np.linalg.solve(system, right)[:n]


@pytest.mark.parametrize("seed", SEEDS)
def test_one_step_is_the_constrained_minimum(seed):
    w, hessian = problem(seed)
    inverse = jnp.linalg.inv(hessian)
    for k in range(len(w)):
        delta, price = surgeon.step(w, inverse, k)
        expected = constrained(w, hessian, [k])
        np.testing.assert_allclose(delta, expected, atol=1e-11)
        np.testing.assert_allclose(price, 0.5 * expected @ hessian @ expected, atol=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_taking_out_equals_the_reduced_inverse(seed):
    _, hessian = problem(seed)
    left = [0, 1, 3, 4, 5, 6, 7]
    found = surgeon.without(jnp.linalg.inv(hessian), 2)
    expected = jnp.linalg.inv(hessian[jnp.ix_(jnp.array(left), jnp.array(left))])
    np.testing.assert_allclose(found[np.ix_(left, left)], expected, atol=1e-11)
    np.testing.assert_allclose(found[2], 0, atol=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_set_is_the_same_in_any_order(seed):
    w, hessian = problem(seed)
    gone = [1, 4, 6]
    at_once = surgeon.refit(w, hessian, jnp.asarray(~np.isin(np.arange(8), gone)))
    np.testing.assert_allclose(at_once, w + constrained(w, hessian, gone), atol=1e-11)
    for order in itertools.permutations(gone):
        now, inverse = w, jnp.linalg.inv(hessian)
        for k in order:
            now, inverse = now + surgeon.step(now, inverse, k)[0], surgeon.without(inverse, k)
        np.testing.assert_allclose(now, at_once, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_equals_step_by_step(seed):
    w, hessian = problem(seed)
    places, prices = surgeon.greedy(w, jnp.linalg.inv(hessian))
    now, inverse, left = w, jnp.linalg.inv(hessian), list(range(8))
    for number in range(8):
        costs = [float(surgeon.step(now, inverse, k)[1]) for k in left]
        k = left.pop(int(np.argmin(costs)))
        assert int(places[k]) == number
        np.testing.assert_allclose(prices[k], min(costs), rtol=1e-8)
        if left:
            now, inverse = now + surgeon.step(now, inverse, k)[0], surgeon.without(inverse, k)


@pytest.mark.parametrize("seed", SEEDS)
def test_sparsegpt_is_obs_where_the_order_is_the_same(seed):
    """In input order, each error made up for by later inputs: OBS on what comes later."""
    w, hessian = problem(seed)
    kept = np.random.default_rng(seed).random(8) > 0.5
    upper = jnp.linalg.cholesky(jnp.linalg.inv(hessian)).T
    found = surgeon.sweep(w[:, None], upper, jnp.asarray(kept)[:, None])[:, 0]
    now = np.asarray(w).copy()
    for i in range(8):  # the inputs before i are fixed, so the inverse is that of the later block
        if not kept[i]:
            inverse = np.linalg.inv(np.asarray(hessian)[i:, i:])
            now[i:] -= now[i] / inverse[0, 0] * inverse[:, 0]
    np.testing.assert_allclose(found, now, atol=1e-10)
    assert (found[~kept] == 0).all()


def test_sparsegpt_prunes_the_percent_it_is_asked_for():
    w, hessian = problem(0, 12)
    weights = jnp.stack([w, w[::-1], 2 * w], 1)
    found = surgeon.sparsegpt(weights, hessian, 50, block=6)
    assert int((found == 0).sum()) == 18


@pytest.mark.parametrize("seed", SEEDS)
def test_woodbury_and_the_whole_network_against_dense(seed):
    rng = np.random.default_rng(seed)
    diagonal, rows, w = rng.random(20) + 0.1, rng.normal(size=(6, 20)), rng.normal(size=20)
    hessian = np.diag(diagonal) + rows.T @ rows
    np.testing.assert_allclose(
        surgeon.woodbury(diagonal, rows), np.diag(np.linalg.inv(hessian)), atol=1e-10
    )
    kept = rng.random(20) > 0.5
    expected = surgeon.refit(jnp.asarray(w), jnp.asarray(hessian), jnp.asarray(kept))
    np.testing.assert_allclose(surgeon.whole(w, diagonal, rows, kept), expected, atol=1e-9)


# A chain of dense layers ---------------------------------------------------------------------


def chain(seed, n=60, widths=(6, 5, 4, 3)):
    rng = np.random.default_rng(seed)
    network = models.mlp(widths)
    params = jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape)), network.init(jax.random.key(seed))
    )
    return network, params, Examples(rng.random((n, widths[0])), rng.integers(0, widths[-1], n))


def layer_values(network, params, images):
    """Each layer's inputs and pre-activations, by hand."""
    a, found = np.asarray(scaled(images)), {}
    for name, layer in params.items():
        z = a @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        found[name], a = (a, z), np.maximum(z, 0)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_greedy_prices_times_the_units_own_curvature(seed):
    network, params, data = chain(seed)
    scores = surgeon.scores(network, params, data)
    h = curvature.hessian_diagonal(network, params, data, "one_hot")
    for name, (a, _) in layer_values(network, params, data.images).items():
        covariance = np.cov(a.T, bias=True)
        damped = covariance + 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(a.T))
        for j in range(params[name]["bias"].size):
            places, prices = surgeon.greedy(
                params[name]["kernel"][:, j], jnp.linalg.inv(jnp.asarray(damped))
            )
            order = np.argsort(places)
            expected = np.empty(len(order))
            expected[order] = np.maximum.accumulate(np.asarray(prices)[order])
            unit = np.asarray(h[name]["bias"])[j]  # ReLU: Gauss-Newton's and the Hessian's agree
            np.testing.assert_allclose(scores[name]["kernel"][:, j], expected * unit, rtol=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("refit", [False, True])
def test_layerwise_is_a_ridge_regression_on_the_dense_pre_activations(seed, refit):
    network, params, data = chain(seed)
    pruned = surgeon.layerwise(network, params, data, 50, refit=refit)
    dense = layer_values(network, params, data.images)
    own = layer_values(network, pruned.params, data.images)
    for name in params:
        a, z = (own if refit else dense)[name][0], dense[name][1]
        centred = a - a.mean(0)
        covariance = centred.T @ centred / len(a)
        ridge = 0.01 * np.trace(covariance) / len(covariance)
        cross = centred.T @ (z - z.mean(0)) / len(a)
        for j in range(z.shape[1]):
            kept = np.asarray(pruned.kept[name]["kernel"][:, j])
            expected = np.zeros(len(kept))
            if kept.any():
                left = (covariance + ridge * np.eye(len(kept)))[np.ix_(kept, kept)]
                right = cross[kept, j] + ridge * np.asarray(params[name]["kernel"])[kept, j]
                expected[kept] = np.linalg.solve(left, right)
            np.testing.assert_allclose(pruned.params[name]["kernel"][:, j], expected, atol=1e-9)
            bias = z[:, j].mean() - a.mean(0) @ expected
            np.testing.assert_allclose(pruned.params[name]["bias"][j], bias, atol=1e-9)


@pytest.mark.parametrize("scope", ["all", "layer"])
def test_the_mask_has_the_percent_and_biases_stay(scope):
    network, params, data = chain(0)
    pruned = surgeon.layerwise(network, params, data, 50, scope)
    assert all(layer["bias"].all() for layer in pruned.kept.values())
    if scope == "all":
        assert sum(int((~layer["kernel"]).sum()) for layer in pruned.kept.values()) == 31
    else:
        assert all((~layer["kernel"]).mean() == 0.5 for layer in pruned.kept.values())
    zeros = jax.tree.map(lambda w, k: bool((w[~k] == 0).all()), pruned.params, pruned.kept)
    assert all(jax.tree.leaves(zeros))
    accuracy, _ = pruning.evaluate(network, pruned.params, data)
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_inputs_that_are_constants_leave_the_outputs_as_they_are(bias):
    """Nothing can be fitted to a dead layer's outputs, and nothing divides by their variance."""
    network, params, data = chain(2)
    params["dense1"] = jax.tree.map(lambda w: bias + 0 * w, params["dense1"])
    params["dense1"]["kernel"] *= 0
    pruned = surgeon.layerwise(network, params, data, 60)
    before, after = (network.apply(w, data.images) for w in (params, pruned.params))
    np.testing.assert_allclose(after, before, atol=1e-9)
    assert (pruned.params["dense2"]["kernel"][~pruned.kept["dense2"]["kernel"]] == 0).all()


def test_wanda_is_size_times_the_inputs_norm():
    network, params, data = chain(1)
    found = surgeon.wanda(network, params, data)
    for name, (a, _) in layer_values(network, params, data.images).items():
        norm = np.sqrt((a**2).mean(0))[:, None]
        expected = np.abs(params[name]["kernel"]) * norm
        np.testing.assert_allclose(found[name]["kernel"], expected, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_that_are_gone_already_are_as_if_their_inputs_were_not_there(seed):
    """Also where so few are left that only they are looked at."""
    network, params, data = chain(seed, 150, (80, 4, 3))
    rng = np.random.default_rng(seed)
    alive = jnp.asarray(rng.random((80, 4)) < 0.2)
    params["dense1"]["kernel"] = jnp.where(alive, params["dense1"]["kernel"], 0)
    scores = surgeon.scores(network, params, data)["dense1"]["kernel"]
    unit = curvature.hessian_diagonal(network, params, data)["dense1"]["bias"]
    covariance = np.cov(np.asarray(scaled(data.images)).T, bias=True)
    damped = covariance + 0.01 * np.trace(covariance) / 80 * np.eye(80)
    for j in range(4):
        here = np.flatnonzero(alive[:, j])
        inverse = jnp.linalg.inv(jnp.asarray(damped[np.ix_(here, here)]))
        places, prices = surgeon.greedy(params["dense1"]["kernel"][here, j], inverse)
        expected = np.zeros(80)
        order = here[np.argsort(places)]
        expected[order] = np.maximum.accumulate(np.asarray(prices)[np.argsort(places)])
        np.testing.assert_allclose(scores[:, j], expected * float(unit[j]), rtol=1e-7, atol=1e-15)


# Convolutions are dense layers on patches -----------------------------------------------------


def small_convolutions(seed, padding="VALID", strides=1):
    rng = np.random.default_rng(seed)
    conv = [
        ("conv1", lambda rngs: nnx.Conv(1, 3, (3, 3), padding=padding, strides=strides, rngs=rngs)),
        ("conv2", lambda rngs: nnx.Conv(3, 2, (2, 3), padding="VALID", rngs=rngs)),
    ]
    places = {("VALID", 1): 4 * 3, ("SAME", 2): 3 * 2}[padding, strides]
    dense = ("dense1", lambda rngs: nnx.Linear(places * 2, 3, rngs=rngs))
    size = {"VALID": 7, "SAME": 8}[padding]

    def picture(x):
        return x.reshape(len(x), size, size, 1)

    network = models.Network([picture, conv[0], jax.nn.relu, conv[1], models.flatten, dense])
    params = jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape)), network.init(jax.random.key(seed))
    )
    return network, params, Examples(rng.random((30, size**2)), rng.integers(0, 3, 30))


def rows_of_patches(a, height, width, stride=1, pad=(0, 0)):
    """Every patch of ``a [n, h, w, c]`` as a row, in the order of a kernel's entries, by loops."""
    a = np.pad(np.asarray(a), ((0, 0), pad, pad, (0, 0)))
    n, h, w, _ = a.shape
    places = itertools.product(range(0, h - height + 1, stride), range(0, w - width + 1, stride))
    patches = [a[:, i : i + height, j : j + width].reshape(n, -1) for i, j in places]
    return np.stack(patches, 1)


@pytest.mark.parametrize(("padding", "strides", "pad"), [("VALID", 1, (0, 0)), ("SAME", 2, (0, 1))])
def test_a_convolution_is_scored_and_fitted_as_a_dense_layer_on_its_patches(padding, strides, pad):
    network, params, data = small_convolutions(1, padding, strides)
    h = curvature.hessian_diagonal(network, params, data, "one_hot")
    scores = surgeon.scores(network, params, data)
    pruned = surgeon.layerwise(network, params, data, 40, refit=False, ranked=scores)
    size = int(data.images.shape[1] ** 0.5)
    first = rows_of_patches(data.images.reshape(30, size, size, 1), 3, 3, strides, pad)
    height = int(first.shape[1] ** 0.5)
    z1 = first @ np.asarray(params["conv1"]["kernel"]).reshape(9, 3) + np.asarray(
        params["conv1"]["bias"]
    )
    second = rows_of_patches(np.maximum(z1, 0).reshape(30, height, height, 3), 2, 3)
    for name, rows in {"conv1": first, "conv2": second}.items():
        rows = rows.reshape(-1, rows.shape[-1])
        kernel = np.asarray(params[name]["kernel"]).reshape(rows.shape[1], -1)
        kept = np.asarray(pruned.kept[name]["kernel"]).reshape(kernel.shape)
        covariance = np.cov(rows.T, bias=True)
        damped = covariance + 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(kernel))
        found = np.asarray(scores[name]["kernel"]).reshape(kernel.shape)
        fitted = np.asarray(pruned.params[name]["kernel"]).reshape(kernel.shape)
        for j in range(kernel.shape[1]):
            w = jnp.asarray(kernel[:, j])
            places, prices = surgeon.greedy(w, jnp.linalg.inv(jnp.asarray(damped)))
            order, expected = np.argsort(places), np.empty(len(kernel))
            expected[order] = np.maximum.accumulate(np.asarray(prices)[order])
            unit = float(h[name]["bias"][j])
            np.testing.assert_allclose(found[:, j], expected * unit, rtol=1e-7)
            np.testing.assert_allclose(
                fitted[:, j], surgeon.refit(w, jnp.asarray(damped), jnp.asarray(kept[:, j])),
                atol=1e-9,
            )  # fmt: skip
            bias = params[name]["bias"][j] + rows.mean(0) @ (kernel[:, j] - fitted[:, j])
            np.testing.assert_allclose(pruned.params[name]["bias"][j], bias, atol=1e-9)


def test_bad_input_is_refused_in_words():
    network, params, data = chain(0)
    with pytest.raises(ValueError, match=r"damping: expected a positive number"):
        surgeon.layerwise(network, params, data, 50, damping=0.0)
    with pytest.raises(ValueError, match=r"percent: expected"):
        surgeon.layerwise(network, params, data, 101)
    with pytest.raises(ValueError, match=r"scope: 'unit' is unknown"):
        surgeon.layerwise(network, params, data, 50, "unit")
    with pytest.raises(ValueError, match=r"needs a models.Network of plain nnx.Linear and nnx.Con"):
        surgeon.scores(lambda p, x: network.apply(p, x), params, data)
    no_bias = models.Network([("dense1", lambda rngs: nnx.Linear(6, 3, use_bias=False, rngs=rngs))])
    with pytest.raises(ValueError, match=r"a layer has no bias"):
        surgeon.scores(no_bias, no_bias.init(jax.random.key(0)), data)
