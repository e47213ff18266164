"""Where float32 could go wrong: confident networks, dead units, long sums, half precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import flat, squared

from prunelib import curvature, data, experiments, models, passes, pruning, streaming
from prunelib.data import Examples

NETWORK = models.mlp()


@pytest.fixture(scope="module")
def train():
    return data.load_mnist().train


@pytest.fixture(scope="module")
def params():
    return experiments.trained("plain").select(0)


def to_64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def floats(examples, dtype):
    """The same numbers for both precisions: grey values are multiples of 1/256 here, not 1/255."""
    return Examples((examples.images / 256).astype(dtype), examples.labels)


# Confident networks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sure(train, params):
    """Two hundred examples that the network gets right by a margin of 4 or more."""
    some = train.first(1000)
    logits = np.array(NETWORK.apply(params, some.images / np.float32(256)))
    right = logits[np.arange(1000), some.labels]
    logits[np.arange(1000), some.labels] = -np.inf
    chosen = np.flatnonzero(right - logits.max(1) > 4)[:200]
    assert len(chosen) == 200
    return Examples(some.images[chosen], some.labels[chosen])


def sharpened(params, factor):
    return params | {"dense5": jax.tree.map(lambda w: w * factor, params["dense5"])}


@pytest.mark.parametrize(("factor", "low", "high"), [(2, 1e-6, 1e-3), (5, 1e-12, 1e-7)])
def test_confident_networks(params, sure, factor, low, high):
    """Loss down to 1e-8 and below: probabilities round to 1 and to 0, and the diagonal is right."""
    confident = sharpened(params, factor)
    single = curvature.hessian_diagonal(NETWORK, confident, floats(sure, np.float32))
    with jax.enable_x64(True):
        exact, examples = to_64(confident), floats(sure, np.float64)
        assert low < pruning.evaluate(NETWORK, exact, examples).loss < high
        double = flat(curvature.hessian_diagonal(NETWORK, exact, examples))
    # Logits of about 100 are rounded to 1e-5, so probabilities, and the diagonal, to 1e-5 of
    # themselves: of the largest entry, tiny as it is, four digits are right.
    assert np.abs(double).max() > 0
    np.testing.assert_allclose(flat(single), double, atol=1e-4 * np.abs(double).max(), rtol=0)


def test_confident_networks_break_log_of_softmax(params, sure):
    """Else the tests above would show nothing: here the loss of 2016 is NaN."""
    logits = NETWORK.apply(sharpened(params, 20), floats(sure, np.float32).images)
    p, labels = jax.nn.softmax(logits), jax.nn.one_hot(sure.labels, 10)
    assert (p == 0).any()
    assert np.isnan(-(labels * jnp.log(p)).sum())
    assert np.isfinite(passes.cross_entropy(logits, jnp.asarray(sure.labels))).all()


def test_a_ranking_of_nothing_is_refused(params, sure):
    """So confident that even the curvature underflows: there is nothing left to rank."""
    examples = floats(sure, np.float32)
    diagonal = curvature.hessian_diagonal(NETWORK, sharpened(params, 1000), examples)
    assert not flat(diagonal).any()
    with pytest.raises(FloatingPointError, match="every entry is exactly zero"):
        pruning.obd_saliency(params, diagonal)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.gelu])
def test_exact_in_float32(activation, train):
    """Of a smooth network as large as the study's, to 1e-6 of the largest entry."""
    network, some = models.mlp(activation=activation), train.first(300)
    params = network.init(jax.random.key(0))
    single = flat(curvature.hessian_diagonal(network, params, floats(some, np.float32), "exact"))
    with jax.enable_x64(True):
        double = curvature.hessian_diagonal(network, to_64(params), floats(some, np.float64))
        assert np.abs(single - flat(double)).max() < 1e-6 * np.abs(flat(double)).max()


# Dead units --------------------------------------------------------------------------------------


def test_dead_layer(params, sure):
    """All units of the third layer off: nothing below matters, exactly; the biases above do."""
    dead = params | {"dense3": params["dense3"] | {"bias": jnp.full(50, -1e3)}}
    diagonal = curvature.hessian_diagonal(NETWORK, dead, floats(sure, np.float32))
    for name in ("dense1", "dense2", "dense3"):
        assert not flat(diagonal[name]).any()
    assert not np.any(diagonal["dense4"]["kernel"]), "its inputs are all zero"
    assert np.any(diagonal["dense4"]["bias"])
    assert np.any(diagonal["dense5"]["bias"])
    # Tens of thousands of ties: pruned in the order of the tree; half of them change nothing.
    saliency = pruning.obd_saliency(dead, diagonal)
    ranks, ties = flat(pruning.ranks(saliency)), flat(saliency) == 0
    assert ties.sum() > 40_000
    assert (np.diff(ranks[ties]) > 0).all()
    half = pruning.apply_mask(dead, pruning.mask(saliency, 50))
    before, after = (pruning.evaluate(NETWORK, p, sure) for p in (dead, half))
    assert before == pytest.approx(after, abs=1e-7)


