"""Every run (trained networks) and outcome (a table) of the series, by name: fetched, or made.

    python -m prunelib.experiments [NAME ...]     # make them again, to where they are shipped
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pandas as pd
from flax.traverse_util import flatten_dict, unflatten_dict

from prunelib import checks, data, models, pruning, retraining, store, surgeon, taylor
from prunelib.retraining import CRITERIA, UNIT_CRITERIA, each, keep_pruned, prune_and_retrain
from prunelib.training import Recipe, Runs, train, trainer

VERSION = 1  # of the algorithms; raise it by hand when what they compute changes

PLAIN = Recipe(steps=20_000)
PLAIN_2016 = Recipe(50_000, learning_rate=1e-4, decay=False, std=0.02, summed=True, held_out=5000)
DROPOUT_2016 = replace(PLAIN_2016, learning_rate=1e-5, keep=0.8)
SGD = Recipe(steps=20_000, optimizer="sgd", learning_rate=0.05, momentum=0.9)


class Run(NamedTuple):
    """A network, how it is trained, how many seeds, on which of `data.SHA256`, and how prepared."""

    network: Callable
    recipe: Recipe
    seeds: int = 5
    dataset: str = "mnist"
    prepared: Callable | None = None

    def load(self) -> data.Splits:
        """The run's data."""
        splits = data.load(self.dataset)
        return data.Splits(*map(self.prepared, splits)) if self.prepared else splits


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
    # Other networks.
    "little": Run(models.little, Recipe(steps=5_000), 3, prepared=data.coarse),
    "lenet300": Run(models.lenet300, Recipe(steps=10_000, batch=128), 3),
    "lenet5": Run(models.lenet5, Recipe(steps=3_750), 3),
}
# Trained for their curves alone; only those are shipped. Adam's eps is a dial towards SGD.
CONTROLS = {
    "sgd_plain": Run(models.mlp, replace(SGD, learning_rate=0.3, momentum=0.0)),
    "lenet300_sgd": Run(models.lenet300, replace(SGD, steps=10_000, batch=128), 3),
    "lenet5_sgd": Run(models.lenet5, replace(SGD, steps=3_750, learning_rate=0.02), 3),
    **{f"adam_eps{k}": Run(models.mlp, replace(PLAIN, eps=10.0**-k)) for k in (6, 5, 4, 3, 2)},
    # The same on other pixels.
    "blanked": Run(models.mlp, PLAIN, prepared=data.blanked),
    "standardised": Run(models.mlp, PLAIN, prepared=data.standardised),
    "standardised_sgd": Run(models.mlp, SGD, prepared=data.standardised),
}
for _name in ("plain", "sgd", "sgd_decay", "adamw"):
    CONTROLS[f"fashion_{_name}"] = RUNS[_name]._replace(dataset="fashion_mnist")

# Where the LeNets' many rounds start; "_held" have not seen the images that choices are judged by.
_DECAY = replace(SGD, weight_decay=5e-4)
STARTS = {
    "lenet300_decay": Run(models.lenet300, replace(_DECAY, steps=10_000, batch=128), 3),
    "lenet5_decay": Run(models.lenet5, replace(_DECAY, steps=3_750, learning_rate=0.02), 3),
}
for _name, _known in [("lenet300", RUNS["lenet300"]), *STARTS.items()]:
    STARTS[f"{_name}_held"] = _known._replace(recipe=replace(_known.recipe, held_out=5000))

@dataclass(frozen=True)
class Plan:
    """Pruning a run with retraining: one round's recipe, and percent kept, round by round."""

    start: str
    criterion: str
    retraining: Recipe
    remaining: tuple[float, ...]
    scope: str = "all"
    scored_on: int | None = None


@dataclass(frozen=True)
class Surgery:
    """One cut, without and with an update of the others; then one retraining, if any.

    Of weights, biases kept; or of `units`, percent of all hidden layers together. Scores and
    updates see the first `scored_on` images.
    """

    start: str
    retraining: Recipe | None = None
    remaining: tuple[float, ...] = (20, 10, 5, 2)
    criteria: tuple[str, ...] = ("magnitude", "obd", "obs")
    scored_on: int = 5000
    units: bool = False


@dataclass(frozen=True)
class Curves:
    """Pruning without retraining; "subset" is OBD by the first SUBSET examples, "obs" is layer-wise
    OBS with its update, of the weights alone. With `terms`, those of `taylor.loss_change` too.
    """

    start: str
    remaining: tuple[float, ...] = (100, 90, 80, 70, 60, 50, 40, 30, 20, 15, 10, 5, 2)
    criteria: tuple[str, ...] = ("magnitude", "obd", "random")
    scopes: tuple[str, ...] = ("all",)
    terms: bool = False


