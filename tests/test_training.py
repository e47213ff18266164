"""Training: every optimizer against a loop by hand, the keys' order, dropout, the history."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx
from reference import flat

from prunelib import data, experiments, models, passes, pruning, training
from prunelib.data import Examples
from prunelib.training import Recipe, train

NETWORK = models.mlp((16, 12, 3))
RECIPE = Recipe(steps=60, batch=16, learning_rate=1e-2)
GENERATOR = np.random.default_rng(0)
LABELS = GENERATOR.integers(0, 3, 160).astype(np.int32)
# Three classes that can be told apart: a bright third of the picture each.
BRIGHT = np.repeat(np.eye(3), [5, 5, 6], axis=1)[LABELS]
IMAGES = (60 * GENERATOR.random((160, 16)) + 120 * BRIGHT).astype(np.uint8)
EXAMPLES = Examples(IMAGES, LABELS)
SEEDS = (0, 1)


def run(recipe=RECIPE, examples=EXAMPLES, seeds=SEEDS, network=NETWORK):
    return train(network, recipe, examples, seeds)


@pytest.fixture(scope="module")
def reference():
    return run()


def losses(runs):
    return runs.history.pivot(index="seed", columns="step", values="loss").to_numpy()


def assert_same(one, two):
    np.testing.assert_array_equal(flat(one.params), flat(two.params))
    pd.testing.assert_frame_equal(one.history, two.history)


def test_a_shipped_run_is_made_again_from_its_seeds():
    """The 200 steps of "plain_hundredth", with the start, order and keys that it was made with.

    Tolerance: other processors, and other sums, differ by some 1e-4 after 200 steps; another order
    of the random keys makes another network.
    """
    shipped = experiments.trained("plain_hundredth")
    found = train(models.mlp(), shipped.recipe, data.load_mnist().train, range(2))
    expected = shipped.history[shipped.history.seed < 2]
    assert found.history.step.tolist() == expected.step.tolist()
    np.testing.assert_allclose(found.history.loss, expected.loss, atol=2e-3)
    np.testing.assert_allclose(found.history.accuracy, expected.accuracy, atol=0.02)
    for seed in range(2):
        one, two = flat(found.select(seed)), flat(shipped.select(seed))
        assert np.abs(one - two).max() < 2e-3
    assert np.abs(one - flat(found.select(0))).max() > 0.1


# Optimizers: the same steps in a plain loop ------------------------------------------------------

SHORT = replace(RECIPE, steps=12)
SGD = replace(SHORT, optimizer="sgd", learning_rate=0.1)
COSINE = optax.cosine_decay_schedule(1e-2, 12)
FASTER = optax.cosine_decay_schedule(0.1, 12)
ADAM = optax.chain(optax.scale_by_adam(0.9, 0.999, 1e-8), optax.scale_by_learning_rate(COSINE))
# A recipe, and what it means.
RECIPES = {
    "adam": (SHORT, ADAM),
    "constant rate": (replace(SHORT, decay=False), optax.adam(1e-2)),
    "summed": (replace(SHORT, summed=True, eps=1e-3), optax.adam(COSINE, eps=1e-3)),
    "weights decay": (
        replace(SHORT, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), ADAM),
    ),
    "adamw": (
        replace(SHORT, optimizer="adamw", weight_decay=0.5, eps=1e-2),
        optax.chain(
            optax.scale_by_adam(0.9, 0.999, 1e-2),
            optax.add_decayed_weights(0.5),
            optax.scale_by_learning_rate(COSINE),
        ),
    ),
    "sgd": (SGD, optax.scale_by_learning_rate(FASTER)),
    "momentum": (
        replace(SGD, momentum=0.9, weight_decay=0.1),
        optax.chain(
            optax.add_decayed_weights(0.1),
            optax.trace(0.9),
            optax.scale_by_learning_rate(FASTER),
        ),
    ),
    "dropout": (replace(SHORT, keep=0.5), ADAM),
    "narrow start": (replace(SHORT, std=0.02), ADAM),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_against_a_plain_loop(name):
    """Batch after batch, in the order that the keys of the seed give."""
    recipe, optimizer = RECIPES[name]
    begin, key = jax.random.split(jax.random.key(5))
    params = started(recipe, 5) if recipe.std else NETWORK.init(begin)
    state = optimizer.init(params)
    order, noise = jax.random.split(key)
    epochs = jax.random.split(order, -(-recipe.steps * recipe.batch // 160))
    order = jnp.concatenate([jax.random.permutation(k, 160) for k in epochs])

    @jax.jit
    def gradient(params, batch, key):
        def loss(params):
            options = {"keep": recipe.keep, "key": key} if recipe.keep < 1 else {}
            logits = NETWORK.apply(params, jnp.asarray(IMAGES)[batch], **options)
            found = passes.cross_entropy(logits, jnp.asarray(LABELS)[batch])
            return found.sum() if recipe.summed else found.mean()

        return jax.grad(loss)(params)

    for step in range(recipe.steps):
        batch = order[step * recipe.batch : (step + 1) * recipe.batch]
        found = gradient(params, batch, jax.random.fold_in(noise, step))
        updates, state = optimizer.update(found, state, params)
        params = optax.apply_updates(params, updates)
    found = run(recipe, seeds=[5]).select(0)
    np.testing.assert_allclose(flat(found), flat(params), atol=2e-4)


def started(recipe, seed):
    """Where a run begins: after one step at a rate of almost nothing."""
    still = replace(recipe, steps=1, learning_rate=1e-20, weight_decay=0.0, momentum=0.0)
    return run(still, seeds=[seed]).select(0)


def test_recipes_start_as_they_say():
    key = jax.random.split(jax.random.key(3))[0]
    np.testing.assert_allclose(flat(started(RECIPE, 3)), flat(NETWORK.init(key)), atol=1e-19)
    normal = started(replace(RECIPE, std=0.02), 3)
    for leaf in jax.tree.leaves(normal):  # biases too, cut at two standard deviations
        assert 0 < np.abs(leaf).max() <= 0.04
    assert np.std(flat(normal)) == pytest.approx(0.02 * 0.8796, rel=0.1)


# What training does ------------------------------------------------------------------------------


def test_training_learns_and_is_deterministic(reference):
    assert_same(run(), reference)
    assert losses(reference)[:, 0].min() > 0.5
    for params in map(reference.select, range(2)):
        accuracy, loss = pruning.evaluate(NETWORK, params, EXAMPLES)
        assert accuracy > 0.95
        assert loss < 0.3


def test_history_has_one_point_for_each_interval(reference):
    assert list(reference.history) == ["seed", "step", "loss", "accuracy"]
    assert reference.history.seed.tolist() == [0] * 60 + [1] * 60
    assert reference.history.step.tolist() == [*range(1, 61)] * 2
    for steps, points in ((200, range(4, 201, 4)), (7, range(1, 8)), (101, [101])):
        assert run(replace(RECIPE, steps=steps), seeds=[0]).history.step.tolist() == list(points)


def test_seeds_together_are_seeds_alone(reference):
    """To 1e-4 after 60 steps: sums of other shapes round otherwise."""
    for place, seed in enumerate(SEEDS):
        alone = run(seeds=[seed])
        np.testing.assert_allclose(flat(alone.params), flat(reference.select(place)), atol=1e-4)
    assert np.abs(flat(reference.select(0)) - flat(reference.select(1))).max() > 0.1


def test_held_out_examples_are_not_seen():
    recipe = replace(RECIPE, held_out=40)
    other = Examples(IMAGES.copy(), LABELS.copy())
    other.images[120:], other.labels[120:] = 255, 0
    assert_same(run(recipe), run(recipe, other))
    other.labels[:120] = (other.labels[:120] + 1) % 3
    assert np.abs(losses(run(recipe)) - losses(run(recipe, other))).max() > 0.1


def test_each_epoch_sees_each_example_once():
    """With a rate of almost zero, an epoch's mean loss is that of all examples at the start."""
    found = run(replace(RECIPE, steps=10, learning_rate=1e-12, decay=False))
    for place, mean in enumerate(losses(found).mean(1)):
        expected = pruning.evaluate(NETWORK, found.select(place), EXAMPLES).loss
        assert mean == pytest.approx(expected, rel=1e-5)


