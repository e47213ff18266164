"""Masks by hand, exact counts, and curves against a plain loop."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prunelib import data, models, pruning
from prunelib.data import Examples

NETWORK = models.mlp((6, 5, 3))
PARAMS = NETWORK.init(jax.random.key(0))
GENERATOR = np.random.default_rng(0)
EXAMPLES = Examples(GENERATOR.random((23, 6), np.float32), GENERATOR.integers(0, 3, 23))
SIZE = 53


def pruned_count(mask):
    return sum(int((~leaf).sum()) for leaf in jax.tree.leaves(mask))


def test_mask_by_hand():
    scores = {"a": jnp.array([[4.0, 1.0], [3.0, 9.0]]), "b": jnp.array([2.0, -5.0])}
    kept = pruning.mask(scores, 50)
    assert jax.tree.map(lambda k: k.tolist(), kept) == {
        "a": [[True, False], [True, True]],
        "b": [False, False],
    }
    kept = pruning.mask(scores, 50, scope="layer")
    assert jax.tree.map(lambda k: k.tolist(), kept) == {
        "a": [[True, False], [False, True]],
        "b": [True, False],
    }
    ranks = pruning.ranks(scores)
    assert jax.tree.map(lambda r: r.tolist(), ranks) == {"a": [[4, 1], [3, 5]], "b": [2, 0]}
    kept = pruning.mask(scores, 50, prunable={"a": True, "b": False})
    assert jax.tree.map(lambda k: k.tolist(), kept) == {
        "a": [[True, False], [False, True]],
        "b": [True, True],
    }


def test_counts_as_in_2016():
    """floor(percent · n / 100) for the whole network and for each array: exact, no 28.999...."""
    shapes = jax.eval_shape(models.mlp().init, jax.random.key(0))
    scores = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    for percent in range(101):
        counts = pruning.counts(scores, percent)
        assert set(jax.tree.leaves(counts)) == {percent * 47_410 // 100}
        counts = pruning.counts(scores, percent, "layer")
        for count, leaf in zip(*map(jax.tree.leaves, (counts, scores)), strict=True):
            assert count == percent * leaf.size // 100
    weights = pruning.counts(scores, 29, prunable=pruning.weights_only(scores))
    assert weights["dense1"] == {"kernel": 29 * 47_200 // 100, "bias": 0}
    for written in (0.1, np.float32(0.1), "0.1 as an array"):
        percent = jnp.float32(0.1) if isinstance(written, str) else written
        assert pruning.counts({"w": jnp.zeros(3000)}, percent)["w"] == 3


def test_both_ends():
    kept = pruning.mask(pruning.magnitude(PARAMS), 0)
    assert pruned_count(kept) == 0
    jax.tree.map(np.testing.assert_array_equal, pruning.apply_mask(PARAMS, kept), PARAMS)
    everything = pruning.apply_mask(PARAMS, pruning.mask(pruning.magnitude(PARAMS), 100))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(everything))


def test_saliency_and_magnitude():
    diagonal = jax.tree.map(lambda w: w + 2, PARAMS)
    saliency = pruning.obd_saliency(PARAMS, diagonal)
    for s, w in zip(*map(jax.tree.leaves, (saliency, PARAMS)), strict=True):
        np.testing.assert_allclose(s, 0.5 * (w + 2) * w**2, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, pruning.magnitude(PARAMS),
                 jax.tree.map(np.abs, PARAMS))  # fmt: skip


def test_saliency_of_half_precision():
    half = {"w": jnp.array([1e-4, 2e-4], jnp.float16)}  # squared, they would be 0 in float16
    found = pruning.obd_saliency(half, {"w": jnp.ones(2, jnp.float16)})["w"]
    np.testing.assert_allclose(found, [5e-9, 2e-8], rtol=1e-3)
    large = {"w": jnp.array([1e20, 1.0])}
    with pytest.raises(FloatingPointError, match="the saliencies: 1 of 2"):
        pruning.obd_saliency(large, large)


class Named(NamedTuple):
    kernel: Any
    bias: Any


def test_biases_are_found_by_their_names():
    assert pruning.weights_only(Named(jnp.ones((2, 2)), jnp.ones(2))) == Named(True, False)
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert nnx.to_pure_dict(pruning.weights_only(state)) == {"kernel": True, "bias": False}
    for nameless in (jnp.ones(3), [jnp.ones(3)]):
        with pytest.raises(TypeError, match="expected a name for each array"):
            pruning.weights_only(nameless)


def test_random_scores_are_the_keys_alone():
    one, again, other = (pruning.random_scores(jax.random.key(k), PARAMS) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((one, other))])
    assert len(np.unique(flat)) == 2 * SIZE, "no two alike"


# Curves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", pruning.SCOPES)
@pytest.mark.parametrize("batch_size", [1, 7, 23, 1000])
def test_curve_against_a_plain_loop(scope, batch_size):
    """Whatever the batch size: the padding of the last batch counts for nothing."""
    scores = pruning.magnitude(PARAMS)
    percents = [0, 33.3, 80, 100]
    curve = pruning.accuracy_curve(
        NETWORK, PARAMS, scores, EXAMPLES, percents, scope, batch_size=batch_size
    )
    for percent, accuracy, loss in zip(*curve, strict=True):
        pruned = pruning.apply_mask(PARAMS, pruning.mask(scores, percent, scope))
        logits = np.asarray(NETWORK.apply(pruned, EXAMPLES.images), np.float64)
        assert accuracy == (logits.argmax(1) == EXAMPLES.labels).mean()
        log_sum = np.log(np.exp(logits).sum(1))
        expected = (log_sum - logits[np.arange(23), EXAMPLES.labels]).mean()
        assert loss == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(curve.percents, percents)


def test_padding_is_not_a_right_answer():
    """Nor a wrong one: what fills up has a label, and a network that always says it."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    says_0 = zero | {"dense2": {"kernel": zero["dense2"]["kernel"], "bias": jnp.array([9.0, 0, 0])}}
    wrong = Examples(EXAMPLES.images, np.full(23, 2))
    for batch_size in (1, 7, 22, 24):
        accuracy, loss = pruning.evaluate(NETWORK, says_0, wrong, batch_size)
        assert accuracy == 0
        assert loss == pytest.approx(9 + 2 * np.exp(-9), rel=1e-6)


