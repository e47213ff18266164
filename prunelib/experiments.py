"""Every run (trained networks) and outcome (a table) of the series, by name: fetched, or made.

    python -m prunelib.experiments [NAME ...]     # make them again, to where they are shipped
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict

from prunelib import checks, data, models, pruning, store
from prunelib.retraining import CRITERIA, prune_and_retrain
from prunelib.training import Recipe, Runs, train

VERSION = 1  # of the algorithms; raise it by hand when what they compute changes

PLAIN = Recipe(steps=20_000)
PLAIN_2016 = Recipe(50_000, learning_rate=1e-4, decay=False, std=0.02, summed=True, held_out=5000)
DROPOUT_2016 = replace(PLAIN_2016, learning_rate=1e-5, keep=0.8)
SGD = Recipe(steps=20_000, optimizer="sgd", learning_rate=0.05, momentum=0.9)


class Run(NamedTuple):
    """A network, how it is trained, how many seeds, and on which of `data.SHA256`."""

    network: Callable
    recipe: Recipe
    seeds: int = 5
    dataset: str = "mnist"


RUNS = {
    "plain": Run(models.mlp, PLAIN),
    "fair_dropout": Run(models.mlp, replace(PLAIN, keep=0.8)),
    # The study's recipes; its two differences one at a time; and its recipe cut short.
    "plain_2016": Run(models.mlp, PLAIN_2016),
    "dropout_2016": Run(models.mlp, DROPOUT_2016),
    "slow_2016": Run(models.mlp, replace(PLAIN_2016, learning_rate=1e-5)),
    "fast_dropout_2016": Run(models.mlp, replace(DROPOUT_2016, learning_rate=1e-4)),
    "short_2016": Run(models.mlp, replace(PLAIN_2016, steps=1500)),
    # Stopped early.
    "plain_tenth": Run(models.mlp, replace(PLAIN, steps=2000)),
    "plain_hundredth": Run(models.mlp, replace(PLAIN, steps=200)),
    # Other optimizers.
    "sgd": Run(models.mlp, SGD),
    "sgd_decay": Run(models.mlp, replace(SGD, weight_decay=5e-4)),
    "adamw": Run(models.mlp, replace(PLAIN, optimizer="adamw", weight_decay=0.1)),
    # Larger networks.
    "lenet300": Run(models.lenet300, Recipe(steps=10_000, batch=128), 3),
    "lenet5": Run(models.lenet5, Recipe(steps=3_750), 3),
}
# Trained for their curves alone; only those are shipped. Adam's eps is a dial towards SGD.
CONTROLS = {
    "sgd_plain": Run(models.mlp, replace(SGD, learning_rate=0.3, momentum=0.0)),
    "lenet300_sgd": Run(models.lenet300, replace(SGD, steps=10_000, batch=128), 3),
    "lenet5_sgd": Run(models.lenet5, replace(SGD, steps=3_750, learning_rate=0.02), 3),
    **{f"adam_eps{k}": Run(models.mlp, replace(PLAIN, eps=10.0**-k)) for k in (6, 5, 4, 3, 2)},
}
for _name in ("plain", "sgd", "sgd_decay", "adamw"):
    CONTROLS[f"fashion_{_name}"] = RUNS[_name]._replace(dataset="fashion_mnist")


@dataclass(frozen=True)
class Plan:
    """Pruning a run with retraining: one round's recipe, and percent kept, round by round.

    With `one_shot` each level is reached at once, with the budget of ROUNDS up to it.
    """

    start: str
    criterion: str
    retraining: Recipe
    remaining: tuple[float, ...]
    scope: str = "all"
    one_shot: bool = False
    scored_on: int | None = None


class Curves(NamedTuple):
    """Pruning without retraining; "subset" is OBD by the first SUBSET examples."""

    start: str
    remaining: tuple[float, ...] = (100, 90, 80, 70, 60, 50, 40, 30, 20, 15, 10, 5, 2)
    criteria: tuple[str, ...] = ("magnitude", "obd", "random")
    scopes: tuple[str, ...] = ("all",)


ROUNDS = (40, 20, 12, 8, 5, 2, 1, 0.5)
SUBSET = 3000
_ROUND = Recipe(steps=600, learning_rate=5e-3)

def _plans() -> dict[str, Plan]:
    found = {"plain-random": Plan("plain", "random", _ROUND, ROUNDS)}
    sgd, fine = replace(SGD, steps=600), (25, 12, 8, 6, 4, 2, 1)
    for c in ("magnitude", "obd"):
        found[f"plain-{c}"] = Plan("plain", c, _ROUND, ROUNDS)
        found[f"plain-{c}-layer"] = Plan("plain", c, _ROUND, ROUNDS, scope="layer")
        found[f"plain-{c}-one_shot"] = Plan("plain", c, _ROUND, (20, 8, 2), one_shot=True)
        found[f"plain-{c}-by_sgd"] = Plan("plain", c, sgd, ROUNDS)
        found[f"sgd-{c}-by_adam"] = Plan("sgd", c, _ROUND, ROUNDS)
        found[f"sgd-{c}-by_sgd"] = Plan("sgd", c, sgd, ROUNDS)
        found[f"dropout-{c}"] = Plan("fair_dropout", c, replace(_ROUND, keep=0.8), ROUNDS)
        found[f"lenet300-{c}"] = Plan("lenet300", c, replace(_ROUND, batch=128), fine)
        modest, levels = replace(_ROUND, steps=1000, learning_rate=1e-3), (25, 12, 8, 4, 2, 1)
        found[f"lenet5-{c}"] = Plan("lenet5", c, modest, levels, scored_on=SUBSET)
    return found


PLANS = _plans()
_COMPARED = ("plain", "adamw", "sgd", "sgd_decay", "lenet300")
CURVES = {f"{name}-curves": Curves(name) for name in (*_COMPARED, *CONTROLS)}
CURVES["lenet5-without-retraining"] = Curves(
    "lenet5", (80, 60, 50, 40, 30, 20, 15, 10, 5), ("magnitude", "obd", "subset"), pruning.SCOPES
)
OUTCOMES = PLANS | CURVES


def trained(name: str) -> Runs:
    """The networks of a run, a key of RUNS or CONTROLS: fetched, or trained if not there."""
    run = _run(name)
    arrays = store.kept(name, _settings(name), lambda: _train(name))
    history = pd.DataFrame({k.split("/")[1]: v for k, v in arrays.items() if k[:8] == "history/"})
    params = unflatten_dict({k: jnp.asarray(v) for k, v in arrays.items()}, sep="/")["params"]
    return Runs(run.recipe, tuple(range(run.seeds)), params, history)


def outcome(name: str) -> pd.DataFrame:
    """The table of an experiment of the series, a key of OUTCOMES: fetched, or made (minutes).

    One row a measurement: `recipe` (the run it started from), `seed`, `criterion`, `scope`,
    `remaining` (percent of the parameters), `before` (accuracy before retraining, a fraction),
    `accuracy` and `loss`; and how many entries of each array are left, by the array's path.
    """
    checks.one_of("name", name, OUTCOMES)
    return pd.DataFrame(store.kept(name, _settings(name), lambda: _experiment(name)))

def _run(name: str) -> Run:
    checks.one_of("name", name, RUNS | CONTROLS)
    return (RUNS | CONTROLS)[name]

def _settings(name: str) -> dict:
    """What a kept run or outcome depends on, in words."""
    plan = OUTCOMES.get(name)
    run = _run(plan.start if plan else name)
    settings = {"version": VERSION, "network": run.network.__name__, "recipe": asdict(run.recipe)}
    settings |= {"seeds": run.seeds, "data": data.SHA256[run.dataset]["train/images"]}
    if plan:
        settings["plan"] = asdict(plan) if name in PLANS else plan._asdict()
    return settings

def _train(name: str) -> store.Arrays:
    run = _run(name)
    runs = train(run.network(), run.recipe, data.load(run.dataset).train, range(run.seeds))
    history = {f"history/{column}": runs.history[column].to_numpy() for column in runs.history}
    return flatten_dict({"params": jax.device_get(runs.params)}, sep="/") | history

def _experiment(name: str) -> store.Arrays:
    plan = OUTCOMES[name]
    table = _rounds(plan) if name in PLANS else _curves(plan)
    numeric = set(table.select_dtypes("number"))
    return {c: table[c].to_numpy(None if c in numeric else str) for c in table}

def _rounds(plan: Plan) -> pd.DataFrame:
    run, runs = _run(plan.start), trained(plan.start)
    network, (train, test) = run.network(), data.load(run.dataset)

    def through(percents):
        found = prune_and_retrain(
            network, runs.params, train, test, percents, plan.retraining,
            plan.criterion, plan.scope, runs.seeds, plan.scored_on,
        )  # fmt: skip
        left = _counts(found.kept, axes=2)  # rounds, then seeds: the order of the table's rows
        return pd.concat([found.table, left], axis=1)

    def at_once(level):  # after pruning look at the first round, after retraining at the last
        rounds = through([100 - level] * (ROUNDS.index(level) + 1))
        last = rounds[rounds["round"] == rounds["round"].max()].reset_index(drop=True)
        return last.assign(before=rounds.before[: len(last)])

    levels = plan.remaining
    parts = map(at_once, levels) if plan.one_shot else [through([100 - x for x in levels])]
    named = {"recipe": plan.start, "criterion": plan.criterion, "scope": plan.scope}
    return pd.concat(parts, ignore_index=True).drop(columns=["round", "percent"]).assign(**named)

def _counts(kept, axes: int) -> pd.DataFrame:
    """How many entries of each array of a mask are True, one row for each place in leading axes."""
    arrays = {"/".join(checks.names_of(path)): a for path, a in jax.tree.leaves_with_path(kept)}
    return pd.DataFrame({k: a.sum(tuple(range(axes, a.ndim))).ravel() for k, a in arrays.items()})

def _curves(plan: Curves) -> pd.DataFrame:
    run, runs = _run(plan.start), trained(plan.start)
    network, (train, test) = run.network(), data.load(run.dataset)
    percents = [100 - level for level in plan.remaining]

    def curve(params, scores, scope):
        found = pruning.accuracy_curve(network, params, scores, test, percents, scope)
        left = pd.concat([_counts(pruning.mask(scores, p, scope), axes=0) for p in percents])
        return pd.concat([found.drop(columns="percent"), left.reset_index(drop=True)], axis=1)

    def curves(params):
        tables = []
        for criterion in plan.criteria:
            start = time.perf_counter()
            score = CRITERIA["obd" if criterion == "subset" else criterion]
            some = train.first(SUBSET) if criterion == "subset" else train
            scores = jax.block_until_ready(score(network, params, some, jax.random.key(0)))
            seconds = time.perf_counter() - start
            named = {"criterion": criterion, "recipe": plan.start, "seconds": seconds}
            tables += [curve(params, scores, s).assign(scope=s, **named) for s in plan.scopes]
        return pd.concat(tables, ignore_index=True)

    return runs.map(curves)


def main(names: Sequence[str] = ()) -> None:
    """Make runs and outcomes again from their seeds, all or those named, to where they ship."""
    for name in names or RUNS | OUTCOMES:
        checks.one_of("name", name, RUNS | OUTCOMES)
        start = time.perf_counter()
        arrays = _train(name) if name in RUNS else _experiment(name)
        store.write(store.SHIPPED / f"{name}.npz", arrays, _settings(name))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
