"""Masks that no optimizer undoes, the prune-retrain loop, and the outcomes that are shipped."""

import json
from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given

from prunelib import models, pruning, retraining, training
from prunelib.data import Examples, filled, load_mnist

NETWORK = models.mlp((784, 12, 10, 10))
COUNT = 784 * 12 + 12 + 12 * 10 + 10 + 10 * 10 + 10
QUICK = training.Recipe("quick", steps=7, batch=16, learning_rate=1e-2)
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam with weight decay": optax.adamw(0.1, weight_decay=0.1),
    "weight decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
}


@pytest.fixture(scope="module")
def mnist():
    return load_mnist()


@pytest.fixture(scope="module")
def few(mnist):
    return Examples(*(x[:400] for x in mnist.train))


def starts(seeds):
    return jax.vmap(NETWORK.init)(jnp.stack([jax.random.key(seed) for seed in seeds]))


def convolutional():
    conv = partial(nnx.Conv, 1, 2, (5, 5), padding="VALID", conv_general_dilated=models.convolve)
    layers = [models.as_picture, ("conv1", conv), models.max_pool, jax.nn.relu, models.flatten]
    return models.Network([*layers, ("dense1", partial(nnx.Linear, 288, 10))])


def retrain(data, percents, seeds=(0, 1), recipe=QUICK, **options):
    found = retraining.prune_and_retrain(
        NETWORK, starts(seeds), data, data, percents, recipe, seeds=seeds, **options
    )
    return found


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
    kept = {"a": jnp.array(kept), "b": jnp.array([[True], [False]])}

    def draw():
        return jax.tree.map(lambda k: jnp.array(rng.normal(0, 10, k.shape), jnp.float32), kept)

    start, gradients = draw(), [draw() for _ in range(count)]
    masked = steps(optax.chain(OPTIMIZERS[name], retraining.keep_pruned(kept)), start, gradients)
    jax.tree.map(lambda w, k: np.testing.assert_array_equal(w[~k], 0), masked, kept)
    # From a pruned start, what is kept moves as it would without the mask.
    free = steps(OPTIMIZERS[name], start, gradients)
    for w, f, k in zip(*map(jax.tree.leaves, (masked, free, kept)), strict=True):
        np.testing.assert_allclose(w[k], f[k], rtol=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_masking_the_gradient_instead_is_not_enough(name):
    """Why the mask stands after the optimizer: a step before pruning leaves momentum behind."""
    kept, one = jnp.array([True, False]), jnp.ones(2)
    masked_gradient = one * kept
    before = OPTIMIZERS[name].update(one, OPTIMIZERS[name].init(one), one)[1]
    pruned = jnp.where(kept, one, 0.0)
    updates, _ = OPTIMIZERS[name].update(masked_gradient, before, pruned)
    revived = optax.apply_updates(pruned, updates)[1] != 0
    assert revived == (name != "weight decay")  # the one with no memory


def test_the_mask_needs_params():
    mask = retraining.keep_pruned(jnp.array([True]))
    with pytest.raises(ValueError, match="params: keep_pruned needs them"):
        mask.update(jnp.ones(1), mask.init(jnp.ones(1)))


def test_the_mask_is_checked():
    """A mask of 0 and 1 would choose other entries; one of another shape would be broadcast."""
    with pytest.raises(TypeError, match="kept: expected booleans, got float32"):
        retraining.keep_pruned({"w": jnp.ones(2)})
    one = {"w": jnp.ones((2, 2))}
    mask = retraining.keep_pruned({"w": jnp.array([True, False])})
    with pytest.raises(ValueError, match=r"kept\['w'\]: expected shape \(2, 2\)"):
        mask.update(one, mask.init(one), one)


# The loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", sorted(retraining.CRITERIA))
@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_sparsity_is_what_was_asked_to_the_entry(few, criterion, scope):
    percents = [33.3, 70, 99.5]
    found = retrain(few, percents, criterion=criterion, scope=scope)
    one = jax.tree.map(lambda w: w[0], starts([0]))
    for number, percent in enumerate(percents):
        asked = jax.tree.leaves(pruning.counts(one, percent, scope))
        masks = [leaf[number] for leaf in jax.tree.leaves(found.kept)]
        for seed in range(2):
            gone = [int((~leaf[seed]).sum()) for leaf in masks]
            if scope == "all":
                assert sum(gone) == int(percent * COUNT / 100) == asked[0]
            else:
                assert gone == asked
    leaves = list(zip(*map(jax.tree.leaves, (found.params, found.kept)), strict=True))
    assert all((np.asarray(w)[~k[-1]] == 0).all() for w, k in leaves)
    assert any((np.asarray(w)[k[-1]] != 0).any() for w, k in leaves)


@pytest.mark.parametrize("steps", [1, 12])
def test_a_convolution_is_as_sparse_as_asked_and_stays_so(few, steps):
    network = convolutional()
    start = jax.vmap(network.init)(jnp.stack([jax.random.key(0)]))
    recipe = replace(QUICK, steps=steps)
    found = retraining.prune_and_retrain(
        network, start, few, few, [30, 85], recipe, "obd", seeds=(0,), scored_on=50
    )
    total = 25 * 2 + 2 + 288 * 10 + 10
    for number, percent in enumerate((30, 85)):
        left = sum(int(leaf[number].sum()) for leaf in jax.tree.leaves(found.kept))
        assert left == total - percent * total // 100
    for w, k in zip(*map(jax.tree.leaves, (found.params, found.kept)), strict=True):
        np.testing.assert_array_equal(np.asarray(w)[~k[-1]], 0)
    moved = jax.tree.map(lambda w, s, k: (w != s)[k[-1]], found.params, start, found.kept)
    assert all(leaf.any() for leaf in jax.tree.leaves(moved["conv1"]["kernel"]))


def test_what_is_pruned_stays_pruned(few):
    found = retrain(few, [40, 60, 60, 90], criterion="random")
    for leaf in jax.tree.leaves(found.kept):
        assert (leaf[1:] <= leaf[:-1]).all()
        np.testing.assert_array_equal(leaf[1], leaf[2])


def test_the_first_mask_is_that_of_pruning(few):
    found = retrain(few, [60], criterion="obd", seeds=(3,))
    params = jax.tree.map(lambda w: w[0], starts([3]))
    scores = retraining.CRITERIA["obd"](NETWORK, params, few, None)
    expected = pruning.mask(scores, 60)
    differ = jax.tree.map(lambda a, b: int((a != b[0, 0]).sum()), expected, found.kept)
    assert sum(jax.tree.leaves(differ)) <= 2  # a rounding error may swap two neighbours


def test_retraining_helps_and_is_measured_before_and_after(few):
    recipe = replace(QUICK, steps=150, learning_rate=3e-3)
    found = retrain(few, [20, 20], recipe=recipe, criterion="magnitude")
    assert found.accuracy.shape == found.loss.shape == found.before.shape == (2, 2)
    assert (found.accuracy[:, 0] > found.before[:, 0] + 0.3).all()
    np.testing.assert_array_equal(found.before[:, 1], found.accuracy[:, 0])
    logits = NETWORK.apply(jax.tree.map(lambda w: w[1], found.params), few.images)
    assert found.accuracy[1, -1] == pytest.approx(float((logits.argmax(1) == few.labels).mean()))


def test_one_program_serves_every_round_and_level(few):
    recipe = replace(QUICK, name="its own")
    pruned, retrained = retraining._prune._cache_size(), retraining._retrain._cache_size()
    retrain(few, [10, 20, 50], recipe=recipe, seeds=(0, 1, 2), scope="layer")
    retrain(few, [95, 95], recipe=recipe, seeds=(0, 1, 2), scope="layer")
    assert retraining._prune._cache_size() == pruned + 1
    assert retraining._retrain._cache_size() == retrained + 1


def test_seeds_together_are_the_seeds_alone(few):
    together = retrain(few, [50], seeds=(4, 5), recipe=replace(QUICK, keep=0.8))
    alone = retrain(few, [50], seeds=(5,), recipe=replace(QUICK, keep=0.8))
    for a, b in zip(*map(jax.tree.leaves, (together.params, alone.params)), strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=1e-4)


def test_dropout_and_seed_matter(few):
    plain, dropout, other = (
        retrain(few, [50], recipe=replace(QUICK, keep=keep), seeds=seeds).params["dense2"]["kernel"]
        for keep, seeds in ((1.0, (1,)), (0.5, (1,)), (1.0, (2,)))
    )
    assert not np.allclose(plain, dropout)
    assert not np.allclose(plain, other)


class Plain:
    """A network of one's own: it scales nothing, and knows nothing of dropout."""

    def apply(self, params, images):
        return images @ params["w"]


def retrain_plain(data, percents=(20,), weights=None, **options):
    weights = jnp.zeros((1, 784, 10)).at[:, ::2].set(0.01) if weights is None else weights
    options = dict(recipe=QUICK, criterion="magnitude", seeds=[0], test=data) | options
    test, recipe = options.pop("test"), options.pop("recipe")
    return retraining.prune_and_retrain(
        Plain(), {"w": weights}, data, test, percents, recipe, **options
    )


def test_any_network_can_be_retrained(few):
    """And sees whole numbers from 0 to 255 as fractions, as in every other pass."""
    fractions = few._replace(images=few.images / np.float32(255))
    found = retrain_plain(few, percents=(percent for percent in (20, 40)))
    expected = retrain_plain(fractions, percents=np.array([20, 40]))
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
    np.testing.assert_allclose(found.params["w"], expected.params["w"], atol=1e-5)
    assert found.loss[0, 1] < 3


def test_bad_input_to_any_network_is_refused(few):
    with pytest.raises(ValueError, match=r"network, recipe: .*no place for dropout"):
        retrain_plain(few, recipe=replace(QUICK, keep=0.5))
    without = models.Network([("dense1", partial(nnx.Linear, 784, 10))])
    start = jax.vmap(without.init)(jax.random.split(jax.random.key(0), 1))
    with pytest.raises(ValueError, match=r"network, recipe: .*no place for dropout"):
        retraining.prune_and_retrain(
            without, start, few, few, [5], replace(QUICK, keep=0.5), seeds=[0]
        )
    with pytest.raises(ValueError, match=r"params: expected a leading axis.*got lengths \[\(\)\]"):
        retrain_plain(few, weights=jnp.ones(()))
    for percents in ([None, 5], "90", 5j, ["5"]):
        with pytest.raises(ValueError, match="percent"):
            retrain_plain(few, percents=percents)
    padded = filled(Examples(few.images[:10], few.labels[:10]), 40)
    with pytest.raises(ValueError, match="train: 10 examples do not fill a batch of 16"):
        retrain_plain(padded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(percents=[]), "percents"),
        (dict(percents=[50, 40]), "percents: expected some, none lower than the one before"),
        (dict(percents=[101]), "percent: expected a number from 0 to 100"),
        (dict(criterion="luck"), "criterion: 'luck' is unknown"),
        (dict(scope="row"), "scope: 'row' is unknown"),
        (dict(seeds=(0,)), "params: expected a leading axis over the 1 seeds"),
        (dict(recipe=replace(QUICK, batch=999)), "train: 400 examples do not fill a batch of 999"),
        (dict(percents=[float("nan")]), "percent"),
        (dict(percents=[-5]), "percent"),
        (dict(percents=[0], scope="bogus"), "scope"),
        (dict(scored_on=-5), "scored_on"),
    ],
)
def test_bad_input_is_refused(few, change, message):
    good = dict(percents=[50], recipe=QUICK, seeds=(0, 1))
    with pytest.raises(ValueError, match=message):
        retraining.prune_and_retrain(NETWORK, starts((0, 1)), few, few, **good | change)