def test_padding_is_no_blank_image():
    """For which a network that normalises its images gives NaN, and NaN times 0 is NaN."""
    layers = [("dense1", partial(nnx.Linear, 6, 3))]
    network = models.Network([lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True), *layers])
    params = network.init(jax.random.key(0))
    losses = [pruning.evaluate(network, params, EXAMPLES, size)[1] for size in (23, 4)]
    losses.append(pruning.evaluate(network, params, data.filled(EXAMPLES, 30))[1])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_nothing_compiles_twice():
    """Levels, criteria, scopes, what is prunable, and weights are data, not programs."""
    curve = partial(pruning.accuracy_curve, NETWORK, examples=EXAMPLES, batch_size=5)
    curve(PARAMS, pruning.magnitude(PARAMS), percents=[10])
    before = pruning._pruned._cache_size()
    for seed in range(3):
        params = NETWORK.init(jax.random.key(seed))
        for scores in (
            pruning.magnitude(params),
            pruning.obd_saliency(params, pruning.magnitude(params)),
            pruning.random_scores(jax.random.key(seed), params),
        ):
            for scope in pruning.SCOPES:
                curve(params, scores, percents=[0, 12.5, 99], scope=scope)
                curve(params, scores, percents=[50], prunable=pruning.weights_only(params))
    assert pruning._pruned._cache_size() == before


def test_biases_stay_if_asked():
    curve = pruning.accuracy_curve(
        NETWORK, PARAMS, pruning.magnitude(PARAMS), EXAMPLES, [100],
        prunable=pruning.weights_only(PARAMS),
    )  # fmt: skip
    only_biases = jax.tree.map_with_path(lambda path, w: w * (path[-1].key == "bias"), PARAMS)
    assert (curve.accuracy[0], curve.loss[0]) == pruning.evaluate(NETWORK, only_biases, EXAMPLES)


def test_images_may_be_bytes():
    images = GENERATOR.integers(0, 256, (23, 6)).astype(np.uint8)
    scaled = Examples(images / np.float32(255), EXAMPLES.labels)
    one, two = (
        pruning.evaluate(NETWORK, PARAMS, e) for e in (Examples(images, EXAMPLES.labels), scaled)
    )
    assert one[0] == two[0]
    assert one[1] == pytest.approx(two[1], rel=1e-6)
