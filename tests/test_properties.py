"""What holds for every input: hypothesis looks for one for which it doesn't."""

import copy
import math
from decimal import Decimal
from functools import cache

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from prunelib import curvature, models, passes, pruning, taylor
from prunelib.data import Examples

# One shape for all, so that XLA compiles once.
SHAPES = {"dense1": {"bias": (4,), "kernel": (5, 4)}, "dense2": {"bias": (3,), "kernel": (4, 3)}}
SIZES = [4, 20, 3, 12]
COUNT = sum(SIZES)
levels = st.decimals(0, 100, places=3)
scopes = st.sampled_from(pruning.SCOPES)
distinct = st.permutations(range(COUNT))
tied = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 1e-30, 2.0]), min_size=COUNT, max_size=COUNT)
prunables = st.sampled_from([None, {n: {"bias": False, "kernel": True} for n in SHAPES}])


def tree(numbers):
    """A pytree of float32 from a flat list, in the order of jax.tree.leaves."""
    parts = np.split(np.asarray(numbers, np.float32), np.cumsum(SIZES)[:-1])
    shapes = [(4,), (5, 4), (3,), (4, 3)]
    leaves = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return jax.tree.structure(SHAPES, is_leaf=lambda x: isinstance(x, tuple)).unflatten(leaves)


def flat(found):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])


# Ranking and masks -------------------------------------------------------------------------------


@given(tied, levels, levels, scopes, prunables)
def test_masks_nest_as_the_level_rises(numbers, one, two, scope, prunable):
    low, high = sorted((float(one), float(two)))
    less = flat(pruning.mask(tree(numbers), low, scope, prunable))
    more = flat(pruning.mask(tree(numbers), high, scope, prunable))
    assert not (more & ~less).any()


@given(tied, levels, scopes, prunables)
def test_counts_are_exact_in_every_scope(numbers, level, scope, prunable):
    kept = pruning.mask(tree(numbers), float(level), scope, prunable)
    pruned = [int((~leaf).sum()) for leaf in jax.tree.leaves(kept)]
    free = [1, 1, 1, 1] if prunable is None else [0, 1, 0, 1]
    if scope == "layer":
        expected = [math.floor(level * n * f / 100) for n, f in zip(SIZES, free, strict=True)]
        assert pruned == expected
    else:
        sizes = sum(n * f for n, f in zip(SIZES, free, strict=True))
        assert sum(pruned) == math.floor(Decimal(level) * sizes / 100)
    assert all(p == 0 for p, f in zip(pruned, free, strict=True) if not f)


@given(distinct, distinct)
def test_ranks_move_with_their_scores(numbers, order):
    """Ranking permuted entries, across the leaves of the tree, permutes their ranks."""
    numbers, order = np.array(numbers), np.array(order)
    ranks, moved = (flat(pruning.ranks(tree(x))) for x in (numbers, numbers[order]))
    np.testing.assert_array_equal(moved, ranks[order])


@given(distinct)
def test_the_names_of_the_layers_do_not_matter(numbers):
    scores = tree(numbers)
    renamed = {"z": scores["dense1"], "a": scores["dense2"]}
    ranks, found = pruning.ranks(scores), pruning.ranks(renamed)
    np.testing.assert_array_equal(flat([ranks["dense1"], ranks["dense2"]]),
                                  flat([found["z"], found["a"]]))  # fmt: skip


MONOTONE = {
    "shifted and scaled": lambda s: 3 * s - 7,
    "cubed": lambda s: (s - 20) ** 3,
    "logarithm": np.log1p,
    "as integers": lambda s: s.astype(np.int32) - 5,
}


@given(st.one_of(distinct, tied.map(np.abs)), st.sampled_from(sorted(MONOTONE)), scopes)
def test_only_the_order_of_scores_matters(numbers, name, scope):
    scores = np.unique(numbers, return_inverse=True)[1]  # 0, 1, 2, ... with the same ties
    one = pruning.ranks(tree(scores), scope)
    two = pruning.ranks(jax.tree.map(MONOTONE[name], tree(scores)), scope)
    np.testing.assert_array_equal(flat(one), flat(two))


@given(tied, scopes)
def test_ties_keep_the_order_of_the_tree(numbers, scope):
    """As NumPy's stable sort of the leaves one after the other; -0 and 0 are a tie."""
    found = pruning.ranks(tree(numbers), scope)
    parts = [flat(tree(numbers))] if scope == "all" else jax.tree.leaves(tree(numbers))
    ranks = [flat([np.ravel(p)]).argsort(kind="stable").argsort(kind="stable") for p in parts]
    np.testing.assert_array_equal(flat(found), np.concatenate(ranks))
    np.testing.assert_array_equal(flat(found), flat(pruning.ranks(tree(numbers), scope)))


# Diagonals ---------------------------------------------------------------------------------------

NETWORKS = {name: models.mlp((3, 4, 2), getattr(jax.nn, name)) for name in ("relu", "tanh", "gelu")}
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=12)


def squared(logits, labels):
    return ((logits - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)) ** 2).sum(1)


@cache  # the same object for the same numbers, so that it is compiled once
def mixed(a, b):
    return lambda logits, labels: (
        a * passes.cross_entropy(logits, labels) + b * squared(logits, labels)
    )


def problem(name, seed, n=5):
    k1, k2, k3, k4 = jax.random.split(jax.random.key(seed), 4)
    network = NETWORKS[name]
    params = jax.tree.map(
        lambda w: w + 0.3 * jax.random.normal(k4, w.shape, jnp.float64), network.init(k1)
    )
    images = jax.random.normal(k2, (n, 3), jnp.float64)
    return network, params, Examples(images, jax.random.randint(k3, (n,), 0, 2))