ROUNDS = (40, 20, 12, 8, 5, 2, 1, 0.5)
FINER = (40, 30, 25, 20, 17, 15, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3)
SUBSET = 3000
CRITERIA_3 = ("obs", "obd", "magnitude")
_ROUND = Recipe(steps=600, learning_rate=5e-3)

def _plans() -> dict[str, Plan]:
    found = {"plain-random": Plan("plain", "random", _ROUND, ROUNDS)}
    found["plain-obs-rounds"] = Plan("plain", "obs", _ROUND, ROUNDS)
    sgd = replace(SGD, steps=600)
    for c in ("magnitude", "obd"):
        found[f"plain-{c}"] = Plan("plain", c, _ROUND, ROUNDS)
        found[f"plain-{c}-layer"] = Plan("plain", c, _ROUND, ROUNDS, scope="layer")
        found[f"plain-{c}-by_sgd"] = Plan("plain", c, sgd, ROUNDS)
        found[f"sgd-{c}-by_adam"] = Plan("sgd", c, _ROUND, ROUNDS)
        found[f"sgd-{c}-by_sgd"] = Plan("sgd", c, sgd, ROUNDS)
    for c in CRITERIA_3:
        found[f"plain-{c}-finer"] = Plan("plain", c, _ROUND, FINER)
    return found

def _many_rounds(
    name, by, start, recipe, choices, few=(10, 4, 2, 1), scored_on=None
) -> dict[str, Plan]:
    """By CRITERIA_3, with the first choice of learning rate and weight decay; and how that was
    chosen: magnitude by all of them, judged on held-out examples of the training set.
    """
    found = {}
    for rate, decay in reversed(choices):
        chosen = replace(recipe, learning_rate=rate, weight_decay=decay)
        choice = f"{name}-{by}-rate{rate:g}" + (f"-decay{decay:g}" if decay else "")
        held = replace(chosen, held_out=5000)
        found[choice] = Plan(f"{start}_held", "magnitude", held, few)
    for c in CRITERIA_3:
        found[f"{name}-{by}-{c}"] = Plan(start, c, chosen, LEVELS[name], scored_on=scored_on)
    return found


LEVELS = {
    "lenet300": (40, 20, 10, 6, 4, 3, 2, 1.47, 1, 0.7, 0.5, 0.3),
    "lenet5": (25, 10, 5, 3, 2, 1.3, 0.9, 0.7, 0.5, 0.36),
}
CHOICES = {  # learning rate and weight decay; all rounds got the first (see lessons 10 and 11)
    "lenet300": ((0.1, 5e-4), (0.2, 1e-4), (0.1, 1e-4), (0.05, 5e-4), (0.05, 1e-4)),
    "lenet5": ((0.05, 5e-4), (0.1, 5e-4), (0.05, 1e-4), (0.02, 5e-4), (0.02, 1e-4)),
}
ADAM_RATES = (1e-3, 2e-3, 5e-4)
PLANS = _plans()
_start, _recipe = "lenet300_decay", replace(SGD, steps=4000, batch=128)
PLANS |= _many_rounds("lenet300", "sgd", _start, _recipe, CHOICES["lenet300"])
PLANS["lenet300-sgd-random"] = replace(PLANS["lenet300-sgd-obd"], criterion="random")
_start, _recipe = "lenet300", Recipe(steps=4000, batch=128)
PLANS |= _many_rounds("lenet300", "adam", _start, _recipe, [(rate, 0.0) for rate in ADAM_RATES])
_start, _recipe, _few = "lenet5_decay", replace(SGD, steps=2000), (10, 3, 1, 0.5)
PLANS |= _many_rounds("lenet5", "sgd", _start, _recipe, CHOICES["lenet5"], _few, SUBSET)
_known, _longer, _adam = PLANS["lenet5-sgd-obd"], replace(_DECAY, steps=4000), Recipe(steps=2000)
PLANS["lenet5-sgd-random"] = replace(_known, criterion="random")
PLANS["lenet5-longer-obd"] = replace(_known, retraining=_longer)
for _c in CRITERIA_3:  # with the rate that was best for LeNet-300-100, the recipe's own
    PLANS[f"lenet5-adam-{_c}"] = replace(_known, criterion=_c, start="lenet5", retraining=_adam)
PICTURED = ("lenet300-sgd-obs", "lenet5-sgd-obs")  # their last networks are kept too
SURGERY = {"plain-surgery": Surgery("plain", replace(_ROUND, steps=3000))}
SURGERY["sgd-surgery"] = Surgery("sgd")
_COMPARED = ("plain", "adamw", "sgd", "sgd_decay", "lenet300")
CURVES = {f"{name}-curves": Curves(name) for name in (*_COMPARED, *CONTROLS)}
_FEW = (100, 50, 30, 20, 10, 5)
for _name in (k for k in RUNS | CONTROLS if k.removeprefix("fashion_") in _COMPARED):
    _criteria = ("magnitude", "obd", "root", "recomputed")
    CURVES[f"{_name}-recomputed"] = Curves(_name, _FEW, _criteria, terms=True)
    if _name in ("plain", "sgd", "fashion_plain", "fashion_sgd"):
        CURVES[f"{_name}-obs"] = Curves(_name, _FEW, ("obs",))