def test_scores_that_rank_nothing_are_refused(few):
    """A saturated network: no loss, no curvature, and a ranking would be the order of indices."""
    params = jax.tree.map(lambda leaf: 1e4 * leaf, starts((0, 1)))
    one = jax.tree.map(lambda leaf: leaf[0], params)
    sure = Examples(few.images, np.asarray(NETWORK.apply(one, few.images).argmax(1)))
    with pytest.raises(FloatingPointError, match=r"the obd scores before 50 %.*all exactly zero"):
        retraining.prune_and_retrain(NETWORK, params, sure, sure, [50], QUICK, seeds=(0, 1))


def test_divergence_is_an_error(few):
    with pytest.raises(FloatingPointError, match="the retrained parameters"):
        retrain(few, [10], recipe=replace(QUICK, learning_rate=1e38, steps=20))


# The experiments ---------------------------------------------------------------------------------


@pytest.fixture
def small(mnist, few, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path))
    monkeypatch.setitem(retraining.STARTS, "small", (lambda: NETWORK, QUICK, (0, 1)))
    return mnist._replace(train=few, test=few)


@pytest.mark.parametrize("one_shot", [False, True])
def test_an_experiment_is_kept_and_found_again(small, monkeypatch, one_shot):
    plan = retraining.Plan("small", "magnitude", one_shot=one_shot, steps=3, kept=(20, 8))
    first = retraining.experiment(plan, small)
    assert first.accuracy.shape == (2, 2)
    assert sum(first.left.values())[:, 1].tolist() == [COUNT - int(0.92 * COUNT)] * 2
    monkeypatch.setattr(retraining, "_run", None)  # from here on it must be fetched
    again = retraining.experiment(plan, small)
    np.testing.assert_allclose(again.loss, first.loss, atol=1e-6)
    np.testing.assert_array_equal(again.left["dense1/kernel"], first.left["dense1/kernel"])
    with pytest.raises(TypeError):  # any other plan is another experiment
        retraining.experiment(replace(plan, steps=4), small)
    other = Examples(small.test.images[::-1].copy(), small.test.labels)
    with pytest.raises(TypeError):  # and so is one that is tested on other examples
        retraining.experiment(plan, small._replace(test=other))


