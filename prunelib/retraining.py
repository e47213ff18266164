"""Pruning with retraining: the loop of the OBD paper, and masks that no optimizer undoes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from prunelib import checks, pruning, surgeon, units
from prunelib.checks import require
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples, collected
from prunelib.training import Recipe, trainer


def keep_pruned(kept: Any) -> optax.GradientTransformation:
    """Hold pruned parameters at exactly zero, whatever the optimizer wants.

    To be put *after* the optimizer: it replaces the update of each pruned parameter by ``-w``, so
    that no momentum revives anything. `kept` is shaped like params, False = pruned; wrappers, such
    as Flax's Variables, may differ. Raises TypeError if it holds anything but booleans, ValueError
    at an `update` without params, or with others.
    """
    checks.booleans(kept)

    def update(updates, state, params=None):
        require(params is not None, "params: keep_pruned needs update(gradient, state, params)")
        mask = checks.like("kept", kept, "updates", updates)
        params = checks.like("params", params, "updates", updates)
        return jax.tree.map(lambda k, u, w: jnp.where(k, u, -w), mask, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def recomputed(network, params: Any, examples: Examples, step: int = 5) -> Any:
    """OBD with the curvature of what is left, measured anew after each `step` percent.

    No retraining. The score, shaped like `params`, is the number of the step in which an entry
    goes, and within it the place of ``½ h_kk w_k²``, so that `pruning.mask` finds all levels.
    """
    kept = scores = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    for number, percent in enumerate(range(step, 100 + step, step)):
        left = pruning.masked(params, kept)
        saliency = pruning.obd_saliency(left, hessian_diagonal(network, left, examples))
        alive = jax.tree.map(lambda k, s: jnp.where(k, s, -1), kept, saliency)
        now = jax.tree.map(lambda place, n=number: n + place / total, pruning.ranks(alive))
        scores = jax.tree.map(jnp.where, kept, now, scores)
        kept = pruning.mask(alive, min(percent, 100))
    return scores


CRITERIA = {  # (network, params, examples, key) -> scores
    "magnitude": lambda network, w, x, key: pruning.magnitude(w),
    "obd": lambda network, w, x, key: pruning.obd_saliency(w, hessian_diagonal(network, w, x)),
    "root": lambda network, w, x, key: jax.tree.map(
        lambda w, h: w**2 * jnp.sqrt(h), w, hessian_diagonal(network, w, x)
    ),
    "obs": lambda network, w, x, key: surgeon.scores(network, w, x),
    "recomputed": lambda network, w, x, key: recomputed(network, w, x),
    "random": lambda network, w, x, key: pruning.random_scores(key, w),
}
UNIT_CRITERIA = {  # the same, one score a unit
    "random": lambda network, w, x, key: pruning.random_scores(key, units.summed(network, w)),
    "magnitude": lambda network, w, x, key: units.summed(network, jax.tree.map(jnp.square, w)),
    "obd": lambda network, w, x, key: units.summed(network, CRITERIA["obd"](network, w, x, key)),
    "gate": lambda network, w, x, key: units.gate(network, w, x),
    "obs": lambda network, w, x, key: units.obs(network, w, x),
}


def cut_weights(network, params: Any, scores: Any, percent: float, examples: Examples, move=False):
    """Prune `percent` of the weights, biases kept; with `move` the others take over (`surgeon`).

    Returns params, zero where pruned, their mask, and that mask again.
    """
    if move:
        found = surgeon.layerwise(network, params, examples, percent, ranked=scores)
        return *found, found.kept
    kept = pruning.mask(scores, percent, prunable=pruning.weights_only(params))
    return pruning.masked(params, kept), kept, kept


def cut_units(network, params: Any, scores: dict, percent: float, examples: Examples, move=False):
    """As `cut_weights`, of whole units, never all of a layer; the last is the mask of units."""
    chosen = pruning.mask(units.spared(scores), percent)
    kept = units.mask(network, params, chosen)
    if move:
        return units.refit(network, params, chosen, examples), kept, chosen
    return pruning.masked(params, kept), kept, chosen


class Retrained(NamedTuple):
    """What `prune_and_retrain` went through: masks ``[rounds, seeds, ...]``, the last params, and

    table : DataFrame, one row a seed and round: `seed`, `round`, `percent` pruned, `remaining`,
        `before` (accuracy after pruning and before retraining), `accuracy` and `loss` after it
    """

    table: pd.DataFrame
    kept: Any
    params: Any


def prune_and_retrain(
    network, params: Any, train: Examples, test: Examples, percents: Sequence[float],
    recipe: Recipe, criterion: str | Callable = "obd", scope: str = "all",
    seeds: Sequence[int] = range(5), scored_on: int | None = None,
) -> Retrained:  # fmt: skip
    """Prune, retrain under the mask, repeat: the procedure of the OBD paper (1990), section 2.

    In each round the parameters are scored and ranked, the lowest go, and the rest is retrained
    with a fresh optimizer. What is pruned stays pruned. A round that asks for no more than the last
    only retrains: ``[90] * 5`` is one-shot pruning with the retraining budget of five rounds.

    params : pytree ``[seeds, ...]``, trained networks, as in `training.Runs`
    percents : percent pruned after each round, never falling
    recipe : how a round retrains; its `std` is not used
    criterion : a key of CRITERIA, or ``(network, params, examples, key) -> scores``
    seeds : for the order of the examples, dropout, and random scores
    scored_on : how many training examples, the first ones, the criterion sees; by default all

    Errors are those of `training.trainer` and `pruning.ranks`; ValueError for falling `percents`.
    """
    seeds, percents = checks.seeds(seeds), list(percents)
    if not callable(criterion):
        checks.one_of("criterion", criterion, CRITERIA)
    score = criterion if callable(criterion) else CRITERIA[criterion]
    checks.one_of("scope", scope, pruning.SCOPES)
    rising = percents and percents == sorted(percents)
    require(rising, f"percents: expected some, none lower than the last, got {percents}")
    for percent in percents:
        checks.percent(percent)
    checks.params(params)
    good = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(params)} == {(len(seeds),)}
    require(good, f"params: expected a leading axis over the {len(seeds)} seeds; pass runs.params "
            "and seeds=runs.seeds")  # fmt: skip
    checks.whole("scored_on", 1 if scored_on is None else scored_on)
    train = jax.tree.map(jnp.asarray, collected(train))
    scored = train.first(scored_on or len(train.labels) - recipe.held_out)
    retrain = trainer(network, recipe, params, train, keep_pruned)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    kept = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    rows, masks, last = [], [], 0

    def prune(percent, params, kept, key):  # what is pruned already goes first, and so stays
        order = pruning.ranks(score(network, params, scored, key), scope)
        order = jax.tree.map(lambda place, k: jnp.where(k, place, -1), order, kept)
        return pruning.mask(order, percent, scope)

    for number, percent in enumerate(percents):
        if percent > last:
            fresh = jax.vmap(partial(jax.random.fold_in, data=2 * number))(keys)
            kept = each(partial(prune, percent), params, kept, fresh)
            params, last = pruning.masked(params, kept), percent
        before = each(lambda w: pruning.evaluate(network, w, test), params)
        fresh = jax.vmap(partial(jax.random.fold_in, data=2 * number + 1))(keys)
        params, _, _ = retrain(params, fresh, kept)
        after = each(lambda w: pruning.evaluate(network, w, test), params)
        level = {"round": number + 1, "percent": percent, "remaining": 100 - percent}
        measured = {"seed": seeds, "before": before.accuracy, **after._asdict()}
        rows.append(pd.DataFrame(measured | level))
        masks.append(kept)
    masks = jax.tree.map(lambda *each: np.stack(each), *masks)
    return Retrained(pd.concat(rows, ignore_index=True), masks, params)


def each(function, *trees):
    """``function`` of one seed after the other, stacked: a pass over the data fills memory."""
    seeds = range(len(jax.tree.leaves(trees)[0]))
    found = [function(*jax.tree.map(lambda leaf, i=i: leaf[i], trees)) for i in seeds]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)