CURVES["lenet5-without-retraining"] = Curves(
    "lenet5", (80, 60, 50, 40, 30, 20, 15, 10, 5), ("magnitude", "obd", "subset"), pruning.SCOPES
)

def _dropping(start, rate=1.0, steps=300, remaining=(70, 50, 30, 20, 10), scored_on=5000):
    """Retrained by the run's own recipe, its learning rate times `rate`."""
    recipe = (RUNS | CONTROLS)[start].recipe
    recipe = replace(recipe, steps=steps, learning_rate=rate * recipe.learning_rate)
    return Surgery(start, recipe, remaining, tuple(UNIT_CRITERIA), scored_on, units=True)


DROPPING = {
    "lenet300-units": _dropping("lenet300"),
    "lenet300_sgd-units": _dropping("lenet300_sgd", 0.1),
    "lenet5-units": _dropping("lenet5", 1.0, 150, (50, 20), 1000),
    "lenet5_sgd-units": _dropping("lenet5_sgd", 0.1, 150, (50, 20), 1000),
}
OUTCOMES = PLANS | CURVES | SURGERY | DROPPING


def trained(name: str) -> Runs:
    """The networks of a run, a key of RUNS or CONTROLS: fetched, or trained if not there."""
    run, found = _run(name), unflatten_dict(_kept(name), sep="/")
    params, history = jax.tree.map(jnp.asarray, found["params"]), pd.DataFrame(found["history"])
    return Runs(run.recipe, tuple(range(run.seeds)), params, history)


def outcome(name: str) -> pd.DataFrame:
    """The table of an experiment of the series, a key of OUTCOMES: fetched, or made (minutes).

    One row a measurement: `recipe` (the run it started from), `seed`, `criterion`, `scope`,
    `remaining` (percent of the parameters), `before` (accuracy before retraining, a fraction),
    `accuracy` and `loss`; and how many entries of each array are left, by the array's path.
    """
    checks.one_of("name", name, OUTCOMES)
    arrays = _kept(name)
    return pd.DataFrame({k: v for k, v in arrays.items() if k[:7] not in ("params/", "rounds/")})


def smallest(name: str) -> tuple:
    """The networks at the end of a plan of PICTURED, and how many rounds each entry was kept.

    Two pytrees of arrays ``[seeds, ...]``; what is pruned is zero. Masks nest: what was kept for
    more than r rounds is the mask of round r + 1.
    """
    checks.one_of("name", name, PICTURED)
    found = unflatten_dict(_kept(name), sep="/")
    return found["params"], found["rounds"]

def _kept(name: str) -> store.Arrays:
    return store.kept(name, _settings(name), lambda: _made(name))

def _run(name: str) -> Run:
    known = RUNS | CONTROLS | STARTS
    checks.one_of("name", name, known)
    return known[name]

def _settings(name: str) -> dict:
    """What a kept run or outcome depends on, in words."""
    plan = OUTCOMES.get(name)
    run = _run(plan.start if plan else name)
    settings = {"version": VERSION, "network": run.network.__name__, "recipe": asdict(run.recipe)}
    settings |= {"seeds": run.seeds, "data": data.SHA256[run.dataset]["train/images"]}
    if run.prepared:
        settings["prepared"] = run.prepared.__name__
    if plan:
        settings["plan"] = asdict(plan)
    return settings

def _made(name: str) -> store.Arrays:
    """The arrays of a run, trained anew, or of an outcome."""
    plan, networks = OUTCOMES.get(name), {}
    if name in PLANS:
        table, networks = _rounds(plan, name in PICTURED)
    elif plan:
        table = _curves(plan) if name in CURVES else _once(plan)
    else:
        run = _run(name)
        runs = train(run.network(), run.recipe, run.load().train, range(run.seeds))
        networks = {"params": jax.device_get(runs.params)}
        table = runs.history.add_prefix("history/")
    numeric = set(table.select_dtypes("number"))
    columns = {c: table[c].to_numpy(None if c in numeric else str) for c in table}
    return columns | flatten_dict(networks, sep="/")