def test_one_shot_has_the_budget_of_the_loop(small, monkeypatch):
    asked = []
    whole = retraining.prune_and_retrain
    monkeypatch.setattr(
        retraining,
        "prune_and_retrain",
        lambda *a: asked.append(list(a[4])) or whole(*a),
    )
    plan = retraining.Plan("small", "magnitude", one_shot=True, steps=2, kept=(40, 12))
    retraining.experiment(plan, small)
    assert asked == [[60], [88, 88, 88]]


DAMAGE = {
    "truncated": lambda text, record: text[:100],
    "a number is NaN": lambda text, record: with_outcome(record, loss=[[float("nan")]] * 2),
    "a seed is missing": lambda text, record: with_outcome(record, accuracy=[[0.5]]),
    "a level too many": lambda text, record: with_outcome(record, before=[[0.5, 0.5]] * 2),
    "words": lambda text, record: with_outcome(record, loss=[["low"]] * 2),
    "uneven": lambda text, record: with_outcome(record, loss=[[0.5], []]),
    "nothing is left": lambda text, record: with_outcome(record, left={}),
    "a field too many": lambda text, record: with_outcome(record, more=[[0.5]] * 2),
    "a list": lambda text, record: json.dumps(record | {"outcome": [1]}),
    "a number alone": lambda text, record: with_outcome(record, loss=0.5),
    "an impossible accuracy": lambda text, record: with_outcome(record, accuracy=[[7.0]] * 2),
    "a negative loss": lambda text, record: with_outcome(record, loss=[[-0.1]] * 2),
    "less than none left": lambda text, record: with_outcome(record, left={"a": [[-3]] * 2}),
    "left without names": lambda text, record: with_outcome(record, left=[[3]] * 2),
    "left in fractions": lambda text, record: with_outcome(record, left={"a": [[0.5]] * 2}),
    "a dict for a curve": lambda text, record: with_outcome(record, loss={"a": [[0.5]] * 2}),
    "booleans": lambda text, record: with_outcome(record, before=[[True]] * 2),
}


