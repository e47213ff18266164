"""Masks by hand, exact counts, and curves against a plain loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import compilations, flat

from prunelib import data, models, pruning
from prunelib.data import Examples

NETWORK = models.mlp((6, 5, 3))
PARAMS = NETWORK.init(jax.random.key(0))
GENERATOR = np.random.default_rng(0)
EXAMPLES = Examples(GENERATOR.random((23, 6), np.float32), GENERATOR.integers(0, 3, 23))


def test_mask_by_hand():
    scores = {"a": jnp.array([[4.0, 1.0], [3.0, 9.0]]), "b": jnp.array([2.0, -5.0])}

    def lists(tree):
        return jax.tree.map(lambda leaf: leaf.tolist(), tree)

    assert lists(pruning.ranks(scores)) == {"a": [[4, 1], [3, 5]], "b": [2, 0]}
    assert lists(pruning.ranks(scores, "layer")) == {"a": [[2, 0], [1, 3]], "b": [1, 0]}
    a, b = [[True, False], [False, True]], [True, False]
    expected = {"a": [[True, False], [True, True]], "b": [False, False]}
    assert lists(pruning.mask(scores, 50)) == expected
    assert lists(pruning.mask(scores, 50, scope="layer")) == {"a": a, "b": b}
    only_a = pruning.mask(scores, 50, prunable={"a": True, "b": False})
    assert lists(only_a) == {"a": a, "b": [True, True]}


def test_counts_as_in_2016():
    """floor(percent · n / 100) for the whole network and for each array: exact, no 28.999...."""
    scores = jax.tree.map(lambda s: jnp.zeros(s.shape), models.mlp().shapes)
    sizes = [leaf.size for leaf in jax.tree.leaves(scores)]
    for percent in range(101):
        for scope, n in (("all", [sum(sizes)]), ("layer", sizes)):
            kept = jax.tree.leaves(pruning.mask(scores, percent, scope))
            gone = [int((~leaf).sum()) for leaf in kept]
            gone = gone if scope == "layer" else [sum(gone)]
            assert gone == [percent * size // 100 for size in n]
    kept = pruning.mask(scores, 29, prunable=pruning.weights_only(scores))
    assert sum(int((~leaf).sum()) for leaf in jax.tree.leaves(kept)) == 29 * 47_200 // 100
    for tenth in (0.1, np.float32(0.1), jnp.float32(0.1)):
        assert int((~pruning.mask({"w": jnp.zeros(3000)}, tenth)["w"]).sum()) == 3


def test_scores():
    diagonal = jax.tree.map(lambda w: w + 2, PARAMS)
    w = flat(PARAMS)
    np.testing.assert_allclose(
        flat(pruning.obd_saliency(PARAMS, diagonal)), 0.5 * (w + 2) * w**2, rtol=1e-6
    )
    np.testing.assert_array_equal(flat(pruning.magnitude(PARAMS)), np.abs(w))
    half = {"w": jnp.array([1e-4, 2e-4], jnp.float16)}  # squared, they would be 0 in float16
    found = pruning.obd_saliency(half, {"w": jnp.ones(2, jnp.float16)})["w"]
    np.testing.assert_allclose(found, [5e-9, 2e-8], rtol=1e-3)
    one, again, other = (flat(pruning.random_scores(jax.random.key(k), PARAMS)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert len(np.unique([one, other])) == 2 * w.size, "no two alike"


def test_biases_are_found_by_their_names():
    assert pruning.weights_only(PARAMS)["dense1"] == {"kernel": True, "bias": False}
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert nnx.to_pure_dict(pruning.weights_only(state)) == {"kernel": True, "bias": False}
    curve = pruning.accuracy_curve(
        NETWORK, PARAMS, pruning.magnitude(PARAMS), EXAMPLES, [100],
        prunable=pruning.weights_only(PARAMS),
    )  # fmt: skip
    only_biases = jax.tree.map_with_path(lambda path, w: w * (path[-1].key == "bias"), PARAMS)
    expected = pruning.evaluate(NETWORK, only_biases, EXAMPLES)
    assert (curve.accuracy[0], curve.loss[0]) == expected


# Accuracy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", pruning.SCOPES)
@pytest.mark.parametrize("batch_size", [1, 7, 1000, None])
def test_curve_against_a_plain_loop(scope, batch_size):
    """Whatever the batch size: the padding of the last batch counts for nothing."""
    scores = pruning.magnitude(PARAMS)
    percents = [0, 33.3, 80, 100]
    curve = pruning.accuracy_curve(
        NETWORK, PARAMS, scores, EXAMPLES, iter(percents), scope, batch_size=batch_size
    )
    assert list(curve.columns) == ["percent", "remaining", "accuracy", "loss"]
    assert curve.percent.tolist() == percents
    np.testing.assert_allclose(curve.remaining, [100, 66.7, 20, 0])
    for row in curve.itertuples():
        pruned = pruning.apply_mask(PARAMS, pruning.mask(scores, row.percent, scope))
        logits = np.asarray(NETWORK.apply(pruned, EXAMPLES.images), np.float64)
        assert row.accuracy == (logits.argmax(1) == EXAMPLES.labels).mean()
        log_sum = np.log(np.exp(logits).sum(1))
        expected = (log_sum - logits[np.arange(23), EXAMPLES.labels]).mean()
        assert row.loss == pytest.approx(expected, rel=1e-6)
        found = pruning.evaluate(NETWORK, pruned, EXAMPLES, batch_size)
        assert found == pytest.approx((row.accuracy, row.loss), rel=1e-6)
        assert all(isinstance(number, float) for number in found)


def test_padding_is_no_blank_image():
    """For which a network that normalises its images gives NaN, and NaN times 0 is NaN."""
    layers = [("dense1", partial(nnx.Linear, 6, 3))]
    network = models.Network([lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True), *layers])
    params = network.init(jax.random.key(0))
    losses = [pruning.evaluate(network, params, EXAMPLES, size).loss for size in (23, 4)]
    losses.append(pruning.evaluate(network, params, data.filled(EXAMPLES, 30)).loss)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_nothing_compiles_twice():
    """Levels, criteria, scopes, and weights are data, not programs."""
    curve = partial(pruning.accuracy_curve, examples=EXAMPLES, batch_size=5)
    for seed in range(3):
        params = NETWORK.init(jax.random.key(seed))
        kinds = [pruning.magnitude(params), pruning.obd_saliency(params, pruning.magnitude(params))]
        with compilations() as made:
            for scores in kinds:
                for scope in pruning.SCOPES:
                    curve(models.mlp((6, 5, 3)), params, scores, percents=[0, 12.5], scope=scope)
        assert seed == 0 or not made


def test_images_may_be_bytes():
    images = GENERATOR.integers(0, 256, (23, 6)).astype(np.uint8)
    one, two = (
        pruning.evaluate(NETWORK, PARAMS, Examples(x, EXAMPLES.labels))
        for x in (images, images / np.float32(255))
    )
    assert one == pytest.approx(two, rel=1e-6)
