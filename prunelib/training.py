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

from prunelib import checks
from prunelib.data import Examples, collected, scaled
from prunelib.passes import cross_entropy, forward

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, on shuffled batches.

    Attributes
    ----------
    steps : int
        Optimizer steps, of `batch` examples each.
    learning_rate : float
    optimizer : {"adam", "adamw", "sgd"}
    momentum : float
        Of SGD.
    weight_decay : float
        AdamW: decoupled. Adam and SGD: added to the gradient, times the weight.
    eps : float
        Adam's and AdamW's: added to the root of the mean squared gradient.
    decay : bool
        Whether the learning rate falls to zero along a cosine; else it is constant.
    keep : float
        The probability that dropout keeps a hidden activation; 1 is no dropout.
    std : float or None
        Weights and biases start as truncated normals (cut at two standard deviations) of this
        standard deviation; None leaves the start to the network.
    summed : bool
        Whether a batch's loss is the sum over its examples (as in 2016) or their mean.
    held_out : int
        How many training examples, the last ones, are left out (2016: 5,000).

    Raises
    ------
    ValueError
        When it is made, if a number makes no sense or the optimizer is unknown.
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
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        checks.whole("steps", self.steps)
        checks.whole("batch", self.batch)
        checks.whole("held_out", self.held_out, least=0)
        good = {
            "learning_rate > 0": 0 < self.learning_rate < np.inf,
            "0 <= momentum < 1": 0 <= self.momentum < 1,
            "weight_decay >= 0": 0 <= self.weight_decay < np.inf,
            "eps > 0": 0 < self.eps < np.inf,
            "0 < keep <= 1": 0 < self.keep <= 1,
            "std > 0, or None": self.std is None or 0 < self.std < np.inf,
        }
        if wrong := [rule for rule, holds in good.items() if not holds]:
            raise ValueError(f"recipe: expected {', '.join(wrong)}; got {self}")

    def transformation(self) -> optax.GradientTransformation:
        """The Optax optimizer of this recipe."""
        rate = self.learning_rate
        rate = optax.cosine_decay_schedule(rate, self.steps) if self.decay else rate
        if self.optimizer == "adamw":
            return optax.adamw(rate, eps=self.eps, weight_decay=self.weight_decay)
        plain = (
            optax.sgd(rate, momentum=self.momentum or None)
            if self.optimizer == "sgd"
            else optax.adam(rate, eps=self.eps)
        )
        if not self.weight_decay:
            return plain
        return optax.chain(optax.add_decayed_weights(self.weight_decay), plain)


