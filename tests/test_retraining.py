"""Masks that no optimizer undoes, and the prune-retrain loop."""

from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from reference import flat

from prunelib import curvature, models, pruning, retraining
from prunelib.data import Examples, load_mnist
from prunelib.training import Recipe

NETWORK = models.mlp((784, 12, 10, 10))
COUNT = 784 * 12 + 12 + 12 * 10 + 10 + 10 * 10 + 10
QUICK = Recipe(steps=7, batch=16, learning_rate=1e-2)
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam with weight decay": optax.adamw(0.1, weight_decay=0.1),
    "weight decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
}


@pytest.fixture(scope="module")
def few():
    return load_mnist().train.first(400)


def starts(seeds):
    return jax.vmap(NETWORK.init)(jnp.stack([jax.random.key(seed) for seed in seeds]))


def retrain(examples, percents, seeds=(0, 1), recipe=QUICK, **options):
    return retraining.prune_and_retrain(
        NETWORK, starts(seeds), examples, examples, percents, recipe, seeds=seeds, **options
    )


def steps(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


# The mask ----------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.lists(st.booleans(), min_size=1, max_size=8),
    st.integers(1, 25),
    st.integers(0, 2**31 - 1),
)
def test_pruned_entries_are_exactly_zero_after_any_number_of_steps(name, kept, count, seed):
    rng = np.random.default_rng(seed)
    kept = {"a": np.array(kept), "b": np.array([[True], [False]])}

    def draw():
        return jax.tree.map(lambda k: rng.normal(0, 10, k.shape).astype(np.float32), kept)

    start, gradients = draw(), [draw() for _ in range(count)]
    masked = steps(optax.chain(OPTIMIZERS[name], retraining.keep_pruned(kept)), start, gradients)
    assert not flat(masked)[~flat(kept)].any()
    # What is kept moves as it would without the mask.
    free = steps(OPTIMIZERS[name], start, gradients)
    np.testing.assert_allclose(flat(masked)[flat(kept)], flat(free)[flat(kept)], rtol=1e-5)


# The loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", sorted(retraining.CRITERIA))
@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_sparsity_is_what_was_asked_and_stays(few, criterion, scope):
    """To the entry, in each round; masks nest; and what is pruned is exactly zero."""
    percents = [33.3, 70, 70, 99.5]
    found = retrain(few, percents, criterion=criterion, scope=scope)
    sizes = [leaf[0].size for leaf in jax.tree.leaves(found.params)]
    for number, percent in enumerate(percents):
        for seed in range(2):
            gone = [int((~leaf[number, seed]).sum()) for leaf in jax.tree.leaves(found.kept)]
            if scope == "all":
                assert sum(gone) == int(percent * COUNT / 100)
            else:
                assert gone == [int(percent * size / 100) for size in sizes]
    for w, k in zip(*map(jax.tree.leaves, (found.params, found.kept)), strict=True):
        assert (k[1:] <= k[:-1]).all()
        np.testing.assert_array_equal(k[1], k[2])
        assert not np.asarray(w)[~k[-1]].any()
    assert flat(found.params).any()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_zero_whatever_the_recipe(few, optimizer):
    recipe = replace(QUICK, optimizer=optimizer, momentum=0.9, weight_decay=0.1, keep=0.8)
    found = retrain(few, [50, 80], recipe=recipe, criterion="magnitude")
    kept = jax.tree.map(lambda k: k[-1], found.kept)
    assert not flat(found.params)[~flat(kept)].any()
    assert (flat(found.params)[flat(kept)] != 0).all()


def test_the_first_mask_is_that_of_pruning(few):
    found = retrain(few, [60], seeds=(3,))
    params = jax.tree.map(lambda w: w[0], starts([3]))
    scores = retraining.CRITERIA["obd"](NETWORK, params, few, None)
    expected, first = flat(pruning.mask(scores, 60)), jax.tree.map(lambda k: k[0, 0], found.kept)
    assert (expected != flat(first)).sum() <= 2  # a rounding error may swap two neighbours


def test_retraining_helps_and_is_measured_before_and_after(few):
    recipe = replace(QUICK, steps=150, learning_rate=3e-3)
    found = retrain(few, [20, 20], recipe=recipe, criterion="magnitude")
    columns = ["seed", "round", "percent", "remaining", "before", "accuracy", "loss"]
    assert sorted(found.table) == sorted(columns)
    assert list(zip(found.table["round"], found.table.seed, strict=True)) == [
        (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    one, two = (found.table[found.table["round"] == r].reset_index() for r in (1, 2))
    assert (one.accuracy > one.before + 0.3).all()
    np.testing.assert_array_equal(two.before, one.accuracy)
    last = jax.tree.map(lambda w: w[1], found.params)
    expected = pruning.evaluate(NETWORK, last, few)
    assert (two.accuracy[1], two.loss[1]) == pytest.approx(expected, rel=1e-6)


def test_seeds_together_are_the_seeds_alone(few):
    recipe = replace(QUICK, keep=0.8)
    together, alone = (
        retrain(few, [50], seeds=seeds, recipe=recipe, criterion="random")
        for seeds in ((4, 5), (5,))
    )
    last = jax.tree.map(lambda w: w[1:], together.params)
    np.testing.assert_allclose(flat(last), flat(alone.params), atol=1e-4)
    assert together.table.accuracy[1] == pytest.approx(alone.table.accuracy[0], abs=0.01)


def test_scores_that_rank_nothing_are_refused(few):
    """A saturated network: no loss, no curvature, and a ranking would be the order of indices."""
    params = jax.tree.map(lambda leaf: 1e4 * leaf, starts((0, 1)))
    one = jax.tree.map(lambda leaf: leaf[0], params)
    sure = Examples(few.images, np.asarray(NETWORK.apply(one, few.images).argmax(1)))
    with pytest.raises(FloatingPointError, match="exactly zero"):
        retraining.prune_and_retrain(NETWORK, params, sure, sure, [50], QUICK, seeds=(0, 1))


def test_curvature_measured_again(few):
    """In one step it is OBD; in several, each step ranks what is left by its own curvature."""
    params = NETWORK.init(jax.random.key(3))

    def saliency(kept):
        left = pruning.apply_mask(params, kept)
        return pruning.obd_saliency(left, curvature.hessian_diagonal(NETWORK, left, few))

    whole = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    once = retraining.recomputed(NETWORK, params, few, step=100)
    np.testing.assert_array_equal(flat(pruning.ranks(once)), flat(pruning.ranks(saliency(whole))))
    scores, kept = retraining.recomputed(NETWORK, params, few, step=30), whole
    for percent in (30, 60, 90):
        alive = jax.tree.map(lambda k, s: jnp.where(k, s, -1), kept, saliency(kept))
        kept = pruning.mask(alive, percent)
        np.testing.assert_array_equal(flat(kept), flat(pruning.mask(scores, percent)))
    assert (flat(kept) != flat(pruning.mask(once, 90))).any()