def diagonal(*args, **options):
    return np.asarray(ravel_pytree(curvature.hessian_diagonal(*args, **options))[0])


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-11 * (1 + np.abs(expected).max()))


@few
@given(
    st.sampled_from(sorted(NETWORKS)), seeds, st.sampled_from([1, 5]), st.sampled_from([1, 3, 50])
)
def test_methods_agree_on_any_network(name, seed, n, batch_size):
    with jax.enable_x64(True):
        network, params, examples = problem(name, seed, n)
        expected = diagonal(network, params, examples, "one_hot")
        methods = ["neuron", "gauss_newton"] if name == "relu" else ["neuron"]
        for method in methods:
            close(diagonal(network, params, examples, method, batch_size=batch_size), expected)


@few
@given(seeds, st.sampled_from([(2.0, 0.0), (1.0, 3.0), (0.5, -1.0)]),
       st.sampled_from(["one_hot", "neuron", "gauss_newton"]))  # fmt: skip
def test_diagonal_is_linear_in_the_loss(seed, weights, method):
    with jax.enable_x64(True):
        a, b = weights
        one, two, both = (
            diagonal(*problem("relu", seed), method, loss=loss)
            for loss in (passes.cross_entropy, squared, mixed(a, b))
        )
        close(both, a * one + b * two)


@few
@given(
    seeds,
    st.permutations(range(5)),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from(sorted(set(curvature.METHODS) - {"sampled"})),  # whose draws go by number
)
def test_order_and_batching_of_examples_do_not_matter(seed, order, batch_size, method):
    with jax.enable_x64(True):
        network, params, examples = problem("relu", seed)
        expected = diagonal(network, params, examples, method)
        shuffled = Examples(examples.images[jnp.array(order)], examples.labels[jnp.array(order)])
        close(diagonal(network, params, shuffled, method, batch_size=batch_size), expected)


@few
@given(seeds, st.sampled_from(["relu", "tanh"]))
def test_data_twice_over_has_the_same_diagonal(seed, name):
    """E is a mean: it knows shares, not counts."""
    with jax.enable_x64(True):
        network, params, examples = problem(name, seed)
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), examples)
        close(
            diagonal(network, params, twice, "neuron"),
            diagonal(network, params, examples, "neuron"),
        )


def test_hutchinson_is_unbiased_and_its_error_falls_as_one_over_the_root():
    with jax.enable_x64(True):
        network, params, examples = problem("tanh", 0)
        expected = diagonal(network, params, examples, "neuron")
        keys = jax.random.split(jax.random.key(1), 150)
        spread = {}
        for probes in (4, 16, 64):
            sample = [
                ravel_pytree(curvature.hutchinson_estimate(
                    network, params, examples, probes=probes, key=key
                ))[0] for key in keys
            ]  # fmt: skip
            means, errors = np.split(np.stack(sample), 2, axis=1)
            root = np.sqrt(len(keys))
            uncertain = means.std(0) > 1e-12
            deviations = (means.mean(0) - expected)[uncertain] / means.std(0)[uncertain] * root
            assert np.abs(deviations).max() < 4.5  # of 26 entries, in standard errors
            np.testing.assert_allclose(means.mean(0)[~uncertain], expected[~uncertain], atol=1e-11)
            spread[probes] = np.sqrt((means.var(0)).sum())
            # the error it states is the error it has
            stated = np.sqrt((errors**2).mean(0).sum())
            assert stated == pytest.approx(spread[probes], rel=0.15)
        assert spread[4] / spread[16] == pytest.approx(2, rel=0.15)
        assert spread[16] / spread[64] == pytest.approx(2, rel=0.15)


# Nothing is changed in place ---------------------------------------------------------------------

NETWORK = models.mlp((5, 4, 3))
EXAMPLES = Examples(np.random.default_rng(0).random((6, 5), np.float32), np.arange(6) % 3)
FUNCTIONS = {
    "apply": lambda p, s: NETWORK.apply(p, EXAMPLES.images),
    "magnitude": lambda p, s: pruning.magnitude(p),
    "obd_saliency": lambda p, s: pruning.obd_saliency(p, s),
    "mask": lambda p, s: pruning.mask(s, 50, "layer"),
    "apply_mask": lambda p, s: pruning.apply_mask(p, pruning.mask(s, 50)),
    "accuracy_curve": lambda p, s: pruning.accuracy_curve(NETWORK, p, s, EXAMPLES, [0, 50, 100]),
    "loss_change": lambda p, s: taylor.loss_change(NETWORK, p, pruning.mask(s, 50), EXAMPLES),
    **{
        method: lambda p, s, m=method: curvature.hessian_diagonal(NETWORK, p, EXAMPLES, m)
        for method in curvature.METHODS
    },
}


@settings(max_examples=5, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=seeds)
def test_params_are_never_changed(name, seed):
    """Given as NumPy arrays, which could be."""
    generator = np.random.default_rng(seed)
    params, scores = (tree(generator.normal(size=COUNT)) for _ in range(2))
    before = copy.deepcopy((params, scores, tuple(EXAMPLES)))
    one, two = (FUNCTIONS[name](params, scores) for _ in range(2))
    for found, expected in zip(
        jax.tree.leaves((params, scores, tuple(EXAMPLES))), jax.tree.leaves(before), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    # and the same call gives the same result
    for found, expected in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(found, expected)
