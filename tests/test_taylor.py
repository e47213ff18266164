"""The Taylor terms against explicit gradients and Hessians, and against polynomials."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bent, dense, flat, hessian, mean_loss, squared

from prunelib import curvature, data, experiments, models, pruning, taylor
from prunelib.data import Examples
from prunelib.passes import cross_entropy

LEVELS = (0, 10, 35, 60, 85, 100)


def stacked(masks):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)


def random_masks(params, seed=0):
    scores = pruning.random_scores(jax.random.key(seed), params)
    return [pruning.mask(scores, percent) for percent in LEVELS]


def explicit(problem, masks, loss=cross_entropy):
    """The five terms of each mask from jax.grad, jax.hessian and the whole loss."""
    function, vector, _ = mean_loss(*problem, loss)
    whole, slope = hessian(*problem, loss), np.asarray(jax.grad(function)(vector))
    for kept in masks:
        delta = np.where(flat(kept), 0, -np.asarray(vector))
        first, own = slope @ delta, 0.5 * np.diagonal(whole) @ delta**2
        half, actual = 0.5 * delta @ whole @ delta, function(vector + delta) - function(vector)
        yield taylor.LossChange(first, own, half - own, actual - first - half, actual)


@pytest.mark.parametrize("loss", [cross_entropy, bent])
@pytest.mark.parametrize("widths", [(5, 4, 3), (6, 5, 4, 3)])
def test_terms_against_grad_and_hessian(x64, widths, loss):
    """Of one mask and of many, in any batches; and they add up to the change of the loss."""
    for seed in range(3):
        network, params, examples = dense(widths, seed=seed)
        masks = random_masks(params, seed)
        change = partial(taylor.loss_change, network, params, examples=examples, loss=loss)
        together = change(stacked(masks), batch_size=4)
        assert together.actual.shape == (len(LEVELS),)
        for level, expected in enumerate(explicit((network, params, examples), masks, loss)):
            np.testing.assert_allclose([t[level] for t in together], expected, atol=1e-12)
        alone = change(masks[3], batch_size=1)
        assert all(isinstance(term, float) for term in alone)
        np.testing.assert_allclose(alone, [t[3] for t in together], atol=1e-13)
        np.testing.assert_allclose(sum(together[:-1]), together.actual, atol=1e-12)


def test_terms_add_up_on_the_real_network():
    """Float32: to 1e-6 nats, or 1e-5 of the change where that is more."""
    network, examples = models.mlp(), data.load_mnist().train.first(5000)
    params = experiments.trained("plain").select(0)
    scores, levels = pruning.magnitude(params), [10, 50, 70, 90]
    kept = stacked([pruning.mask(scores, percent) for percent in levels])
    found = taylor.loss_change(network, params, kept, examples)
    loss = pruning.accuracy_curve(network, params, scores, examples, [0, *levels]).loss.to_numpy()
    np.testing.assert_allclose(sum(found[:-1]), loss[1:] - loss[0], rtol=1e-5, atol=1e-6)
    assert found.actual[-1] > 0.5


def test_quadratic_loss_has_no_higher_term(x64):
    network, params, examples = dense((5, 4))
    found = taylor.loss_change(
        network, params, stacked(random_masks(params)), examples, loss=squared
    )
    np.testing.assert_allclose(found.higher, 0, atol=1e-12)
    assert np.abs(found.cross[2:]).min() > 1e-3
    network, params, examples = dense((5, 4, 3))
    found = taylor.loss_change(network, params, random_masks(params)[-1], examples, loss=squared)
    assert np.abs(found.higher) > 1e-3


def first_logit(logits, labels):
    return logits[:, 0]


@pytest.mark.parametrize("lost", ["a", "b", "ab", ""])
def test_polynomial(x64, lost):
    """E = (mean x) a² b is cubic: each term by hand, with δ_a = -a and δ_b = -b where pruned."""

    def cubic(params, images):
        z = images * params["a"] ** 2 * params["b"]
        return jnp.concatenate([z, jnp.zeros_like(z)], axis=1)

    a, b, x = 1.5, -0.7, np.array([[0.5], [2.0], [3.5]])
    params = {"a": jnp.array(a), "b": jnp.array(b)}
    examples = Examples(jnp.asarray(x), jnp.zeros(3, int))
    kept = {name: jnp.array(name not in lost) for name in "ab"}
    da, db = (-a if "a" in lost else 0), (-b if "b" in lost else 0)
    expected = taylor.LossChange(
        first=x.mean() * (2 * a * b * da + a**2 * db),
        diagonal=x.mean() * b * da**2,
        cross=x.mean() * 2 * a * da * db,
        higher=x.mean() * da**2 * db,
        actual=x.mean() * ((a + da) ** 2 * (b + db) - a**2 * b),
    )
    found = taylor.loss_change(cubic, params, kept, examples, loss=first_logit)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_masks_may_have_several_axes(x64):
    network, params, examples = dense()
    one = stacked(random_masks(params))
    square = jax.tree.map(lambda k: k.reshape(2, 3, *k.shape[1:]), one)
    diagonal = curvature.hessian_diagonal(network, params, examples)
    found = [taylor.loss_change(network, params, k, examples, diagonal) for k in (one, square)]
    np.testing.assert_array_equal(np.array(found[1]).reshape(5, 6), found[0])
