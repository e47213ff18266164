"""The Taylor terms against explicit gradients and Hessians, and against polynomials."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from prunelib import curvature, data, models, pruning, taylor, training
from prunelib.data import Examples
from prunelib.passes import cross_entropy

WIDTHS = [(5, 4, 3), (6, 5, 4, 3)]
LEVELS = (0, 10, 35, 60, 85, 100)


def squared(logits, labels):
    """A loss for a linear network, whose whole Taylor series has three terms."""
    return ((logits - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)) ** 2).sum(1)


def problem(widths, seed, activation=jax.nn.relu, n=13):
    network = models.mlp(widths, activation)
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(k1, w.shape, jnp.float64), network.init(k1)
    )
    images = jax.random.normal(k2, (n, widths[0]), jnp.float64)
    return network, params, Examples(images, jax.random.randint(k3, (n,), 0, widths[-1]))


def stacked(masks):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)


def random_masks(params, seed, levels=LEVELS):
    scores = pruning.random_scores(jax.random.key(seed), params)
    return [pruning.mask(scores, percent) for percent in levels]


@partial(jax.jit, static_argnums=0)
def explicit(network, params, kept, examples):
    """The five terms from jax.grad, jax.hessian and two evaluations of the whole loss."""
    flat, unravel = ravel_pytree(params)
    delta = jnp.where(ravel_pytree(kept)[0], 0, -flat)

    def mean_loss(flat):
        return cross_entropy(network.apply(unravel(flat), examples.images), examples.labels).mean()

    hessian = jax.hessian(mean_loss)(flat)
    first = jax.grad(mean_loss)(flat) @ delta
    own = 0.5 * jnp.diagonal(hessian) @ delta**2
    half = 0.5 * delta @ hessian @ delta
    actual = mean_loss(flat + delta) - mean_loss(flat)
    return taylor.LossChange(first, own, half - own, actual - first - half, actual)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", WIDTHS)
def test_terms_against_grad_and_hessian(x64, widths, seed):
    network, params, examples = problem(widths, seed)
    masks = random_masks(params, seed)
    together = taylor.loss_change(network, params, stacked(masks), examples, batch_size=4)
    assert together.actual.shape == (len(LEVELS),)
    for level, kept in enumerate(masks):
        expected = explicit(network, params, kept, examples)
        alone = taylor.loss_change(network, params, kept, examples)
        for name, value in expected._asdict().items():
            assert isinstance(getattr(alone, name), float)
            assert getattr(alone, name) == pytest.approx(float(value), abs=1e-12)
            assert getattr(together, name)[level] == pytest.approx(float(value), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", WIDTHS)
def test_terms_add_up_to_the_change_of_the_loss(x64, widths, seed):
    network, params, examples = problem(widths, seed)
    kept = random_masks(params, seed)
    found = taylor.loss_change(network, params, stacked(kept), examples)
    before = pruning.evaluate(network, params, examples)[1]
    for level, mask in enumerate(kept):
        after = pruning.evaluate(network, pruning.apply_mask(params, mask), examples)[1]
        total = sum(getattr(found, name)[level] for name in found._fields[:-1])
        assert total == pytest.approx(after - before, abs=1e-12)


def test_terms_add_up_on_the_real_network():
    """Float32: to 1e-6 nats, or 1e-5 of the change where that is more."""
    mnist = data.load_mnist()
    network = models.mlp()
    params = training.train(network, training.PLAIN, mnist.train).select(0)
    examples = Examples(*(array[:5000] for array in mnist.train))
    scores = pruning.magnitude(params)
    levels = [10, 50, 70, 90]
    kept = stacked([pruning.mask(scores, percent) for percent in levels])
    found = taylor.loss_change(network, params, kept, examples)
    loss = pruning.accuracy_curve(network, params, scores, examples, [0, *levels]).loss
    np.testing.assert_allclose(sum(found[:-1]), loss[1:] - loss[0], rtol=1e-5, atol=1e-6)
    assert found.actual[-1] > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_quadratic_loss_has_no_higher_term(x64, seed):
    network, params, examples = problem((5, 4), seed)
    kept = stacked(random_masks(params, seed))
    found = taylor.loss_change(network, params, kept, examples, loss=squared)
    np.testing.assert_allclose(found.higher, 0, atol=1e-12)
    assert np.abs(found.cross[2:]).min() > 1e-3
    deeper = problem((5, 4, 3), seed)
    kept = stacked(random_masks(deeper[1], seed))
    diagonal = curvature.hessian_diagonal(deeper[0], *deeper[1:], "neuron", loss=squared)
    found = taylor.loss_change(*deeper[:2], kept, deeper[2], diagonal, loss=squared)
    assert np.abs(found.higher[-1]) > 1e-3


class Product:
    """A network of one example whose logits are x·a·b and 0, so that its loss may be a cubic."""

    def apply(self, params, images):
        z = images * params["a"] * params["b"]
        return jnp.concatenate([z, jnp.zeros_like(z)], axis=1)


def first_logit(logits, labels):
    return logits[:, 0]


@pytest.mark.parametrize("lost", ["a", "b", "ab", ""])
def test_polynomial(x64, lost):
    """E = (mean x) a² b is cubic: each term by hand, with δ_a = -a and δ_b = -b where pruned."""

    class Cubic(Product):
        def apply(self, params, images):
            return super().apply({"a": params["a"] ** 2, "b": params["b"]}, images)

    a, b, x = 1.5, -0.7, np.array([[0.5], [2.0], [3.5]])
    params = {"a": jnp.array(a), "b": jnp.array(b)}
    examples = Examples(jnp.asarray(x), jnp.zeros(3, int))
    kept = {name: jnp.array(name not in lost) for name in "ab"}
    diagonal = {"a": jnp.array(x.mean() * 2 * b), "b": jnp.array(0.0)}
    da, db = (-a if "a" in lost else 0), (-b if "b" in lost else 0)
    expected = taylor.LossChange(
        first=x.mean() * (2 * a * b * da + a**2 * db),
        diagonal=x.mean() * b * da**2,
        cross=x.mean() * 2 * a * da * db,
        higher=x.mean() * da**2 * db,
        actual=x.mean() * ((a + da) ** 2 * (b + db) - a**2 * b),
    )
    found = taylor.loss_change(Cubic(), params, kept, examples, diagonal, loss=first_logit)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    zeros = jax.tree.map(jnp.zeros_like, params)
    found = taylor.loss_change(Product(), params, kept, examples, zeros, loss=first_logit)
    np.testing.assert_allclose(found.cross, x.mean() * da * db, atol=1e-12)
    np.testing.assert_allclose([found.diagonal, found.higher], 0, atol=1e-12)


def test_batch_size_does_not_matter(x64):
    network, params, examples = problem((5, 4, 3), 0)
    kept = random_masks(params, 0)[3]
    whole = taylor.loss_change(network, params, kept, examples)
    for size in (1, 4, 13, 100):
        parts = taylor.loss_change(network, params, kept, examples, batch_size=size)
        np.testing.assert_allclose(parts, whole, atol=1e-13)


def test_seeds_and_levels(x64):
    network, one, examples = problem((5, 4, 3), 0)
    two = problem((5, 4, 3), 1)[1]
    masks = [stacked(random_masks(p, seed)) for seed, p in enumerate((one, two))]
    found = taylor.loss_changes(network, stacked([one, two]), stacked(masks), examples)
    assert found.actual.shape == (2, len(LEVELS))
    for place, params in enumerate((one, two)):
        alone = taylor.loss_change(network, params, masks[place], examples)
        np.testing.assert_array_equal([term[place] for term in found], alone)


def test_masks_may_have_several_axes(x64):
    network, params, examples = problem((5, 4, 3), 0)
    flat = stacked(random_masks(params, 0))
    square = jax.tree.map(lambda k: k.reshape(2, 3, *k.shape[1:]), flat)
    one = taylor.loss_change(network, params, flat, examples)
    two = taylor.loss_change(network, params, square, examples)
    np.testing.assert_array_equal(np.array(two).reshape(5, 6), one)


@pytest.mark.parametrize("seed", range(3))
def test_layer_terms_are_the_blocks_of_the_hessian(x64, seed):
    network, params, examples = problem((6, 5, 4, 3), seed)
    kept = random_masks(params, seed)[3]
    found = taylor.layer_terms(network, params, kept, examples, batch_size=4)
    flat, unravel = ravel_pytree(params)

    def mean_loss(flat):
        return cross_entropy(network.apply(unravel(flat), examples.images), examples.labels).mean()

    hessian = jax.jit(jax.hessian(mean_loss))(flat)
    delta = unravel(jnp.where(ravel_pytree(kept)[0], 0, -flat))
    zeros = jax.tree.map(jnp.zeros_like, delta)
    parts = jnp.stack([ravel_pytree(zeros | {name: delta[name]})[0] for name in params])
    np.testing.assert_allclose(found, 0.5 * parts @ hessian @ parts.T, atol=1e-13)
    change = taylor.loss_change(network, params, kept, examples)
    assert found.sum() == pytest.approx(change.diagonal + change.cross, abs=1e-13)


# What it refuses


@pytest.fixture
def small(x64):
    network, params, examples = problem((5, 4, 3), 0)
    return network, params, random_masks(params, 0)[3], examples


def test_refuses_trees_that_do_not_match(small):
    network, params, kept, examples = small
    with pytest.raises(ValueError, match="kept"):
        taylor.loss_change(network, params, {"dense1": kept["dense1"]}, examples)
    turned = jax.tree.map(lambda k: k.T, kept)
    with pytest.raises(ValueError, match=r"kept.*expected shape"):
        taylor.loss_change(network, params, turned, examples)
    uneven = stacked([kept, kept]) | {"dense2": kept["dense2"]}
    with pytest.raises(ValueError, match=r"kept.*expected shape"):
        taylor.loss_change(network, params, uneven, examples)
    with pytest.raises(ValueError, match="diagonal"):
        taylor.loss_change(network, params, kept, examples, {"dense1": params["dense1"]})
    with pytest.raises(ValueError, match="single mask"):
        taylor.layer_terms(network, params, stacked([kept, kept]), examples)


def test_refuses_scores_for_masks(small):
    network, params, _, examples = small
    with pytest.raises(TypeError, match=r"pruning\.mask"):
        taylor.loss_change(network, params, pruning.magnitude(params), examples)


def test_refuses_networks_that_are_not_stacked(small):
    network, params, kept, examples = small
    with pytest.raises(ValueError, match="leading axis over networks"):
        taylor.loss_changes(network, params, kept, examples)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_numbers_that_are_not_finite(small, bad):
    network, params, kept, examples = small
    broken = jax.tree.map(lambda w: w.at[(0,) * w.ndim].set(bad), params)
    with pytest.raises(FloatingPointError, match="params"):
        taylor.loss_change(network, broken, kept, examples)
    with pytest.raises(FloatingPointError, match="diagonal"):
        taylor.loss_change(network, params, kept, examples, broken)
    with pytest.raises(FloatingPointError, match="images"):
        taylor.loss_change(network, params, kept, Examples(examples.images * bad, examples.labels))

    def broken_loss(logits, labels):
        return cross_entropy(logits, labels) * bad

    with pytest.raises(FloatingPointError, match="loss change"):
        taylor.loss_change(network, params, kept, examples, params, loss=broken_loss)
    with pytest.raises(FloatingPointError, match="layer terms"):
        taylor.layer_terms(network, params, kept, examples, loss=broken_loss)
