"""Where float32 could go wrong: confident networks, dead units, long sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from prunelib import curvature, data, models, passes, pruning, streaming, training
from prunelib.data import Examples

NETWORK = models.mlp()


@pytest.fixture(scope="module")
def mnist():
    return data.load_mnist()


@pytest.fixture(scope="module")
def params(mnist):
    return training.train(NETWORK, training.PLAIN, mnist.train).select(0)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def to_64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def floats(examples, dtype):
    """The same numbers for both precisions: grey values are multiples of 1/256 here, not 1/255."""
    return Examples((examples.images / 256).astype(dtype), examples.labels)


# Confident networks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sure(mnist, params):
    """Two hundred examples that the network gets right by a margin of 4 or more."""
    some = Examples(mnist.train.images[:1000], mnist.train.labels[:1000])
    logits = np.array(NETWORK.apply(params, some.images / np.float32(256)))
    right = logits[np.arange(1000), some.labels]
    logits[np.arange(1000), some.labels] = -np.inf
    chosen = np.flatnonzero(right - logits.max(1) > 4)[:200]
    assert len(chosen) == 200
    return Examples(some.images[chosen], some.labels[chosen])


def sharpened(params, factor):
    last = jax.tree.map(lambda w: w * factor, params["dense5"])
    return params | {"dense5": last}


@pytest.mark.parametrize("method", ["gauss_newton", "neuron", "lecun1990"])
@pytest.mark.parametrize(("factor", "low", "high"), [(2, 1e-6, 1e-3), (5, 1e-12, 1e-7)])
def test_confident_networks(params, sure, factor, low, high, method):
    """Loss down to 1e-8 and below: probabilities round to 1 and to 0, and the diagonal is right."""
    confident = sharpened(params, factor)
    single = curvature.hessian_diagonal(NETWORK, confident, floats(sure, np.float32), method)
    with jax.enable_x64(True):
        exact, examples = to_64(confident), floats(sure, np.float64)
        assert low < pruning.evaluate(NETWORK, exact, examples)[1] < high
        double = flat(curvature.hessian_diagonal(NETWORK, exact, examples, method))
    # Logits of about 100 are rounded to 1e-5, so probabilities, and the diagonal, to 1e-5 of
    # themselves: of the largest entry, tiny as it is, four digits are right.
    np.testing.assert_allclose(flat(single), double, atol=1e-4 * np.abs(double).max(), rtol=0)
    assert np.abs(double).max() > 0


def test_confident_networks_break_log_of_softmax(params, sure):
    """Else the tests above would show nothing: here the loss of 2016 is NaN."""
    p = jax.nn.softmax(NETWORK.apply(sharpened(params, 20), floats(sure, np.float32).images))
    labels = jax.nn.one_hot(sure.labels, 10)
    assert (p == 0).any()
    assert np.isnan(-(labels * jnp.log(p)).sum())
    logits = NETWORK.apply(sharpened(params, 20), floats(sure, np.float32).images)
    assert np.isfinite(passes.cross_entropy(logits, jnp.asarray(sure.labels))).all()


def test_a_ranking_of_nothing_is_refused(params, sure):
    """So confident that even the curvature underflows: there is nothing left to rank."""
    examples = floats(sure, np.float32)
    diagonal = curvature.hessian_diagonal(NETWORK, sharpened(params, 1000), examples)
    assert not flat(diagonal).any()
    with pytest.raises(FloatingPointError, match="every entry is exactly zero"):
        pruning.obd_saliency(params, diagonal)


# Dead units --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gauss_newton", "neuron", "lecun1990"])
def test_dead_layer(params, sure, method):
    """All units of the third layer off: nothing below matters, exactly; the biases above do."""
    dead = params | {"dense3": params["dense3"] | {"bias": jnp.full(50, -1e3)}}
    diagonal = curvature.hessian_diagonal(NETWORK, dead, floats(sure, np.float32), method)
    for name in ("dense1", "dense2", "dense3"):
        assert not flat(diagonal[name]).any()
    assert not np.any(diagonal["dense4"]["kernel"]), "its inputs are all zero"
    assert np.any(diagonal["dense4"]["bias"])
    assert np.any(diagonal["dense5"]["bias"])
    # Tens of thousands of ties: pruned in the order of the tree, each time anew.
    saliency = pruning.obd_saliency(dead, diagonal)
    one, two = (pruning.mask(saliency, 50) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    ranks = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(pruning.ranks(saliency))])
    ties = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(saliency)]) == 0
    assert ties.sum() > 40_000
    assert (np.diff(ranks[ties]) > 0).all()
    # and pruning half of them changes nothing
    before, after = (
        pruning.evaluate(NETWORK, p, sure) for p in (dead, pruning.apply_mask(dead, one))
    )
    assert before == pytest.approx(after, abs=1e-7)


# Long sums ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clear(mnist, params):
    """Images on which no unit is within rounding of its kink: all but some hundred of 60,000.

    On the kink a ReLU has two slopes. Other precisions or other sums may take different ones, and
    both are right; one such image moves the diagonal of 60,000 by a few 1e-6 of its largest entry.
    """

    @jax.jit
    def nearest(images):
        outputs = curvature._walk(NETWORK, params, images)[1]
        return jnp.min(jnp.stack([jnp.abs(z).min(1) for z in outputs.values()]), axis=0)

    images = floats(mnist.train, np.float32).images
    found = np.concatenate([nearest(part) for part in np.split(images, 10)]) > 1e-4
    assert 0.98 < found.mean() < 1
    return found


def test_float32_against_float64_over_all_examples(mnist, params, clear):
    """Stated error of the fast path, of the largest entry: 1e-6 (measured: about 1e-7) where no
    unit is on its kink, and 2e-5 (measured: up to 5e-6) over all."""
    single, double = {}, {}
    for where in (True, False):
        part = jax.tree.map(lambda x, w=where: x[clear == w], mnist.train)
        own = floats(part, np.float32)
        diagonal = curvature.hessian_diagonal(NETWORK, params, own)
        single[where] = flat(diagonal), *pruning.evaluate(NETWORK, params, own)
        with jax.enable_x64(True):
            exact = to_64(params)

            def measure(chunk, exact=exact):
                chunk = floats(chunk, np.float64)
                diagonal = curvature.hessian_diagonal(NETWORK, exact, chunk)
                return diagonal, *pruning.evaluate(NETWORK, exact, chunk)

            diagonal, *rest = streaming.mean(measure, streaming.chunks(part, 10_000))
            double[where] = flat(diagonal), *map(float, rest)
    assert double[True][0].dtype == np.float64
    largest = double[True][0].max()
    assert np.abs(single[True][0] - double[True][0]).max() < 1e-6 * largest
    assert ((single[True][0] == 0) == (double[True][0] == 0)).all(), "the exact zeros are exact"
    # Entry by entry, relative: for all that are not zero.
    large = double[True][0] > 1e-6 * largest
    assert np.abs(single[True][0][large] / double[True][0][large] - 1).max() < 1e-3

    share = clear.mean()
    of_all = [
        [share * a + (1 - share) * b for a, b in zip(found[True], found[False], strict=True)]
        for found in (single, double)
    ]
    (one, accuracy, loss), (two, accuracy_64, loss_64) = of_all
    assert np.abs(one - two).max() < 2e-5 * largest
    assert loss == pytest.approx(loss_64, abs=1e-6)  # rounding: 6e-8 an example
    assert accuracy == pytest.approx(accuracy_64, abs=2 / 60_000)  # a tie at most
    # What is pruned hardly differs: of 33,187 entries, those at the border.
    weights = flat(params)
    saliency = [0.5 * h * weights**2 for h in (one, two)]
    masks = [flat(pruning.mask({"all": jnp.asarray(s, jnp.float32)}, 70)) for s in saliency]
    assert (masks[0] != masks[1]).sum() <= 10


def test_summation_order(mnist, params, clear):
    """Any order of the examples, any batch size: the same, to 1e-6 of the largest entry."""
    some = jax.tree.map(lambda x: x[clear][:10_000], mnist.train)
    expected = flat(curvature.hessian_diagonal(NETWORK, params, some))
    _, loss = pruning.evaluate(NETWORK, params, some)
    order = np.random.default_rng(0).permutation(10_000)
    shuffled = Examples(some.images[order], some.labels[order])
    for batch_size in (200, 999, 10_000):
        found = flat(curvature.hessian_diagonal(NETWORK, params, shuffled, batch_size=batch_size))
        assert np.abs(found - expected).max() < 1e-6 * expected.max()
        again = pruning.evaluate(NETWORK, params, shuffled, batch_size)[1]
        assert again == pytest.approx(loss, abs=1e-7)


def test_many_small_batches_lose_nothing(mnist, params):
    """Ten thousand additions of a batch of one, in float32: still right to 1e-6 nats."""
    some = Examples(mnist.train.images[:10_000], mnist.train.labels[:10_000])
    _, together = pruning.evaluate(NETWORK, params, some)
    _, one_by_one = pruning.evaluate(NETWORK, params, some, batch_size=1)
    assert one_by_one == pytest.approx(together, abs=1e-6)
