"""Pruning with retraining: the loop of the OBD paper, and masks that no optimizer undoes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from prunelib import checks, pruning
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples, collected
from prunelib.training import Recipe, fit


def keep_pruned(kept: Any) -> optax.GradientTransformation:
    """Hold pruned parameters at exactly zero, whatever the optimizer wants.

    To be put *after* the optimizer: it replaces the update of each pruned parameter by ``-w``, so
    that no momentum, which still moves a parameter whose gradient is zero, revives anything.

    Parameters
    ----------
    kept : pytree of bool
        Shaped like params, False = pruned; wrappers, such as Flax's Variables, may differ.

    Raises
    ------
    TypeError, ValueError
        If `kept` holds anything but booleans; at `update`, if it is given no params, or `kept` is
        not shaped like them.

    Examples
    --------
    >>> import jax.numpy as jnp, optax
    >>> optimizer = optax.chain(optax.adam(0.1), keep_pruned(jnp.array([True, False])))
    >>> params = jnp.array([1.0, 0.0])
    >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
    >>> optax.apply_updates(params, updates).tolist()[1]
    0.0
    """
    checks.booleans(kept)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: keep_pruned needs them; call update(gradient, state, params)")
        mask = checks.like("kept", kept, "updates", updates)
        params = checks.like("params", params, "updates", updates)
        return jax.tree.map(lambda k, u, w: jnp.where(k, u, -w), mask, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _obd(network, params, examples, key):
    return pruning.obd_saliency(params, hessian_diagonal(network, params, examples))


CRITERIA = {
    "magnitude": lambda network, params, examples, key: pruning.magnitude(params),
    "obd": _obd,
    "random": lambda network, params, examples, key: pruning.random_scores(key, params),
}


class Retrained(NamedTuple):
    """What `prune_and_retrain` went through, for each seed and round.

    Attributes
    ----------
    table : DataFrame
        One row a seed and round: `seed`, `round`, `percent` pruned, `remaining`, `before` (the
        accuracy after pruning and before retraining), `accuracy` and `loss` after it.
    kept : pytree of bool [rounds, seeds, ...]
    params : pytree [seeds, ...]
        After the last round.
    """

    table: pd.DataFrame
    kept: Any
    params: Any


def prune_and_retrain(
    network,
    params: Any,
    train: Examples,
    test: Examples,
    percents: Sequence[float],
    recipe: Recipe,
    criterion: str | Callable = "obd",
    scope: str = "all",
    seeds: Sequence[int] = range(5),
    scored_on: int | None = None,
) -> Retrained:
    """Prune, retrain under the mask, repeat: the procedure of the OBD paper (1990), section 2.

    In each round the parameters are scored and ranked, the lowest go, and the rest is retrained
    for ``recipe.steps`` steps with a fresh optimizer. What is pruned stays pruned. A round that
    asks for no more than the round before only retrains, so ``[90] * 5`` is one-shot pruning with
    the retraining budget of five rounds.

    Parameters
    ----------
    network
        As for `training.fit`.
    params : pytree ``[seeds, ...]``
        Trained networks, one for each seed, as in `training.Runs`.
    percents : sequence of numbers
        Percent pruned after each round, never falling.
    recipe : Recipe
        How a round retrains; its `std` and `held_out` are not used.
    criterion : {"magnitude", "obd", "random"} or function
        ``(network, params, examples, key) -> scores``, shaped like the params.
    scope : {"all", "layer"}
        See `pruning.ranks`.
    seeds : sequence of int
        For the order of the examples, dropout, and random scores.
    scored_on : int, optional
        How many training examples, the first ones, the criterion sees; by default all.

    Raises
    ------
    ValueError, TypeError
        If `percents` falls or is empty, `criterion` or `scope` is unknown, or the leading axis of
        `params` is not as long as `seeds`; see also `training.fit`.
    FloatingPointError
        If retraining diverged, or scores are not finite.
    """
    seeds, percents = checks.seeds(seeds), list(percents)
    if not callable(criterion):
        checks.one_of("criterion", criterion, CRITERIA)
    score = criterion if callable(criterion) else CRITERIA[criterion]
    checks.one_of("scope", scope, pruning.SCOPES)
    if not percents or percents != sorted(percents):
        raise ValueError(f"percents: expected some, none lower than the last, got {percents}")
    for percent in percents:
        checks.percent(percent)
    checks.params(params)
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if lengths != {(len(seeds),)}:
        raise ValueError(
            f"params: expected a leading axis over the {len(seeds)} seeds, got lengths "
            f"{sorted(lengths)}; pass runs.params and seeds=runs.seeds"
        )
    if scored_on is not None:
        checks.whole("scored_on", scored_on)
    train = jax.tree.map(jnp.asarray, collected(train))
    scored = train if scored_on is None else train.first(scored_on)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    kept = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    rows, masks, last = [], [], 0
    for number, percent in enumerate(percents):
        if percent > last:
            fresh = jax.vmap(partial(jax.random.fold_in, data=2 * number))(keys)
            kept = _each(
                lambda w, k, key: _prune(score(network, w, scored, key), k, percent, scope),
                params,
                kept,
                fresh,
            )
            params, last = pruning.masked(params, kept), percent
        before = _each(lambda w: pruning.evaluate(network, w, test), params)
        fresh = jax.vmap(partial(jax.random.fold_in, data=2 * number + 1))(keys)
        params, _, _ = fit(network, recipe, params, train, fresh, keep_pruned, kept)
        after = _each(lambda w: pruning.evaluate(network, w, test), params)
        for i, seed in enumerate(seeds):
            row = {"seed": seed, "round": number + 1, "percent": percent}
            row |= {"remaining": 100 - percent, "before": before.accuracy[i]}
            rows.append(row | {"accuracy": after.accuracy[i], "loss": after.loss[i]})
        masks.append(jax.tree.map(np.asarray, kept))
    table = pd.DataFrame(rows)
    return Retrained(table, jax.tree.map(lambda *each: np.stack(each), *masks), params)


def _each(function, *trees):
    """``function`` of one seed after the other, stacked: a pass over the data fills memory."""
    number = len(jax.tree.leaves(trees)[0])
    found = [function(*jax.tree.map(lambda leaf: leaf[i], trees)) for i in range(number)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def _prune(scores, kept, percent, scope):
    """A new mask; what is pruned already goes first, and so stays pruned."""
    checks.scores(scores)
    scores = jax.tree.map(lambda s, k: jnp.where(k, s, -jnp.inf), scores, kept)
    below = pruning.limits(scores, percent, scope)
    return jax.tree.map(jnp.greater_equal, pruning.places(scores, scope), below)
