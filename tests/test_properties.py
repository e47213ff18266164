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
from reference import flat, problem, squared

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
    structure = jax.tree.structure(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return structure.unflatten([p.reshape(s) for p, s in zip(parts, shapes, strict=True)])


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
    sizes = [n * f for n, f in zip(SIZES, free, strict=True)]
    if scope == "layer":
        assert pruned == [math.floor(level * n / 100) for n in sizes]
    else:
        assert sum(pruned) == math.floor(Decimal(level) * sum(sizes) / 100)
    assert all(p <= n for p, n in zip(pruned, sizes, strict=True))


@given(distinct, distinct)
def test_ranks_move_with_their_scores(numbers, order):
    """Ranking permuted entries, across the leaves of the tree, permutes their ranks."""
    numbers, order = np.array(numbers), np.array(order)
    ranks, moved = (flat(pruning.ranks(tree(x))) for x in (numbers, numbers[order]))
    np.testing.assert_array_equal(moved, ranks[order])


@given(tied, scopes)
def test_ties_keep_the_order_of_the_tree(numbers, scope):
    """As NumPy's stable sort of the leaves one after the other; -0 and 0 are a tie."""
    found = pruning.ranks(tree(numbers), scope)
    parts = [flat(tree(numbers))] if scope == "all" else jax.tree.leaves(tree(numbers))
    ranks = [np.ravel(p).argsort(kind="stable").argsort(kind="stable") for p in parts]
    np.testing.assert_array_equal(flat(found), np.concatenate(ranks))


# Diagonals ---------------------------------------------------------------------------------------

NETWORKS = {name: models.mlp((3, 4, 2), getattr(jax.nn, name)) for name in ("relu", "tanh", "gelu")}
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=12)


@cache  # the same object for the same numbers, so that it is compiled once
def mixed(a, b):
    return lambda logits, labels: (
        a * passes.cross_entropy(logits, labels) + b * squared(logits, labels)
    )


def some(name, seed, n=5):
    network = NETWORKS[name]
    return network, *problem(network, seed, n, 3, 2)


def diagonal(*args, **options):
    return flat(curvature.hessian_diagonal(*args, **options))


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-11 * (1 + np.abs(expected).max()))


@few
@given(
    st.sampled_from(sorted(NETWORKS)), seeds, st.sampled_from([1, 5]), st.sampled_from([1, 3, 50])
)
def test_methods_agree_on_any_network(name, seed, n, batch_size):
    with jax.enable_x64(True):
        network, params, examples = some(name, seed, n)
        expected = diagonal(network, params, examples, "one_hot")
        for method in ["exact", *["gauss_newton"] * (name == "relu")]:
            close(diagonal(network, params, examples, method, batch_size=batch_size), expected)


@few
@given(seeds, st.sampled_from([(2.0, 0.0), (1.0, 3.0), (0.5, -1.0)]),
       st.sampled_from(["one_hot", "exact", "gauss_newton"]))  # fmt: skip
def test_diagonal_is_linear_in_the_loss(seed, weights, method):
    with jax.enable_x64(True):
        a, b = weights
        one, two, both = (
            diagonal(*some("relu", seed), method, loss=loss)
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
        network, params, examples = some("relu", seed)
        expected = diagonal(network, params, examples, method)
        shuffled = Examples(*(x[jnp.array(order)] for x in examples[:2]))
        close(diagonal(network, params, shuffled, method, batch_size=batch_size), expected)


def test_hutchinson_is_unbiased_and_its_error_falls_as_one_over_the_root(x64):
    network, params, examples = some("tanh", 0)
    expected = diagonal(network, params, examples, "exact")
    keys = jax.random.split(jax.random.key(1), 150)
    spread = {}
    for probes in (4, 16, 64):
        made = {"probes": probes, "method": "hutchinson"}
        sample = np.stack([diagonal(network, params, examples, key=k, **made) for k in keys])
        uncertain = sample.std(0) > 1e-12
        away = (sample.mean(0) - expected)[uncertain] / sample.std(0)[uncertain] * np.sqrt(150)
        assert np.abs(away).max() < 4.5  # of 26 entries, in standard errors
        np.testing.assert_allclose(sample.mean(0)[~uncertain], expected[~uncertain], atol=1e-11)
        spread[probes] = np.sqrt(sample.var(0).sum())
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


@settings(max_examples=3, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=seeds)
def test_params_are_never_changed(name, seed):
    """Given as NumPy arrays, which could be. And the same call gives the same result."""
    generator = np.random.default_rng(seed)
    params, scores = (tree(generator.normal(size=COUNT)) for _ in range(2))
    before = copy.deepcopy((params, scores, tuple(EXAMPLES)))
    one, two = (FUNCTIONS[name](params, scores) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, (params, scores, tuple(EXAMPLES)), before)
    if name == "accuracy_curve":
        assert one.equals(two)
    else:
        jax.tree.map(np.testing.assert_array_equal, one, two)
