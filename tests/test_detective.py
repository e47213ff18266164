"""The mistakes of 2016 are hard to make here, and the published tables can be checked."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from prunelib import curvature, data, figures, models, pruning
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
    scores = {
        "signed weights": flat,
        "index order": np.arange(47_410.0),
        "magnitude": np.abs(flat),
    }[ranked]
    params, tree = models.params_from_flat(flat), models.params_from_flat(scores)
    curve = pruning.accuracy_curve(NETWORK, params, tree, examples, range(0, 20), scope)
    assert curve.percents.tolist() == list(range(20))
    assert curve.accuracy[0] == 1
    for percent in (0, 1, 7, 19):
        accuracy = curve.accuracy[percent]
        expected = pruned_2016(flat, scores, percent, scope)
        kept = pruning.mask(tree, percent, scope)
        found = models.flat_from_params(pruning.apply_mask(params, kept))
        np.testing.assert_array_equal(found, expected)
        own = (forward_2016(expected, examples.images).argmax(1) == examples.labels).mean()
        assert abs(accuracy - own) <= 1.01 / 400  # one image on the edge between two classes
    assert curve.accuracy[-1] < 0.9 or ranked != "signed weights"


def test_index_order_takes_the_top_rows_of_the_image_first(flat, examples):
    params, index = models.params_from_flat(flat), models.params_from_flat(np.arange(47_410.0))
    kept = pruning.mask(index, percent=10)
    pixels = np.asarray(kept["dense1"]["kernel"])  # 4,741 weights are 94 pixels and 41 weights
    assert not pixels[:94].any()
    assert pixels[94].tolist() == [False] * 41 + [True] * 9
    assert pixels[95:].all()
    assert all(bool(leaf.all()) for leaf in jax.tree.leaves({**kept, "dense1": kept["dense2"]}))
    curve = pruning.accuracy_curve(NETWORK, params, index, examples, [0, 5, 11])
    assert curve.accuracy.tolist() == [1, 1, 1], "the black rows cost nothing"


def test_params_from_flat_is_in_the_order_of_the_checkpoints():
    params = models.params_from_flat(np.arange(47_410.0))
    names = [(f"dense{k}", kind) for kind in ("kernel", "bias") for k in range(1, 6)]
    for (name, kind), start, size in zip(names, STARTS, SIZES, strict=False):
        found = np.asarray(params[name][kind])
        np.testing.assert_array_equal(found.ravel(), np.arange(start, start + size))
    assert params["dense1"]["kernel"].shape == (784, 50)
    assert params["dense1"]["kernel"][3, 7] == 3 * 50 + 7  # pixel by pixel
    assert params["dense5"]["kernel"].shape == (50, 10)
    np.testing.assert_array_equal(models.flat_from_params(params), np.arange(47_410.0))
    assert jax.tree.structure(params) == jax.tree.structure(NETWORK.init(jax.random.key(0)))


@pytest.mark.parametrize("wrong", [np.zeros(47_411), np.zeros(0), np.zeros((1, 47_410))])
def test_params_from_flat_refuses_another_size(wrong):
    with pytest.raises(ValueError, match="flat: expected a vector of 47410 numbers, got"):
        models.params_from_flat(wrong)


# Mistake: signed weights


def test_magnitude_does_not_see_signs(flat):
    params = models.params_from_flat(flat)
    flipped = jax.tree.map(jnp.negative, params)
    one, other = (pruning.mask(pruning.magnitude(p), 20) for p in (params, flipped))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))
    gone = flat[np.asarray(models.flat_from_params(pruning.apply_mask(params, one))) == 0]
    assert np.abs(gone).max() <= np.quantile(np.abs(flat), 0.2) + 1e-6


# Mistake: ranking NaN


def nan_scores(where):
    scores = models.params_from_flat(np.arange(47_410.0))
    if where == "all":
        return jax.tree.map(lambda s: jnp.full_like(s, jnp.nan), scores)
    layer = scores["dense3"]
    return scores | {"dense3": layer | {"bias": layer["bias"].at[4].set(jnp.nan)}}


@pytest.mark.parametrize("where", ["all", "one"])
@pytest.mark.parametrize("scope", ["all", "layer"])
@pytest.mark.parametrize("function", [pruning.ranks, pruning.mask, pruning.counts])
def test_ranking_refuses_nan(where, scope, function):
    percent = {} if function is pruning.ranks else {"percent": 0}
    with pytest.raises(FloatingPointError, match=r"scores: .* NaN or infinite; .*log\(softmax\)"):
        function(nan_scores(where), scope=scope, **percent)


def test_accuracy_curve_refuses_nan(flat, examples):
    params = models.params_from_flat(flat)
    with pytest.raises(FloatingPointError, match="scores"):
        pruning.accuracy_curve(NETWORK, params, nan_scores("one"), examples, [0])


def small_network():
    network = models.mlp((6, 4, 3))
    images = np.random.default_rng(2).uniform(0, 1, (200, 6)).astype(np.float32)
    labels = np.random.default_rng(3).integers(0, 3, 200).astype(np.int32)
    return network, network.init(jax.random.key(1)), Examples(images, labels)


def log_of_softmax(logits, labels):
    return -(jax.nn.one_hot(labels, 3) * jnp.log(jax.nn.softmax(logits))).sum(1)


def test_the_loss_of_2016_gives_no_diagonal_but_an_error():
    network, params, examples = small_network()
    confident = jax.tree.map(lambda w: 40 * w, params)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        curvature.hessian_diagonal(
            network, confident, examples, method="one_hot", loss=log_of_softmax
        )
    own = curvature.hessian_diagonal(network, confident, examples, method="one_hot")
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(own))


def test_saliency_refuses_a_nan_diagonal(flat):
    with pytest.raises(FloatingPointError, match="diagonal"):
        pruning.obd_saliency(models.params_from_flat(flat), nan_scores("one"))


# Mistake: H·1 for the diagonal, of one batch


def dense_hessian(network, params, examples):
    vector, unravel = ravel_pytree(params)

    def mean_loss(vector):
        logits = network.apply(unravel(vector), examples.images)
        log_p = jax.nn.log_softmax(logits)
        return -log_p[jnp.arange(len(examples.labels)), examples.labels].mean()

    return np.asarray(jax.hessian(mean_loss)(vector))


@pytest.mark.parametrize("method", list(curvature.METHODS))
def test_no_method_returns_the_row_sums(method):
    network, params, examples = small_network()
    hessian = dense_hessian(network, params, examples)
    diagonal, row_sums = np.diag(hessian), hessian.sum(1)
    assert np.linalg.norm(diagonal - row_sums) > 0.5 * np.linalg.norm(diagonal), "no test else"
    found = ravel_pytree(curvature.hessian_diagonal(network, params, examples, method))[0]
    to_diagonal = np.linalg.norm(found - diagonal) / np.linalg.norm(diagonal)
    assert to_diagonal < np.linalg.norm(found - row_sums) / np.linalg.norm(row_sums)
    exact = method in ("one_hot", "neuron", "gauss_newton")
    assert to_diagonal < (1e-5 if exact else 0.5)


def test_every_function_named_for_the_diagonal_is_tested_above():
    public = [
        name
        for name, function in inspect.getmembers(curvature, inspect.isfunction)
        if function.__module__ == "prunelib.curvature" and not name.startswith("_")
    ]
    assert set(public) - set(curvature.METHODS) == {
        "hvp",  # asks for the vector
        "hessian_diagonal",
        "hutchinson_estimate",
        "loss_factor",
    }


def test_the_vector_of_a_hessian_product_must_be_named():
    _, params, _ = small_network()
    with pytest.raises(TypeError, match="vector"):
        curvature.hvp(lambda p: 0.0, params)


def test_the_diagonal_is_of_all_examples_whatever_the_batch():
    network, params, examples = small_network()
    whole = ravel_pytree(curvature.hessian_diagonal(network, params, examples))[0]
    batched = curvature.hessian_diagonal(network, params, examples, batch_size=64)
    np.testing.assert_allclose(ravel_pytree(batched)[0], whole, rtol=1e-4, atol=1e-8)
    one_batch = Examples(examples.images[:64], examples.labels[:64])
    other = ravel_pytree(curvature.hessian_diagonal(network, params, one_batch))[0]
    assert np.linalg.norm(other - whole) > 0.01 * np.linalg.norm(whole)


def test_the_saliency_has_the_weight_squared():
    w, h = {"w": jnp.array([3.0, -1.0, 2.0])}, {"w": jnp.array([1.0, 4.0, 0.0])}
    assert pruning.obd_saliency(w, h)["w"].tolist() == [4.5, 2.0, 0.0]


# Mistake: a restore


def test_masks_never_change_parameters(flat, examples):
    params, before = models.params_from_flat(flat), flat.copy()
    scores = pruning.magnitude(params)
    kept = pruning.mask(scores, 50)
    pruned = pruning.apply_mask(params, kept)
    pruning.accuracy_curve(NETWORK, params, scores, examples, [0, 50, 99])
    np.testing.assert_array_equal(models.flat_from_params(params), before)
    assert (np.asarray(models.flat_from_params(pruned)) == 0).sum() == 23_705
    with pytest.raises(TypeError, match="immutable"):
        params["dense1"]["kernel"][0, 0] = 0


def test_a_level_does_not_depend_on_the_levels_before_it(flat, examples):
    params = models.params_from_flat(flat)
    whole = pruning.accuracy_curve(NETWORK, params, params, examples, range(20))
    back = pruning.accuracy_curve(NETWORK, params, params, examples, range(19, -1, -1))
    alone = pruning.accuracy_curve(NETWORK, params, params, examples, [7])
    np.testing.assert_array_equal(back.accuracy[::-1], whole.accuracy)
    assert alone.accuracy[0] == whole.accuracy[7]


# What the notebook draws


def test_published_tables_have_the_levels_of_2016():
    published = data.published_2016()
    for name, (percents, accuracy) in published.items():
        levels = [*range(20)] if "layerwise" in name or "magnitude" in name else [
            *range(21), 30, 40, 50, 60, 70]  # fmt: skip
        assert percents.tolist() == levels, name
        assert ((accuracy > 0) & (accuracy < 1)).all()


def test_accuracy_panels_draw_and_tabulate_every_line():
    levels, runs = np.array([0, 10, 20]), np.array([[0.9, 0.5, 0.1], [0.8, 0.6, 0.2]])
    lines = [
        figures.Line("published", levels, runs[0], "published"),
        figures.Line("as run", levels, runs, "other"),
        figures.Line("each", levels, runs, "other", faint=True),
    ]
    figure, axes, table = figures.accuracy_panels({"a": lines, "b": lines[:2]}, "title")
    assert len(axes) == 2
    assert {text.get_text() for text in figure.legends[0].texts} == {"published", "as run", "each"}
    rows = list(zip(*table.values(), strict=True))
    assert len(rows) == 3 * 3 + 2 * 3
    assert rows[4] == ("a", "as run", 10, pytest.approx(0.55), 0.5, 0.6)


def test_leak_and_pixel_shares_tabulate_what_they_draw():
    levels, runs = np.array([0, 10]), np.array([[0.9, 0.5], [0.8, 0.6]])
    line = figures.Line("as run", levels, runs, "other")
    _, table = figures.leak([line], np.array([[0, 3], [0, 5]]))
    assert table["percent_pruned"].tolist() == [0, 10]
    assert table["lost_seed_1"].tolist() == [0, 5]
    assert table["as run, lowest"].tolist() == [0.8, 0.5]
    share = np.linspace(0, 1, 784).reshape(28, 28)
    figure, table = figures.pixel_shares({"one": share, "two": 1 - share})
    assert len(figure.axes) == 3
    assert table["row"][29] == 1
    assert table["column"][29] == 1
    assert table["one"][29] == share[1, 1]
