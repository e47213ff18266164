"""The mistakes of 2016 are hard to make here, and the published tables can be checked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import flat as vector
from reference import hessian

from prunelib import curvature, models, pruning, study2016
from prunelib.data import Examples

SIZES = [784 * 50, 2500, 2500, 2500, 500, 50, 50, 50, 50, 10]  # W_1 ... W_final, b_1 ... b_final
STARTS = np.cumsum([0, *SIZES])
NETWORK = models.mlp()


@pytest.fixture(scope="module")
def flat():
    return np.random.default_rng(0).normal(0, 0.15, 47_410).astype(np.float32)


@pytest.fixture(scope="module")
def examples(flat):
    """Images, and the labels that the unpruned network itself gives them."""
    images = np.random.default_rng(1).integers(0, 256, (400, 784), np.uint8)
    images[:, :112] = 0  # as in MNIST, the top rows are black
    return Examples(images, forward_2016(flat, images).argmax(1).astype(np.int32))


# An independent version, in NumPy, written from the description of the 2016 program


def forward_2016(flat, images):
    parts = [flat[start : start + size] for start, size in zip(STARTS, SIZES, strict=False)]
    x = images.astype(np.float32) / 255
    for layer, width in enumerate([50, 50, 50, 50, 10]):
        x = x @ parts[layer].reshape(-1, width) + parts[layer + 5]
        if layer < 4:
            x = np.maximum(x, 0)
    return x


def pruned_2016(flat, scores, percent, scope):
    """Zero the floor(p n / 100) lowest scores, of the whole vector or of each variable."""
    bounds = [(0, 47_410)] if scope == "all" else list(itertools.pairwise(STARTS))
    out = flat.copy()
    for start, stop in bounds:
        count = percent * (stop - start) // 100
        by_score = sorted(zip(scores[start:stop].tolist(), range(start, stop), strict=True))
        out[[k for _, k in by_score[:count]]] = 0
    return out


@pytest.mark.parametrize("scope", ["all", "layer"])
@pytest.mark.parametrize("ranked", ["signed weights", "index order", "magnitude"])
def test_accuracy_curve_prunes_as_in_2016(flat, examples, scope, ranked):
    """Curves of the published kind: also what the study ranked by mistake, if one asks for it."""
    by = {"signed weights": flat, "index order": np.arange(47_410.0), "magnitude": np.abs(flat)}
    scores = by[ranked]
    params, tree = models.params_from_flat(flat), models.params_from_flat(scores)
    curve = pruning.accuracy_curve(NETWORK, params, tree, examples, range(20), scope)
    assert curve.percent.tolist() == list(range(20))
    assert curve.accuracy[0] == 1
    for percent in (0, 1, 7, 19):
        expected = pruned_2016(flat, scores, percent, scope)
        kept = pruning.mask(tree, percent, scope)
        found = models.flat_from_params(pruning.apply_mask(params, kept))
        np.testing.assert_array_equal(found, expected)
        own = (forward_2016(expected, examples.images).argmax(1) == examples.labels).mean()
        assert abs(curve.accuracy[percent] - own) <= 1.01 / 400  # one image between two classes
    assert curve.accuracy[19] < 0.9 or ranked != "signed weights"


def test_index_order_takes_the_top_rows_of_the_image_first(flat, examples):
    params, index = models.params_from_flat(flat), models.params_from_flat(np.arange(47_410.0))
    pixels = np.asarray(pruning.mask(index, percent=10)["dense1"]["kernel"])
    assert not pixels[:94].any()  # 4,741 weights are 94 pixels and 41 weights
    assert pixels[94].tolist() == [False] * 41 + [True] * 9
    assert pixels[95:].all()
    curve = pruning.accuracy_curve(NETWORK, params, index, examples, [0, 5, 11])
    assert curve.accuracy.tolist() == [1, 1, 1], "the black rows cost nothing"


def test_params_from_flat_is_in_the_order_of_the_checkpoints():
    params = models.params_from_flat(np.arange(47_410.0))
    names = [(f"dense{k}", kind) for kind in ("kernel", "bias") for k in range(1, 6)]
    for (name, kind), start, size in zip(names, STARTS, SIZES, strict=False):
        np.testing.assert_array_equal(np.ravel(params[name][kind]), range(start, start + size))
    assert params["dense1"]["kernel"].shape == (784, 50)
    assert params["dense1"]["kernel"][3, 7] == 3 * 50 + 7  # pixel by pixel
    np.testing.assert_array_equal(models.flat_from_params(params), np.arange(47_410.0))
    assert jax.tree.structure(params) == jax.tree.structure(NETWORK.init(jax.random.key(0)))


# Mistake: ranking NaN, from a loss that takes the logarithm of a softmax


def log_of_softmax(logits, labels):
    return -(jax.nn.one_hot(labels, 3) * jnp.log(jax.nn.softmax(logits))).sum(1)


def small_network():
    network = models.mlp((6, 4, 3))
    images = np.random.default_rng(2).uniform(0, 1, (200, 6)).astype(np.float32)
    labels = np.random.default_rng(3).integers(0, 3, 200).astype(np.int32)
    return network, network.init(jax.random.key(1)), Examples(images, labels)


@pytest.mark.parametrize("method", ["one_hot", "exact", "gauss_newton", "hutchinson"])
def test_the_loss_of_2016_gives_no_diagonal_but_an_error(method):
    network, params, examples = small_network()
    confident = jax.tree.map(lambda w: 40 * w, params)
    with pytest.raises(FloatingPointError, match=r"the Hessian diagonal.*log\(softmax\)"):
        curvature.hessian_diagonal(network, confident, examples, method, loss=log_of_softmax)
    own = curvature.hessian_diagonal(network, confident, examples, method)
    assert np.isfinite(vector(own)).all()


# Mistake: H·1 for the diagonal, of one batch


@pytest.mark.parametrize("method", list(curvature.METHODS))
def test_no_method_returns_the_row_sums(method):
    network, params, examples = small_network()
    whole = hessian(network, params, examples)
    diagonal, row_sums = np.diag(whole), whole.sum(1)
    assert np.linalg.norm(diagonal - row_sums) > 0.5 * np.linalg.norm(diagonal), "no test else"
    found = vector(curvature.hessian_diagonal(network, params, examples, method))
    to_diagonal = np.linalg.norm(found - diagonal) / np.linalg.norm(diagonal)
    assert to_diagonal < np.linalg.norm(found - row_sums) / np.linalg.norm(row_sums)
    assert to_diagonal < (1e-5 if method in ("one_hot", "exact", "gauss_newton") else 0.5)


# What was published


def test_published_table():
    table = study2016.published()
    columns = ["experiment", "remaining", "accuracy", "criterion", "scope", "percent"]
    assert sorted(table.columns) == sorted(columns)
    assert set(table.experiment) == set(study2016.EXPERIMENTS)
    for name, rows in table.groupby("experiment"):
        more = [] if "layerwise" in name or "magnitude" in name else [20, 30, 40, 50, 60, 70]
        assert rows.percent.tolist() == [*range(20), *more]
        assert (rows.remaining + rows.percent == 100).all()
        assert {(c, s) for c, s in zip(rows.criterion, rows.scope, strict=True)} == {
            study2016.EXPERIMENTS[name]
        }
    assert table.accuracy.between(0, 1, inclusive="neither").all()
    first_and_last = table[table.experiment == "obd_all_layers"].accuracy.iloc[[0, -1]]
    assert first_and_last.tolist() == [0.9656, 0.0892]
