"""Recipes, and training all seeds of a recipe together in one compiled scan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax.sharding import NamedSharding, PartitionSpec

from prunelib import checks, data
from prunelib.checks import require
from prunelib.data import Examples, collected, scaled
from prunelib.passes import cross_entropy, forward


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, on shuffled batches; ValueError for numbers that make no sense.

    optimizer : "adam", "adamw" or "sgd"; momentum is SGD's, eps that of the other two
    weight_decay : decoupled for AdamW; else added to the gradient, times the weight
    decay : whether the learning rate falls to zero along a cosine; else it is constant
    keep : the probability that dropout keeps a hidden activation; 1 is no dropout
    std : weights and biases start as normals of this standard deviation, cut at two of them; None
        leaves the start to the network
    summed : whether a batch's loss is the sum over its examples (as in 2016) or their mean
    held_out : how many training examples, the last ones, are left out (2016: 5,000)
    """

    steps: int
    batch: int = 64
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-8
    decay: bool = True
    keep: float = 1.0
    std: float | None = None
    summed: bool = False
    held_out: int = 0

    def __post_init__(self):
        checks.one_of("optimizer", self.optimizer, ("adam", "adamw", "sgd"))
        for name, least in (("steps", 1), ("batch", 1), ("held_out", 0)):
            checks.whole(name, getattr(self, name), least)
        positive = self.learning_rate, self.eps, 1.0 if self.std is None else self.std
        good = all(0 < x < np.inf for x in positive) and 0 <= self.weight_decay < np.inf
        require(good and 0 <= self.momentum < 1 and 0 < self.keep <= 1, "recipe: expected "
                "learning_rate, eps, std > 0, weight_decay >= 0, 0 <= momentum < 1, 0 < keep <= 1, "
                f"got {self}")  # fmt: skip

    def transformation(self) -> optax.GradientTransformation:
        """The Optax optimizer of this recipe."""
        rate = self.learning_rate
        rate = optax.cosine_decay_schedule(rate, self.steps) if self.decay else rate
        if self.optimizer == "adamw":
            return optax.adamw(rate, eps=self.eps, weight_decay=self.weight_decay)
        sgd, adam = optax.sgd(rate, self.momentum or None), optax.adam(rate, eps=self.eps)
        plain = sgd if self.optimizer == "sgd" else adam
        decay = optax.add_decayed_weights(self.weight_decay)
        return optax.chain(decay, plain) if self.weight_decay else plain