# Long sums ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clear(train, params):
    """Images on which no unit is within rounding of its kink: all but some hundred of 60,000.

    On the kink a ReLU has two slopes. Other precisions or other sums may take different ones, and
    both are right; one such image moves the diagonal of 60,000 by a few 1e-6 of its largest entry.
    """

    @jax.jit
    def nearest(x):
        found = []
        for layer in NETWORK.layers:
            x = layer(params, x)
            found += [jnp.abs(x).min(1)] if layer.name else []
        return jnp.min(jnp.stack(found), axis=0)

    images = floats(train, np.float32).images
    found = np.concatenate([nearest(part) for part in np.split(images, 10)]) > 1e-4
    assert 0.98 < found.mean() < 1
    return found


def test_float32_against_float64_over_all_examples(train, params, clear):
    """Stated error of the fast path, of the largest entry: 1e-6 (measured: about 1e-7) where no
    unit is on its kink, and 2e-5 (measured: up to 5e-6) over all."""
    single, double = {}, {}
    for where in (True, False):
        part = Examples(*(x[clear == where] for x in train[:2]))
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
    one, two = single[True][0], double[True][0]
    assert two.dtype == np.float64
    largest = two.max()
    assert np.abs(one - two).max() < 1e-6 * largest
    assert ((one == 0) == (two == 0)).all(), "the exact zeros are exact"
    # Entry by entry, relative: for all that are not zero.
    large = two > 1e-6 * largest
    assert np.abs(one[large] / two[large] - 1).max() < 1e-3

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
    saliency = [0.5 * h * flat(params) ** 2 for h in (one, two)]
    masks = [flat(pruning.mask({"all": jnp.asarray(s, jnp.float32)}, 70)) for s in saliency]
    assert (masks[0] != masks[1]).sum() <= 10


def test_any_order_and_any_batches_are_the_same_sum(train, params, clear):
    """To 1e-6 of the largest entry, and 1e-6 nats; also ten thousand additions one by one."""
    some = Examples(*(x[clear][:10_000] for x in train[:2]))
    expected = flat(curvature.hessian_diagonal(NETWORK, params, some))
    loss = pruning.evaluate(NETWORK, params, some).loss
    order = np.random.default_rng(0).permutation(10_000)
    shuffled = Examples(some.images[order], some.labels[order])
    for batch_size in (999, 10_000):
        found = flat(curvature.hessian_diagonal(NETWORK, params, shuffled, batch_size=batch_size))
        assert np.abs(found - expected).max() < 1e-6 * expected.max()
    for batch_size in (1, 999, 10_000):
        again = pruning.evaluate(NETWORK, params, shuffled, batch_size).loss
        assert again == pytest.approx(loss, abs=1e-6 if batch_size == 1 else 1e-7)


# Half precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_images_count_alike(dtype):
    """Weights of 1/70,000 would vanish in half precision, and a sum of losses would stop."""
    network = models.mlp((6, 5, 3))
    params, numbers = network.init(jax.random.key(0)), np.random.default_rng(0)
    images = np.tile(numbers.random((10, 6)).astype(dtype), (7000, 1))
    labels = np.tile(np.arange(10) % 3, 7000)
    half, single = (Examples(jnp.asarray(images, d), labels) for d in (dtype, jnp.float32))
    losses = [pruning.evaluate(network, params, e).loss for e in (half, data.filled(half, 70_001))]
    assert losses == pytest.approx([pruning.evaluate(network, params, single).loss] * 2, rel=2e-2)


ANY = [*curvature.METHODS, "one_hot of another loss", "gauss_newton of another loss"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["params", "layers", "logits"])
@pytest.mark.parametrize("method", ANY)
def test_half_precision_is_near_float32(kind, dtype, method):
    """Of the params, of the layers (Flax's mixed precision), or of the logits: all methods."""

    def build(dtype):
        first, last = (partial(nnx.Linear, *shape, dtype=dtype) for shape in ((4, 5), (5, 3)))
        return models.Network([("dense1", first), jax.nn.relu, ("dense2", last)])

    def half_logits(params, images):
        return network.apply(params, images).astype(dtype)

    network = build(None)
    half = {"params": network, "layers": build(dtype), "logits": half_logits}[kind]
    exact = params = network.init(jax.random.key(0))
    params = jax.tree.map(lambda w: w.astype(dtype), params) if kind == "params" else params
    numbers = np.random.default_rng(0)
    examples = Examples(numbers.random((8, 4), np.float32), numbers.integers(0, 3, 8))
    options = {"method": method.split()[0]} | ({"loss": squared} if " of " in method else {})
    found = curvature.hessian_diagonal(half, params, examples, **options)
    expected = flat(curvature.hessian_diagonal(network, exact, examples, **options))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    near = 0.5 if method == "sampled" else 0.05  # where a draw may fall on another class
    assert np.abs(flat(found) - expected).max() < near * np.abs(expected).max()
    one, two = (pruning.evaluate(n, p, examples) for n, p in ((half, params), (network, exact)))
    assert one.loss == pytest.approx(two.loss, rel=0.02)