def test_data_may_be_anywhere(reference):
    """NumPy, on a device, spread over eight, or with wider labels: the same run."""
    for examples in (
        jax.device_put(EXAMPLES, jax.devices()[-1]),
        data.filled(EXAMPLES, 170),
        Examples(IMAGES, LABELS.astype(np.int64)),
    ):
        assert_same(run(examples=examples), reference)
    spread = run(examples=data.place(EXAMPLES))  # sums in another order
    np.testing.assert_allclose(losses(spread), losses(reference), rtol=1e-4)


def test_what_fills_up_is_not_trained_on():
    """By `trainer` itself too, and whatever place it has."""
    start = jax.tree.map(lambda w: w[None], NETWORK.init(jax.random.key(0)))
    keys, recipe = jax.random.split(jax.random.key(1), 1), replace(RECIPE, steps=9)
    real = np.arange(2 * len(LABELS)) % 2 == 0
    mixed = Examples(np.repeat(IMAGES, 2, 0), np.repeat(LABELS, 2), real)
    for examples in (data.filled(EXAMPLES, 500), mixed):
        one, two = (training.trainer(NETWORK, recipe, start, e) for e in (EXAMPLES, examples))
        np.testing.assert_array_equal(one(start, keys)[1], two(start, keys)[1])


class Own:
    """A network of one's own: no layers, and nothing of dropout."""

    def init(self, key):
        return {"w": 0.1 * jax.random.normal(key, (16, 3))}

    def apply(self, params, images):
        return images @ params["w"]


def test_any_network_can_be_trained():
    """And sees whole numbers from 0 to 255 as fractions, as in every other pass."""
    one, two = (run(examples=Examples(x, LABELS), network=Own()) for x in (IMAGES, IMAGES / 255.0))
    np.testing.assert_allclose(flat(one.params), flat(two.params), atol=1e-5)
    assert pruning.evaluate(Own(), one.select(0), EXAMPLES).accuracy > 0.9
    layers = [("dense1", partial(nnx.Linear, 16, 12)), jax.nn.relu]
    layers = models.Network([*layers, ("dense2", partial(nnx.Linear, 12, 3))])
    for network in (Own(), layers):
        with pytest.raises(ValueError, match="no place"):
            run(replace(RECIPE, keep=0.5), network=network)


def test_map_stacks_or_joins(reference):
    found = reference.map(lambda params: pruning.magnitude(params))
    np.testing.assert_array_equal(flat(found), np.abs(flat(reference.params)))
    measure = reference.map(lambda params: pruning.evaluate(NETWORK, params, EXAMPLES))
    assert measure.accuracy.shape == measure.loss.shape == (2,)
    table = reference.map(
        lambda p: pruning.accuracy_curve(NETWORK, p, pruning.magnitude(p), EXAMPLES, [0, 50])
    )
    assert table.seed.tolist() == [0, 0, 1, 1]
    assert table.accuracy[[0, 2]].tolist() == measure.accuracy.tolist()