@dataclass(frozen=True)
class Runs:
    """Networks trained by one recipe from several seeds; `params` have a leading axis over seeds.

    history : DataFrame, one row a seed and point: `seed`, `step`, `loss` (mean over the batches
        since the last point, in nats) and `accuracy` (a fraction), both with dropout on
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    params: Any
    history: pd.DataFrame

    def select(self, index: int) -> Any:
        """The params of the run at place `index` (0 is the first seed)."""
        good = 0 <= index < len(self.seeds)
        require(good, f"index: expected a place in seeds = {self.seeds}, got {index}", IndexError)
        return jax.tree.map(lambda leaf: leaf[index], self.params)

    def map(self, function: Callable[[Any], Any]) -> Any:
        """``function(params)`` of each run: pytrees stacked, tables joined with a column `seed`."""
        found = [function(self.select(i)) for i in range(len(self.seeds))]
        if not isinstance(found[0], pd.DataFrame):
            return jax.tree.map(lambda *leaves: np.stack(leaves), *found)
        tables = [t.assign(seed=s) for t, s in zip(found, self.seeds, strict=True)]
        return pd.concat(tables, ignore_index=True)


def train(network, recipe: Recipe, examples: Examples, seeds: Sequence[int] = range(5)) -> Runs:
    """Train one network for each seed: for its start, the order of its examples, and dropout.

    The network has ``init(key) -> params`` and ``apply(params, images) -> logits``; for a recipe
    with dropout, ``apply(params, images, keep=..., key=...)``. Errors are those of `trainer`.
    """
    seeds = checks.seeds(seeds)
    require(hasattr(network, "init"), "network: it has no init(key) -> params; give it one, or "
            "start from params of your own with training.trainer", TypeError)  # fmt: skip
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    starts, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    start = jax.vmap(partial(_start, network, recipe.std))(starts)
    go_on = trainer(network, recipe, start, examples)
    params, loss, accuracy = go_on(start, keys)
    divisors = range(max(1, recipe.steps // 50), recipe.steps + 1)
    every = next(k for k in divisors if recipe.steps % k == 0)  # some fifty points
    steps = np.arange(every, recipe.steps + 1, every)
    history = {"seed": np.repeat(seeds, len(steps)), "step": np.tile(steps, len(seeds))}
    for name, values in (("loss", loss), ("accuracy", accuracy)):
        history[name] = values.reshape(-1, every).mean(1)
    return Runs(recipe, seeds, params, pd.DataFrame(history))

def _start(network, std, key):
    params = network.init(key)
    if std is None:
        return params
    leaves, structure = jax.tree.flatten(params)
    keys = structure.unflatten(jax.random.split(key, len(leaves)))
    normal = jax.nn.initializers.truncated_normal(std)
    return jax.tree.map(lambda w, key: normal(key, w.shape), params, keys)


def trainer(
    network, recipe: Recipe, params: Any, examples: Examples,
    after: Callable[[Any], optax.GradientTransformation] | None = None,
) -> Callable:  # fmt: skip
    """What goes on from params like `params` ``[seeds, ...]`` by a recipe, all seeds together.

    Returns a function ``(params, keys, given=None) -> params, losses, accuracies``: of each seed a
    key, for the order of its examples and dropout, and of each batch the mean loss (nats) and the
    accuracy (a fraction) ``[seeds, steps]``. With `after`, the transformation ``after(given of a
    seed)`` comes after the recipe's own. It is compiled once, at its first call. Examples that
    `data.place` spread over a mesh stay where they are, and each batch is spread too.

    Raises ValueError or TypeError for fewer examples than a batch, dropout that the network has no
    place for, and what `passes.forward` refuses; the function, FloatingPointError if training
    diverged.
    """
    one = jax.tree.map(lambda w: w[0], params)
    forward(network, one, examples)
    mesh = jax.typeof(examples.images).sharding.mesh  # an empty one, but after `data.place`
    examples = examples if mesh.size > 1 else collected(examples)
    count = data.count(examples) - recipe.held_out  # what fills up a mesh stands last
    apply, dropout = checks.network(network), recipe.keep < 1
    require(count >= recipe.batch, f"examples: {count} do not fill a batch of {recipe.batch}")
    if dropout:
        _check_dropout(apply, one, examples, recipe)
    images, labels = jnp.asarray(examples.images), jnp.asarray(examples.labels, jnp.int32)

    def of_one(params, key, given, images, labels):
        optimizer = optax.chain(recipe.transformation(), *([after(given)] if after else []))
        order, noise = jax.random.split(key)
        epochs = jax.random.split(order, -(-recipe.steps * recipe.batch // count))
        shuffled = jax.vmap(lambda k: jax.random.permutation(k, count))(epochs)
        batches = shuffled.ravel()[: recipe.steps * recipe.batch].reshape(recipe.steps, -1)

        def step(state, scanned):
            (params, moments), (places, number) = state, scanned
            options = {"keep": recipe.keep, "key": jax.random.fold_in(noise, number)}
            batch = images[places], labels[places]
            if mesh.size > 1:
                sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
                batch = jax.lax.with_sharding_constraint(batch, sharding)

            def objective(params):  # without dropout, apply need not know of it
                logits = apply(params, scaled(batch[0]), **(options if dropout else {}))
                losses = cross_entropy(logits.astype(jnp.float32), batch[1])
                total = losses.sum() if recipe.summed else losses.mean()
                return total, (losses.mean(), (logits.argmax(1) == batch[1]).mean())

            gradient, metrics = jax.grad(objective, has_aux=True)(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), metrics

        state = (params, optimizer.init(params))
        (params, _), metrics = jax.lax.scan(step, state, (batches, jnp.arange(recipe.steps)))
        return params, metrics

    # A new function at each call: nothing that a reader's network reads can have gone stale.
    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh.size > 1 else None
    together = jax.jit(jax.vmap(of_one, in_axes=(0, 0, 0, None, None)), out_shardings=everywhere)

    def go_on(params, keys, given=None):
        params, (loss, accuracy) = together(params, keys, given, images, labels)
        checks.finite("training", {"loss": loss, "params": params})
        return params, np.asarray(loss), np.asarray(accuracy)

    return go_on

def _check_dropout(apply, params, examples, recipe) -> None:
    """Raise ValueError unless the network's outputs depend on the key of dropout."""
    images = scaled(jnp.asarray(examples.images[:16]))
    try:
        one, two = (apply(params, images, keep=recipe.keep, key=jax.random.key(i)) for i in (0, 1))
    except TypeError:
        one = two = jnp.zeros(1)
    require((one != two).any(), f"network, recipe: keep={recipe.keep}, but there is no place for "
            "dropout; put models.dropout_here among its layers (or give apply keep and key), "
            "or use a recipe with keep=1")  # fmt: skip