def _rounds(plan: Plan, pictured: bool) -> tuple[pd.DataFrame, dict]:
    run, runs = _run(plan.start), trained(plan.start)
    network, (train, test) = run.network(), run.load()
    if held := plan.retraining.held_out:
        test = data.Examples(train.images[-held:], train.labels[-held:])
    percents, networks = [100 - level for level in plan.remaining], {}
    found = prune_and_retrain(
        network, runs.params, train, test, percents, plan.retraining,
        plan.criterion, plan.scope, runs.seeds, plan.scored_on,
    )  # fmt: skip
    if pictured:
        rounds = jax.tree.map(lambda k: k.sum(0, dtype="int8"), found.kept)
        networks = {"params": jax.device_get(found.params), "rounds": rounds}
    named = {"recipe": plan.start, "criterion": plan.criterion, "scope": plan.scope}
    table = found.table.assign(remaining=found.table.remaining.round(9), **named)
    left = _counts(found.kept, axes=2)  # rounds, then seeds: the order of the table's rows
    return pd.concat([table.drop(columns=["round", "percent"]), left], axis=1), networks

def _counts(kept, axes: int) -> pd.DataFrame:
    """How many entries of each array of a mask are True, one row for each place in leading axes."""
    arrays = {"/".join(checks.names_of(path)): a for path, a in jax.tree.leaves_with_path(kept)}
    return pd.DataFrame({k: a.sum(tuple(range(axes, a.ndim))).ravel() for k, a in arrays.items()})

def _once(plan: Surgery) -> pd.DataFrame:
    run, runs = _run(plan.start), trained(plan.start)
    network, (train, test) = run.network(), run.load()
    some, keys = train.first(plan.scored_on), jnp.stack([jax.random.key(s) for s in runs.seeds])
    criteria, cut = CRITERIA, retraining.cut_weights
    if plan.units:
        criteria, cut = UNIT_CRITERIA, retraining.cut_units
    if plan.retraining:
        retrain = trainer(network, plan.retraining, runs.params, train, keep_pruned)
    tables = []
    for criterion in plan.criteria:
        score = criteria[criterion]
        scores = each(lambda w, key, score=score: score(network, w, some, key), runs.params, keys)
        for level, update in product(plan.remaining, (0, 1)):
            of_one = partial(cut, network, percent=100 - level, examples=some, move=update)
            params, kept, left = each(of_one, runs.params, scores)
            found = before = each(lambda w: pruning.evaluate(network, w, test), params)
            if plan.retraining:
                params = retrain(params, keys, kept)[0]
                found = each(lambda w: pruning.evaluate(network, w, test), params)
            named = {"criterion": criterion, "update": update, "remaining": level}
            measured = {"seed": runs.seeds, "before": before.accuracy, **found._asdict()}
            rows = [pd.DataFrame(named | measured), _counts(left, axes=1)]
            tables.append(pd.concat(rows, axis=1))
    return pd.concat(tables, ignore_index=True).assign(recipe=plan.start, scope="all")

def _curves(plan: Curves) -> pd.DataFrame:
    run, runs = _run(plan.start), trained(plan.start)
    network, (train, test) = run.network(), run.load()
    percents = [100 - level for level in plan.remaining]

    def curve(params, scores, scope, criterion):
        if criterion == "obs":
            cuts = [surgeon.layerwise(network, params, train, p, ranked=scores) for p in percents]
        else:
            masks = [pruning.mask(scores, p, scope) for p in percents]
            cuts = [(pruning.masked(params, kept), kept) for kept in masks]
        kept = jax.tree.map(lambda *each: jnp.stack(each), *(kept for _, kept in cuts))
        found = pd.DataFrame([pruning.evaluate(network, w, test) for w, _ in cuts])
        parts = [found.assign(remaining=plan.remaining), _counts(kept, axes=1)]
        if plan.terms:
            parts.append(pd.DataFrame(taylor.loss_change(network, params, kept, train)._asdict()))
        return pd.concat(parts, axis=1)

    def curves(params):
        tables = []
        for criterion in plan.criteria:
            start = time.perf_counter()
            score = CRITERIA["obd" if criterion == "subset" else criterion]
            some = train.first(SUBSET) if criterion == "subset" else train
            scores = jax.block_until_ready(score(network, params, some, jax.random.key(0)))
            seconds = time.perf_counter() - start
            named = {"criterion": criterion, "recipe": plan.start, "seconds": seconds}
            for scope in plan.scopes:
                tables.append(curve(params, scores, scope, criterion).assign(scope=scope, **named))
        return pd.concat(tables, ignore_index=True)

    return runs.map(curves)


def main(names: Sequence[str] = ()) -> None:
    """Make runs and outcomes again from their seeds, all or those named, to where they ship."""
    for name in names or RUNS | OUTCOMES:
        checks.one_of("name", name, RUNS | OUTCOMES)
        start = time.perf_counter()
        store.write(store.SHIPPED / f"{name}.npz", _made(name), _settings(name))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