def with_outcome(record, **changes):
    return json.dumps(record | {"outcome": record["outcome"] | changes})


@pytest.fixture(scope="module")
def computed_once():
    return []


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_outcome_is_run_again(small, tmp_path, damage, monkeypatch, computed_once):
    run = retraining._run

    def run_once(*arguments):
        if not computed_once:
            computed_once.append(run(*arguments))
        return computed_once[0]

    monkeypatch.setattr(retraining, "_run", run_once)
    plan = retraining.Plan("small", "magnitude", steps=3, kept=(50,))
    first = retraining.experiment(plan, small)
    file = tmp_path / "retraining" / f"{plan.name}.json"
    whole = file.read_text()
    file.write_text(DAMAGE[damage](whole, json.loads(whole)))
    with pytest.warns(UserWarning, match="is damaged"):
        again = retraining.experiment(plan, small)
    np.testing.assert_array_equal(again.accuracy, first.accuracy)
    assert file.read_text() == whole


def test_a_damaged_curve_is_not_fetched(tmp_path):
    """Those without retraining have one dict more, by the curve."""
    file = retraining.SHIPPED / f"{retraining.CURVES}.json"
    record = json.loads(file.read_text())
    one = next(iter(record["outcome"]["left"].values()))
    for left in (one, next(iter(one.values()))):
        (tmp_path / "curves").write_text(with_outcome(record, left=left))
        with pytest.warns(UserWarning, match=r"is damaged \(\['left'\]"):
            found = retraining._fetch(tmp_path / "curves", record["key"], retraining.CURVES_NAMES)
        assert found is None