@dataclass(frozen=True)
class Runs:
    """Networks trained by one recipe from several seeds.

    Attributes
    ----------
    recipe : Recipe
    seeds : tuple of int
    params : pytree
        Shaped like the network's params, with a leading axis over seeds.
    history : DataFrame
        One row a seed and point: `seed`, `step`, `loss` (mean over the batches since the last
        point, in nats) and `accuracy` (likewise, a fraction), both with dropout on.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    params: Any
    history: pd.DataFrame

    def select(self, index: int) -> Any:
        """The params of the run at place `index` (0 is the first seed)."""
        if not 0 <= index < len(self.seeds):
            raise IndexError(
                f"index: expected 0 to {len(self.seeds) - 1}, got {index}; "
                f"it is a place in seeds = {self.seeds}"
            )
        return _take(self.params, index)

    def map(self, function: Callable[[Any], Any]) -> Any:
        """``function(params)`` of each run: tables under each other, with a column `seed`; else
        pytrees stacked along a new leading axis.
        """
        found = [function(self.select(i)) for i in range(len(self.seeds))]
        if isinstance(found[0], pd.DataFrame):
            with_seed = [t.assign(seed=s) for t, s in zip(found, self.seeds, strict=True)]
            return pd.concat(with_seed, ignore_index=True)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


@jax.jit
def _take(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def train(network, recipe: Recipe, examples: Examples, seeds: Sequence[int] = range(5)) -> Runs:
    """Train one network for each seed.

    Parameters
    ----------
    network
        With ``init(key) -> params`` and ``apply(params, images) -> logits``; for a recipe with
        dropout, ``apply(params, images, keep=..., key=...)``, as a `models.Network` has.
    recipe : Recipe
    examples : Examples
        Wherever they are: what counts is their numbers. Training runs on JAX's default device,
        with all images in its memory.
    seeds : sequence of int
        One network each: for its start, the order of its examples, and dropout.

    Raises
    ------
    ValueError, TypeError
        If there are fewer examples than a batch holds, seeds are none, or the recipe asks for
        dropout and the network has no place for it; see also `passes.forward`.
    FloatingPointError
        If the training diverged.
    """
    seeds = checks.seeds(seeds)
    if not callable(getattr(network, "init", None)):
        raise TypeError(
            f"network: expected init(key) and apply(params, images), got {type(network).__name__} "
            "without init; give it one, or start from your params with training.fit"
        )
    used = collected(examples)
    used = used.first(len(used.labels) - recipe.held_out)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    starts, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    start = jax.vmap(partial(_start, network, recipe.std))(starts)
    params, loss, accuracy = fit(network, recipe, start, used, keys)
    points = loss.shape[1]
    history = pd.DataFrame(
        {
            "seed": np.repeat(seeds, points),
            "step": np.tile(np.arange(1, points + 1) * (recipe.steps // points), len(seeds)),
            "loss": loss.ravel(),
            "accuracy": accuracy.ravel(),
        }
    )
    return Runs(recipe, seeds, params, history)


def _start(network, std, key):
    params = network.init(key)
    if std is None:
        return params
    leaves, structure = jax.tree.flatten(params)
    normal = jax.nn.initializers.truncated_normal(std)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


def fit(
    network,
    recipe: Recipe,
    params: Any,
    examples: Examples,
    keys: jax.Array,
    after: Callable[[Any], optax.GradientTransformation] | None = None,
    given: Any = None,
) -> tuple[Any, np.ndarray, np.ndarray]:
    """Go on from `params` by a recipe, for all seeds together: what `train` and retraining share.

    Parameters
    ----------
    params : pytree ``[seeds, ...]``
    keys : array of keys ``[seeds]``
        For the order of the examples, and dropout.
    after, given : function and pytree ``[seeds, ...]``, optional
        ``after(given of a seed)`` is an Optax transformation to follow the recipe's own.

    Returns
    -------
    params : pytree ``[seeds, ...]``
    loss, accuracy : arrays ``[seeds, points]``
        Means over the batches since the last point, in nats and as a fraction.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        As `train`.
    """
    one = jax.tree.map(lambda leaf: leaf[0], params)
    forward(network, one, examples)
    count = len(examples.labels)
    if count < recipe.batch:
        raise ValueError(
            f"examples: {count} do not fill a batch of {recipe.batch}; pass more, or a recipe "
            "with a smaller batch or less held out"
        )
    apply, dropout = checks.network(network), recipe.keep < 1
    if dropout:
        _check_dropout(apply, one, examples, recipe)
    interval = next(
        k for k in range(max(1, recipe.steps // 50), recipe.steps + 1) if recipe.steps % k == 0
    )
    images, labels = jnp.asarray(examples.images), jnp.asarray(examples.labels, jnp.int32)

    def of_one(params, key, given, images, labels):
        optimizer = recipe.transformation()
        if after is not None:
            optimizer = optax.chain(optimizer, after(given))
        order, noise = jax.random.split(key)
        epochs = jax.random.split(order, -(-recipe.steps * recipe.batch // count))
        shuffled = jax.vmap(lambda k: jax.random.permutation(k, count))(epochs)
        batches = shuffled.ravel()[: recipe.steps * recipe.batch].reshape(recipe.steps, -1)

        def step(state, scanned):
            params, moments = state
            batch, number = scanned

            def objective(params):
                options = {}  # without dropout, apply need not know of it
                if dropout:
                    options = {"keep": recipe.keep, "key": jax.random.fold_in(noise, number)}
                logits = apply(params, scaled(images[batch]), **options)
                losses = cross_entropy(logits.astype(jnp.float32), labels[batch])
                total = losses.sum() if recipe.summed else losses.mean()
                return total, (losses.mean(), (logits.argmax(1) == labels[batch]).mean())

            gradient, metrics = jax.grad(objective, has_aux=True)(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), metrics

        def between_points(state, scanned):
            state, metrics = jax.lax.scan(step, state, scanned)
            return state, jax.tree.map(jnp.mean, metrics)

        scanned = batches, jnp.arange(recipe.steps)
        scanned = jax.tree.map(lambda x: x.reshape(-1, interval, *x.shape[1:]), scanned)
        state = (params, optimizer.init(params))
        (params, _), metrics = jax.lax.scan(between_points, state, scanned)
        return params, metrics

    # Compiled anew for each call: nothing that a reader's network reads can have gone stale.
    together = jax.jit(jax.vmap(of_one, in_axes=(0, 0, 0, None, None)))
    params, (loss, accuracy) = together(params, keys, given, images, labels)
    checks.finite("training: the loss", loss)
    checks.finite("training: the parameters", params)
    return params, np.asarray(loss), np.asarray(accuracy)


def _check_dropout(apply, params, examples, recipe) -> None:
    """Raise ValueError unless the network's outputs depend on dropout."""

    def spread(keep):
        images = scaled(jnp.asarray(examples.images[:16]))
        keys = jax.random.split(jax.random.key(0), 2)
        return jax.vmap(lambda key: apply(params, images, keep=keep, key=key))(keys)

    try:
        one, two = spread(recipe.keep)
    except TypeError:
        one = two = None
    if one is None or bool((one == two).all()):
        raise ValueError(
            f"network, recipe: keep={recipe.keep} asks for dropout, but the network has no place "
            "for it; put models.dropout_here among its layers (or give apply keep and key), or "
            "use a recipe with keep=1"
        )


