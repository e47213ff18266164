"""Whole units go, with and without an update of the others, then one short retraining: a table."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd

from prunelib import pruning, units
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples
from prunelib.retraining import keep_pruned
from prunelib.training import Runs, trainer


@dataclass(frozen=True)
class Dropping:
    """Percent of units kept, of all hidden layers together; scores and updates see the first
    `scored_on` training examples. Retraining is the run's own recipe, for `steps`, its learning
    rate times `rate`.
    """

    start: str
    steps: int = 300
    remaining: tuple[float, ...] = (70, 50, 30, 20, 10)
    scored_on: int = 5000
    rate: float = 1.0


def scores_of_units(network, params: Any, examples: Examples, key: jax.Array) -> dict[str, dict]:
    """What is compared: for each criterion the scores of units, never emptying a layer.

    "magnitude" is the squared norm of a unit's weights, "obd" the sum of their saliencies.
    """
    squares = jax.tree.map(jnp.square, params)
    obd = pruning.obd_saliency(params, hessian_diagonal(network, params, examples))
    found = {"magnitude": units.summed(network, squares), "obd": units.summed(network, obd)}
    found |= {f.__name__: f(network, params, examples) for f in (units.gate, units.obs)}
    found = {"random": pruning.random_scores(key, found["obs"])} | found
    return {criterion: units.spared(scores) for criterion, scores in found.items()}


def drop_and_retrain(
    network, runs: Runs, plan: Dropping, train: Examples, test: Examples
) -> pd.DataFrame:
    """One row a criterion, level, update (0 or 1) and seed: `before` (the accuracy that dropping
    leaves), `accuracy` and `loss` after the retraining, and the units left in each layer.
    """
    some, keys = train.first(plan.scored_on), [jax.random.key(seed) for seed in runs.seeds]
    dense = [runs.select(i) for i in range(len(keys))]
    scores = [scores_of_units(network, w, some, key) for w, key in zip(dense, keys, strict=True)]
    rate = plan.rate * runs.recipe.learning_rate
    recipe = replace(runs.recipe, steps=plan.steps, learning_rate=rate)
    retrain, tables = trainer(network, recipe, runs.params, train, keep_pruned), []
    for criterion, level, update in product(scores[0], plan.remaining, (0, 1)):
        chosen = [pruning.mask(s[criterion], 100 - level) for s in scores]
        kept = [units.mask(network, w, u) for w, u in zip(dense, chosen, strict=True)]
        pruned = [
            units.refit(network, w, u, some) if update else pruning.masked(w, k)
            for w, u, k in zip(dense, chosen, kept, strict=True)
        ]
        params, masks = (jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (pruned, kept))
        params = retrain(params, jnp.stack(keys), masks)[0]
        after = [jax.tree.map(lambda w, i=i: w[i], params) for i in range(len(keys))]
        rows = pd.DataFrame([pruning.evaluate(network, w, test) for w in after])
        rows["before"] = [pruning.evaluate(network, w, test).accuracy for w in pruned]
        left = pd.DataFrame([{name: int(u.sum()) for name, u in c.items()} for c in chosen])
        named = {"criterion": criterion, "update": update, "remaining": level}
        tables.append(pd.concat([rows.assign(seed=runs.seeds, **named), left], axis=1))
    return pd.concat(tables, ignore_index=True)
