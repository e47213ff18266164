"""Every run and experiment of the series by its name: fetched if it is kept, else made.

    python -m prunelib.experiments [NAME ...]     # make them again, to where they are shipped

A run is a set of trained networks, ``trained("plain")``; an outcome is a table of measurements,
``outcome("plain-obd")``.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict

from prunelib import checks, data, models, pruning, store
from prunelib.curvature import hessian_diagonal
from prunelib.retraining import prune_and_retrain
from prunelib.training import Recipe, Runs, train

VERSION = 1  # of the algorithms; raise it by hand when what they compute changes

PLAIN = Recipe(steps=20_000)
PLAIN_2016 = Recipe(
    steps=50_000, learning_rate=1e-4, decay=False, std=0.02, summed=True, held_out=5000
)
DROPOUT_2016 = replace(PLAIN_2016, learning_rate=1e-5, keep=0.8)
SGD = Recipe(steps=20_000, optimizer="sgd", learning_rate=0.05, momentum=0.9)

# name: network, recipe, number of seeds
RUNS: dict[str, tuple[Callable, Recipe, int]] = {
    "plain": (models.mlp, PLAIN, 5),
    "fair_dropout": (models.mlp, replace(PLAIN, keep=0.8), 5),
    # The study's recipes; its two differences one at a time; and its recipe cut short.
    "plain_2016": (models.mlp, PLAIN_2016, 5),
    "dropout_2016": (models.mlp, DROPOUT_2016, 5),
    "slow_2016": (models.mlp, replace(PLAIN_2016, learning_rate=1e-5), 5),
    "fast_dropout_2016": (models.mlp, replace(DROPOUT_2016, learning_rate=1e-4), 5),
    "short_2016": (models.mlp, replace(PLAIN_2016, steps=1500), 5),
    # Stopped early.
    "plain_tenth": (models.mlp, replace(PLAIN, steps=2000), 5),
    "plain_hundredth": (models.mlp, replace(PLAIN, steps=200), 5),
    # Other optimizers.
    "sgd": (models.mlp, SGD, 5),
    "sgd_decay": (models.mlp, replace(SGD, weight_decay=5e-4), 5),
    "adamw": (models.mlp, replace(PLAIN, optimizer="adamw", weight_decay=0.1), 5),
    # Larger networks.
    "lenet300": (models.lenet300, Recipe(steps=10_000, batch=128), 3),
    "lenet5": (models.lenet5, Recipe(steps=3_750), 3),
}


@dataclass(frozen=True)
class Plan:
    """Pruning with retraining from a run (`start`, a key of RUNS).

    See `retraining.prune_and_retrain`; `retraining` is the recipe of one round, `remaining` percent
    kept, round by round. With `one_shot` each level is reached at once, with the budget of ROUNDS
    up to it.
    """

    start: str
    criterion: str
    retraining: Recipe
    remaining: tuple[float, ...]
    scope: str = "all"
    one_shot: bool = False
    scored_on: int | None = None


ROUNDS = (40, 20, 12, 8, 5, 2, 1, 0.5)
SUBSET = 3000  # of LeNet-5's examples, the first ones, in its rounds
LENET5_LEVELS = (80, 60, 50, 40, 30, 20, 15, 10, 5)
_ROUND = Recipe(steps=600, learning_rate=5e-3)


def _plans() -> dict[str, Plan]:
    found = {"plain-random": Plan("plain", "random", _ROUND, ROUNDS)}
    for c in ("magnitude", "obd"):
        found[f"plain-{c}"] = Plan("plain", c, _ROUND, ROUNDS)
        found[f"plain-{c}-layer"] = Plan("plain", c, _ROUND, ROUNDS, scope="layer")
        found[f"plain-{c}-one_shot"] = Plan("plain", c, _ROUND, (20, 8, 2), one_shot=True)
        found[f"dropout-{c}"] = Plan("fair_dropout", c, replace(_ROUND, keep=0.8), ROUNDS)
        fine = (25, 12, 8, 6, 4, 2, 1)
        found[f"lenet300-{c}"] = Plan("lenet300", c, replace(_ROUND, batch=128), fine)
        modest, levels = replace(_ROUND, steps=1000, learning_rate=1e-3), (25, 12, 8, 4, 2, 1)
        found[f"lenet5-{c}"] = Plan("lenet5", c, modest, levels, scored_on=SUBSET)
    return found


PLANS = _plans()
OUTCOMES = (*PLANS, "lenet5-without-retraining")


def trained(name: str) -> Runs:
    """The networks of a run of the series, a key of RUNS: fetched, or trained if not there."""
    checks.one_of("name", name, RUNS)
    _, recipe, number = RUNS[name]
    arrays = store.kept(name, _settings(name), lambda: _train(name))
    history = pd.DataFrame({k.split("/")[1]: v for k, v in arrays.items() if k[:8] == "history/"})
    params = unflatten_dict({k: jnp.asarray(v) for k, v in arrays.items()}, sep="/")["params"]
    return Runs(recipe, tuple(range(number)), params, history)


def outcome(name: str) -> pd.DataFrame:
    """The table of an experiment of the series, one of OUTCOMES: fetched, or made (minutes).

    One row a measurement: `recipe` (the run it started from), `seed`, `criterion`, `scope`,
    `remaining` (percent of the parameters), `before` (accuracy before retraining, a fraction),
    `accuracy` and `loss`; and how many entries of each array are left, by the array's path.
    """
    checks.one_of("name", name, OUTCOMES)
    return pd.DataFrame(store.kept(name, _settings(name), lambda: _experiment(name)))


def _settings(name: str) -> dict:
    """What a kept run or outcome depends on, in words."""
    plan = PLANS.get(name)
    start = plan.start if plan else name.split("-")[0]
    build, recipe, number = RUNS[start]
    settings = {"version": VERSION, "network": build.__name__, "recipe": asdict(recipe)}
    settings |= {"seeds": number, "data": data.SHA256["mnist"]["train/images"]}
    if plan:
        return settings | {"plan": asdict(plan)}
    return settings if name == start else settings | {"levels": LENET5_LEVELS}


def _train(name: str) -> store.Arrays:
    build, recipe, number = RUNS[name]
    runs = train(build(), recipe, data.load_mnist().train, range(number))
    history = {f"history/{column}": runs.history[column].to_numpy() for column in runs.history}
    return flatten_dict({"params": jax.device_get(runs.params)}, sep="/") | history


def _experiment(name: str) -> store.Arrays:
    table = _rounds(PLANS[name]) if name in PLANS else _lenet5_curves()
    numeric = set(table.select_dtypes("number"))
    return {c: table[c].to_numpy(None if c in numeric else str) for c in table}


def _rounds(plan: Plan) -> pd.DataFrame:
    mnist, runs = data.load_mnist(), trained(plan.start)
    network = RUNS[plan.start][0]()

    def through(percents):
        found = prune_and_retrain(
            network, runs.params, mnist.train, mnist.test, percents, plan.retraining,
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


def _lenet5_curves() -> pd.DataFrame:
    """LeNet-5 without retraining; "subset" is OBD by the first SUBSET examples."""
    mnist, runs, network = data.load_mnist(), trained("lenet5"), models.lenet5()
    percents = [100 - level for level in LENET5_LEVELS]

    def curve(params, scores, scope):
        found = pruning.accuracy_curve(network, params, scores, mnist.test, percents, scope)
        left = pd.concat([_counts(pruning.mask(scores, p, scope), axes=0) for p in percents])
        return pd.concat([found.drop(columns="percent"), left.reset_index(drop=True)], axis=1)

    def curves(params):
        start = time.perf_counter()
        whole = jax.block_until_ready(hessian_diagonal(network, params, mnist.train))
        seconds = time.perf_counter() - start
        part = hessian_diagonal(network, params, mnist.train.first(SUBSET))
        scores = {"magnitude": pruning.magnitude(params)}
        scores |= {"obd": pruning.obd_saliency(params, whole)}
        scores |= {"subset": pruning.obd_saliency(params, part)}
        tables = [
            curve(params, score, scope).assign(criterion=c, scope=scope)
            for c, score in scores.items()
            for scope in pruning.SCOPES
        ]
        return pd.concat(tables, ignore_index=True).assign(recipe="lenet5", seconds=seconds)

    return runs.map(curves)


def main(names: Sequence[str] = ()) -> None:
    """Make runs and outcomes again from their seeds, all or those named, to where they ship."""
    for name in names or (*RUNS, *OUTCOMES):
        checks.one_of("name", name, (*RUNS, *OUTCOMES))
        start = time.perf_counter()
        arrays = _train(name) if name in RUNS else _experiment(name)
        store.write(store.SHIPPED / f"{name}.npz", arrays, _settings(name))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