@pytest.mark.parametrize("plan", retraining.plans(), ids=lambda plan: plan.name)
def test_the_shipped_outcomes_are_of_these_plans_and_exactly_as_sparse_as_asked(plan, mnist):
    outcome = retraining._load(
        retraining.SHIPPED / f"{plan.name}.json", retraining._key(plan, mnist)
    )
    assert outcome is not None, "run python -m prunelib.retraining"
    assert tuple(outcome.kept) == plan.kept
    one = retraining.STARTS[plan.start][0]().init(jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(one))
    for level, kept in enumerate(plan.kept):
        counts = jax.tree.leaves(pruning.counts(one, 100 - kept, plan.scope))
        gone = counts[0] if plan.scope == "all" else sum(counts)
        assert set(sum(outcome.left.values())[:, level].tolist()) == {total - gone}


@pytest.mark.parametrize("name", ["lenet300", "lenet5"])
def test_the_shipped_lenets_are_of_these_recipes(name, mnist):
    build, recipe, seeds = retraining.STARTS[name]
    folder, key = training.SHIPPED / name, training.run_key(build(), recipe, mnist.train, seeds)
    runs = training._load(folder, key, recipe, tuple(seeds))
    assert runs is not None, "run python -m prunelib.retraining"
    some = Examples(*(x[:1000] for x in mnist.test))
    for i in range(len(seeds)):
        assert pruning.evaluate(build(), runs.select(i), some, batch_size=500)[0] > 0.97


def test_the_shipped_curves_of_lenet5_are_exactly_as_sparse_as_asked(mnist):
    file = retraining.SHIPPED / f"{retraining.CURVES}.json"
    key = retraining._curves_key(mnist)
    assert retraining._fetch(file, key, retraining.CURVES_NAMES) is not None, "run make train"
    curves = retraining.lenet5_curves(mnist)
    assert curves["megabytes"] < 1500
    assert (curves["obd-all"] > 0.9).any()
    assert curves["left"]["obd-all"].keys() == curves["left"]["magnitude-layer"].keys()
    for name in ("magnitude-all", "obd-all", "subset-all"):
        left = sum(curves["left"][name].values())
        gone = [(100 - level) * 431_080 // 100 for level in retraining.CURVES_KEPT]
        assert (left == 431_080 - np.array(gone)).all()


def test_curves_without_retraining_are_kept_and_found_again(small, monkeypatch):
    monkeypatch.setitem(retraining.STARTS, "lenet5", (convolutional, QUICK, (0, 1)))
    monkeypatch.setattr(retraining, "CURVES_KEPT", (50, 10))
    monkeypatch.setattr(retraining, "SUBSET", 100)
    first = retraining.lenet5_curves(small)
    assert first["obd-all"].shape == first["subset-layer"].shape == (2, 2)
    assert sum(first["left"]["obd-all"].values())[0].tolist() == [1471, 295]
    monkeypatch.setattr(retraining, "_curves", None)  # from here on it must be fetched
    again = retraining.lenet5_curves(small)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), again, first)


# Convolutions as products ------------------------------------------------------------------------


def test_convolve_is_a_convolution():
    x = jax.random.normal(jax.random.key(0), (3, 9, 7, 2))
    kernel = jax.random.normal(jax.random.key(1), (4, 3, 2, 5))
    settings = dict(window_strides=(1, 1), padding="VALID")
    reference = partial(
        jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )
    ours = partial(models.convolve, **settings)
    np.testing.assert_allclose(ours(x, kernel), reference(x, kernel), rtol=1e-4, atol=1e-4)
    slopes = [jax.grad(lambda k, f=f: (f(x, k) ** 2).sum())(kernel) for f in (ours, reference)]
    np.testing.assert_allclose(*slopes, rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match="only steps of 1"):
        models.convolve(x, kernel, (2, 2), "VALID")
