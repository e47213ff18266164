"""Pruning with retraining: the loop of the OBD paper, and masks that no optimizer undoes.

The experiments of the series are shipped, as their curves, in ``prunelib/runs/retraining``;
``python -m prunelib.retraining`` makes them again from their seeds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from prunelib import checks, curvature, pruning, training
from prunelib.data import Examples, cache_dir, collected, load_mnist, scaled
from prunelib.models import lenet5, lenet300, mlp
from prunelib.passes import count, cross_entropy

SHIPPED = Path(__file__).parent / "runs" / "retraining"


# A mask that stays a mask ------------------------------------------------------------------------


def keep_pruned(kept: Any) -> optax.GradientTransformation:
    """Hold pruned parameters at exactly zero, whatever the optimizer wants.

    To be put *after* the optimizer: it replaces the update of each pruned parameter by ``-w``, so
    that no momentum, which still moves a parameter whose gradient is zero, revives anything.

    Parameters
    ----------
    kept : pytree of bool
        Shaped like params; False = pruned.

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
        checks.same_tree("kept", kept, "params", params)
        masked = jax.tree.map(lambda k, u, w: jnp.where(k, u, -w), kept, updates, params)
        return masked, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# The loop ----------------------------------------------------------------------------------------


def _magnitude(network, params, examples, key):
    return pruning.magnitude(params)


def _obd(network, params, examples, key):
    return pruning.obd_saliency(params, curvature.hessian_diagonal(network, params, examples))


def _random(network, params, examples, key):
    return pruning.random_scores(key, params)


CRITERIA = {"magnitude": _magnitude, "obd": _obd, "random": _random}


@dataclass(frozen=True)
class Retrained:
    """What `prune_and_retrain` went through, round by round, for each seed.

    Attributes
    ----------
    percents : array [rounds]
        Percent pruned.
    accuracy, loss : array [seeds, rounds]
        On the test examples, after retraining: a fraction, and nats.
    before : array [seeds, rounds]
        The accuracy after pruning and before retraining.
    kept : pytree of bool [rounds, seeds, ...]
        The masks.
    params : pytree [seeds, ...]
        After the last round.
    """

    percents: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    before: np.ndarray
    kept: Any
    params: Any


def prune_and_retrain(
    network,
    params: Any,
    train: Examples,
    test: Examples,
    percents: Sequence[float],
    recipe: training.Recipe,
    criterion: str = "obd",
    scope: str = "all",
    seeds: Sequence[int] = range(5),
    scored_on: int | None = None,
) -> Retrained:
    """Prune, retrain under the mask, repeat: the procedure of the OBD paper (1990), section 2.

    In each round the parameters are scored and ranked, the lowest go, and the rest is retrained
    for ``recipe.steps`` steps with a fresh optimizer. What is pruned stays pruned. A round that
    asks for no more than the round before only retrains, so ``[90] * 5`` is one-shot pruning with
    the retraining budget of five rounds.

    One compiled program prunes and another retrains, for all seeds together; every round, level
    and set of weights of the same recipe uses the same two.

    Parameters
    ----------
    network
        A models.Network, or any with ``apply(params, images)``; for a recipe with dropout,
        ``apply(params, images, keep=..., key=...)``.
    params : pytree ``[seeds, ...]``
        Trained networks, one for each seed, as in `training.Runs`.
    percents : sequence of numbers
        Percent pruned after each round, never falling.
    recipe : Recipe
        How a round retrains; its `std`, `summed` and `held_out` are not used.
    criterion : {"magnitude", "obd", "random"}
    scope : {"all", "layer"}
        See `pruning.ranks`.
    seeds : sequence of int
        For the order of the examples, dropout, and random scores.
    scored_on : int, optional
        How many training examples, the first ones, the Hessian's diagonal sees; by default all.

    Raises
    ------
    ValueError, TypeError
        If `percents` falls, is empty or not from 0 to 100, `criterion` or `scope` is unknown,
        `scored_on` is less than 1, the leading axis of `params` is not as long as `seeds`, or the
        recipe asks for dropout and the network has none; see also `checks.network_inputs`.
    FloatingPointError
        If retraining diverged, or scores are NaN, infinite or all exactly zero.
    """
    seeds = checks.seeds(seeds)
    percents = list(percents) if np.iterable(percents) else [percents]
    one = _check(network, params, train, test, percents, recipe, criterion, scope, seeds)
    if scored_on is not None:
        checks.whole("scored_on", scored_on)
    data = jax.device_put(collected(train))
    scored = jax.tree.map(lambda x: x[:scored_on], data)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    kept = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    rounds, last = [], 0
    for number, percent in enumerate(tqdm(percents, desc="prune, retrain", leave=False)):
        if percent > last:
            limits = jax.tree.map(jnp.int32, pruning.counts(one, percent, scope))
            fresh = jax.vmap(partial(jax.random.fold_in, data=2 * number))(keys)
            kept, params, sound = _prune(
                network, criterion, scope, params, kept, limits, scored, fresh
            )
            _check_scores(criterion, percent, sound)
            last = percent
        before = [_test(network, params, test, i)[0] for i in range(len(seeds))]
        fresh = jax.vmap(partial(jax.random.fold_in, data=2 * number + 1))(keys)
        params = _retrain(network, recipe, params, kept, data, fresh)
        checks.finite("the retrained parameters", params)
        after = [_test(network, params, test, i) for i in range(len(seeds))]
        accuracy, loss = zip(*after, strict=True)
        rounds.append((accuracy, loss, before, jax.tree.map(np.asarray, kept)))
    accuracy, loss, before, kept = zip(*rounds, strict=True)
    kept = jax.tree.map(lambda *masks: np.stack(masks), *kept)
    columns = (np.array(column).T for column in (accuracy, loss, before))
    return Retrained(np.array(percents), *columns, kept, params)


def _check(network, params, train, test, percents, recipe, criterion, scope, seeds):
    checks.one_of("criterion", criterion, CRITERIA)
    training.check_recipe(recipe)
    checks.params(params)
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if lengths != {(len(seeds),)}:
        raise ValueError(
            f"params: expected a leading axis over the {len(seeds)} seeds, got lengths "
            f"{sorted(lengths)}; pass runs.params and seeds=runs.seeds"
        )
    one = jax.tree.map(lambda leaf: leaf[0], params)
    for percent in percents:
        pruning.counts(one, percent, scope)
    if not percents or percents != sorted(percents):
        raise ValueError(
            f"percents: expected some, none lower than the one before, got {percents}; sort them"
        )
    for name, examples in (("train", train), ("test", test)):
        try:
            checks.network_inputs(network, one, examples)
        except (TypeError, ValueError, FloatingPointError) as error:
            raise type(error)(f"{name}: {error}") from error
    training.check_dropout(network, recipe)
    if count(train) < recipe.batch:
        raise ValueError(
            f"train: {count(train)} examples do not fill a batch of {recipe.batch}; pass more"
        )
    return one


def _check_scores(criterion, percent, sound):
    """`sound` has a bool for each seed: whether its scores are finite, and not all zero."""
    if not np.all(sound):
        raise FloatingPointError(
            f"the {criterion} scores before {percent} % are NaN, infinite or all exactly zero for "
            f"seeds number {np.flatnonzero(~np.asarray(sound)).tolist()}, so that nothing would be "
            "ranked; train with a smaller learning rate, or rank by magnitude"
        )


def _test(network, params, test, index):
    one = jax.tree.map(lambda leaf: leaf[index], params)
    return pruning.evaluate(network, one, test, batch_size=250)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prune(network, criterion, scope, params, kept, limits, examples, keys):
    """New masks and pruned params, one seed after the other: a pass over the data fills memory."""

    def of_one(params, kept, key):
        scores = CRITERIA[criterion](network, params, examples, key)
        flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(scores)])
        sound = jnp.isfinite(flat).all() & (flat != 0).any()
        scores = jax.tree.map(lambda s, k: jnp.where(k, s, -jnp.inf), scores, kept)
        places = pruning.ranks(scores, scope)
        kept = jax.tree.map(lambda place, limit: place >= limit, places, limits)
        return kept, pruning.apply_mask(params, kept), sound

    return jax.lax.map(lambda seed: of_one(*seed), (params, kept, keys))


@partial(jax.jit, static_argnums=(0, 1))
def _retrain(network, recipe, params, kept, examples, keys):
    images, labels = examples
    steps, batch = recipe.steps, recipe.batch

    def of_one(params, kept, key):
        optimizer = optax.chain(recipe.optimizer(), keep_pruned(kept))
        shuffle, noise = jax.random.split(key)
        epochs = jax.random.split(shuffle, -(-steps * batch // len(labels)))
        order = jax.vmap(lambda k: jax.random.permutation(k, len(labels)))(epochs)
        batches = order.ravel()[: steps * batch].reshape(steps, batch)

        def objective(params, batch, number):
            dropout = {}  # without it, apply need not know of it
            if recipe.keep < 1:
                dropout = {"keep": recipe.keep, "key": jax.random.fold_in(noise, number)}
            logits = network.apply(params, scaled(images[batch]), **dropout)
            return cross_entropy(logits, labels[batch]).mean()

        def step(state, scanned):
            params, moments = state
            gradient = jax.grad(objective)(params, *scanned)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), None

        start = (params, optimizer.init(params))
        return jax.lax.scan(step, start, (batches, jnp.arange(steps)))[0][0]

    return jax.vmap(of_one)(params, kept, keys)


# The experiments of the series -------------------------------------------------------------------

LENET300 = training.Recipe("lenet300", steps=10_000, batch=128)
LENET5 = training.Recipe("lenet5", steps=3_750)
KEPT = (40, 20, 12, 8, 5, 2, 1, 0.5)  # percent of the parameters, round by round


@dataclass(frozen=True)
class Plan:
    """An experiment: which network and recipe to start from, and how to prune it.

    Attributes
    ----------
    start : str
        A key of STARTS.
    criterion, scope : str
        See `prune_and_retrain`.
    one_shot : bool
        Whether each level is reached at once from the trained network, with the retraining budget
        that the loop through all of KEPT has used up when it arrives there; else level after level.
    steps, learning_rate : int, float
        Of the retraining in a round.
    kept : tuple of numbers
        The levels: percent kept.
    scored_on : int or None
        See `prune_and_retrain`.
    """

    start: str
    criterion: str
    scope: str = "all"
    one_shot: bool = False
    steps: int = 600
    learning_rate: float = 5e-3
    kept: tuple[float, ...] = KEPT
    scored_on: int | None = None

    @property
    def name(self) -> str:
        how = "one_shot" if self.one_shot else "iterative"
        return f"{self.start}-{self.criterion}-{self.scope}-{how}"

    @property
    def retraining(self) -> training.Recipe:
        """A round's recipe: the batches and dropout of the start, the plan's steps and rate."""
        start = STARTS[self.start][1]
        name = f"retrain_{start.name}"
        return training.Recipe(name, self.steps, start.batch, self.learning_rate, keep=start.keep)


STARTS = {
    "plain": (mlp, training.PLAIN, range(5)),
    "dropout": (mlp, training.FAIR_DROPOUT, range(5)),
    "lenet300": (lenet300, LENET300, range(3)),
    "lenet5": (lenet5, LENET5, range(3)),
}


def plans() -> list[Plan]:
    """Every experiment of notebooks 08 and 09, at full scale."""
    fine = dict(kept=(25, 12, 8, 6, 4, 2, 1))
    modest = dict(kept=(25, 12, 8, 4, 2, 1), steps=1000, learning_rate=1e-3, scored_on=SUBSET)
    some = dict(one_shot=True, kept=(20, 8, 2))
    found = [Plan("plain", "random")]
    for criterion in ("magnitude", "obd"):
        found += [Plan("plain", criterion, scope) for scope in pruning.SCOPES]
        found += [Plan("plain", criterion, **some), Plan("dropout", criterion)]
        found += [Plan("lenet300", criterion, **fine), Plan("lenet5", criterion, **modest)]
    return found


@dataclass(frozen=True)
class Outcome:
    """The curves of an experiment.

    Attributes
    ----------
    kept : array [levels]
        Percent of the parameters kept.
    accuracy, loss, before : array [seeds, levels]
        See `Retrained`.
    left : dict of arrays [seeds, levels]
        How many entries each array of the network has left, by its path, such as "dense1/kernel".
    """

    kept: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    before: np.ndarray
    left: dict[str, np.ndarray]


def experiment(plan: Plan, mnist, *, fresh: bool = False) -> Outcome:
    """The outcome of `plan` at full scale (minutes), or the same if it was run before.

    It is fetched only if network, recipes, data, seeds and plan all agree with what was kept.

    Parameters
    ----------
    plan : Plan
    mnist
        What `data.load_mnist` gives: examples `train` and `test`.
    fresh : bool
        Run it in any case, and keep nothing.

    Raises
    ------
    TypeError, ValueError
        If `plan` is no Plan or something in it is unknown, or `mnist` is no such thing; see also
        `prune_and_retrain`.
    """
    _check_plan(plan)
    _check_data(mnist)
    key = _key(plan, mnist)
    own = cache_dir() / "retraining" / f"{plan.name}.json"
    for file in () if fresh else (SHIPPED / f"{plan.name}.json", own):
        outcome = _load(file, key)
        if outcome is not None:
            return outcome
    outcome = _run(plan, mnist)
    if not fresh:
        _save(outcome, own, key)
    return outcome


def _check_plan(plan):
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}; choose one of plans()")
    checks.one_of("plan.start", plan.start, STARTS)
    checks.one_of("plan.criterion", plan.criterion, CRITERIA)
    checks.one_of("plan.scope", plan.scope, pruning.SCOPES)
    training.check_recipe(plan.retraining)
    if plan.one_shot and not set(plan.kept) <= set(KEPT):
        raise ValueError(
            f"plan.kept: a one-shot level has the budget of the loop through {KEPT} up to it, "
            f"got {plan.kept}; choose some of those"
        )


def _check_data(mnist):
    for part in ("train", "test"):
        if not hasattr(mnist, part):
            raise TypeError(
                f"mnist: expected examples train and test, got {type(mnist).__name__} without "
                f"{part}; pass load_mnist()"
            )
        checks.examples(getattr(mnist, part))


def _key(plan, mnist) -> dict:
    build, recipe, seeds = STARTS[plan.start]
    key = training.run_key(build(), recipe, mnist.train, seeds)
    plans = {"plan": asdict(plan), "retraining": asdict(plan.retraining)}
    return key | {"test": _content(mnist.test)} | plans


def _content(examples):
    return training.content(tuple(collected(examples)))


def _run(plan, mnist) -> Outcome:
    build, recipe, seeds = STARTS[plan.start]
    network = build()
    runs = training.train(network, recipe, mnist.train, seeds)

    def through(percents):
        return prune_and_retrain(
            network, runs.params, mnist.train, mnist.test, percents, plan.retraining,
            plan.criterion, plan.scope, runs.seeds, plan.scored_on,
        )  # fmt: skip

    if plan.one_shot:  # after pruning look at the first round, after retraining at the last
        parts = [through([100 - level] * (KEPT.index(level) + 1)) for level in plan.kept]
        first, last = slice(0, 1), slice(-1, None)
    else:
        parts = [through([100 - level for level in plan.kept])]
        first = last = slice(None)

    def joined(field, rounds):
        return np.concatenate([getattr(part, field)[:, rounds] for part in parts], axis=1)

    left = {}
    for path, _ in jax.tree.leaves_with_path(parts[0].kept):
        masks = np.concatenate([_at(part.kept, path)[last] for part in parts])
        left[_name(path)] = masks.sum(tuple(range(2, masks.ndim))).T
    return Outcome(
        np.array(plan.kept, float),
        joined("accuracy", last),
        joined("loss", last),
        joined("before", first),
        left,
    )


def _name(path):
    return "/".join(entry.key for entry in path)


def _at(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


def _save(outcome: Any, file: Path, key: dict) -> None:
    plain = outcome if isinstance(outcome, dict) else asdict(outcome)
    plain = jax.tree.map(lambda x: np.round(x, 6).tolist(), plain)
    text = json.dumps({"key": key, "outcome": plain}) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".unfinished-") as folder:
            whole = Path(folder, file.name)
            whole.write_text(text)
            os.replace(whole, file)
    except OSError as error:
        warnings.warn(f"the outcome cannot be kept in {file} ({error})", stacklevel=3)


def _load(file: Path, key: dict) -> Outcome | None:
    found = _fetch(file, key, {field.name for field in fields(Outcome)})
    return None if found is None else Outcome(**found)


def _fetch(file: Path, key: dict, names: set[str]) -> dict | None:
    """What is kept in `file` under this key, as arrays; None if there is no such thing, whole."""
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        if record["key"] != json.loads(json.dumps(key)):
            return None
        found = jax.tree.map(np.array, record["outcome"], is_leaf=lambda x: isinstance(x, list))
        _check_whole(found, names, len(key["seeds"]))
    except Exception as error:  # whatever is wrong with it, it can be computed again
        warnings.warn(f"{file} is damaged ({error}); running it again", stacklevel=4)
        return None
    return found


# What no curve exceeds; accuracies, under whatever name, 1.
_MOST = {"kept": 100, "loss": np.inf, "seconds": np.inf, "megabytes": np.inf, "left": np.inf}


def _check_whole(found, names, seeds):
    """Raise unless the dict has these names, and its curves are possible, ``[seeds, levels]``."""
    if found.keys() != names or not jax.tree.leaves(found["left"]):
        raise ValueError(f"it has {sorted(found)} instead of {sorted(names)}")
    checks.finite("its numbers", found)
    levels = len(found["kept"])
    deep = {"left": 3 if names == CURVES_NAMES else 2}  # by array, or by curve and array
    shapes = {"kept": (levels,), "seconds": (seeds,), "megabytes": ()}
    for path, leaf in jax.tree.leaves_with_path(found):
        name, where = path[0].key, jax.tree_util.keystr(path)
        if len(path) != deep.get(name, 1) or leaf.shape != shapes.get(name, (seeds, levels)):
            raise ValueError(f"{where} has shape {leaf.shape}")
        if leaf.dtype.kind not in ("i" if name == "left" else "if"):
            raise TypeError(f"{where} has numbers of type {leaf.dtype}")
        if leaf.min() < 0 or leaf.max() > _MOST.get(name, 1):
            raise ValueError(f"{where} goes from {leaf.min()} to {leaf.max()}")


# LeNet-5 without retraining ----------------------------------------------------------------------

CURVES = "lenet5-without-retraining"
CURVES_KEPT = (80, 60, 50, 40, 30, 20, 15, 10, 5)  # percent of the parameters
SUBSET = 3000  # examples, the first ones
CURVES_NAMES = {"kept", "seconds", "megabytes", "left"} | {
    f"{criterion}-{scope}"
    for criterion in ("magnitude", "obd", "subset")
    for scope in pruning.SCOPES
}


def lenet5_curves(mnist, *, fresh: bool = False) -> dict:
    """Pruning LeNet-5 without retraining, by the diagonal over all 60,000 training examples.

    Kept and fetched like the outcome of `experiment`; at full scale it takes minutes a seed.

    Returns
    -------
    dict
        "kept" ``[levels]``, percent of the parameters; "seconds" ``[seeds]`` that the diagonal
        took, and "megabytes", the peak memory of the process that computed it all. For each
        criterion ("magnitude", "obd", and "subset": OBD by the first SUBSET examples) and scope,
        by a name such as "obd-all": the test accuracy ``[seeds, levels]``. By "left" and such a
        name, a dict: how many entries each array of the network has left ``[seeds, levels]``.
    """
    _check_data(mnist)
    key = _curves_key(mnist)
    own = cache_dir() / "retraining" / f"{CURVES}.json"
    for file in () if fresh else (SHIPPED / own.name, own):
        found = _fetch(file, key, CURVES_NAMES)
        if found is not None:
            return found
    curves = _curves(mnist)
    if not fresh:
        _save(curves, own, key)
    return curves


def _curves_key(mnist) -> dict:
    build, recipe, seeds = STARTS["lenet5"]
    key = training.run_key(build(), recipe, mnist.train, seeds)
    return key | {"test": _content(mnist.test), "kept": list(CURVES_KEPT), "subset": SUBSET}


def _curves(mnist) -> dict:
    build, recipe, seeds = STARTS["lenet5"]
    runs = training.train(build(), recipe, mnist.train, seeds)
    each = [_curves_of_one(build(), runs.select(i), mnist) for i in range(len(seeds))]
    curves = jax.tree.map(lambda *values: np.stack(values), *each)
    return curves | {"kept": np.array(CURVES_KEPT, float), "megabytes": np.array(_peak_memory())}


def _curves_of_one(network, params, mnist) -> dict:
    start = time.perf_counter()
    whole = jax.block_until_ready(curvature.hessian_diagonal(network, params, mnist.train))
    found = {"seconds": np.array(time.perf_counter() - start), "left": {}}
    few = Examples(mnist.train.images[:SUBSET], mnist.train.labels[:SUBSET])
    part = curvature.hessian_diagonal(network, params, few)
    scores = {
        "magnitude": pruning.magnitude(params),
        "obd": pruning.obd_saliency(params, whole),
        "subset": pruning.obd_saliency(params, part),
    }
    percents = [100 - level for level in CURVES_KEPT]
    for criterion, score in scores.items():
        for scope in pruning.SCOPES:
            name = f"{criterion}-{scope}"
            found[name] = pruning.accuracy_curve(
                network, params, score, mnist.test, percents, scope, batch_size=500
            ).accuracy
            masks = [pruning.mask(score, percent, scope) for percent in percents]
            found["left"][name] = {
                _name(path): np.array([int(_at(kept, path).sum()) for kept in masks])
                for path, _ in jax.tree.leaves_with_path(params)
            }
    return found


def _peak_memory() -> float:
    """Of this process so far, in megabytes (2**20 bytes)."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


# Making it all again -----------------------------------------------------------------------------


def main(names: Sequence[str] = ()) -> None:
    """Make what is shipped again from its seeds: the named parts, or all, one process for each."""
    by_name = {plan.name: plan for plan in plans()}
    known = ["lenet300", "lenet5", *by_name, CURVES]
    if not names:
        for name in known:
            subprocess.run([sys.executable, "-m", "prunelib.retraining", name], check=True)
        return
    mnist = load_mnist()
    for name in names:
        checks.one_of("name", name, known)
        if name == CURVES:
            found = _curves(mnist)
            _save(found, SHIPPED / f"{name}.json", _curves_key(mnist))
            print(f"{name}: {found['seconds'].round()} s, {found['megabytes']:.0f} MB", flush=True)
        elif name in by_name:
            plan = by_name[name]
            outcome = _run(plan, mnist)
            _save(outcome, SHIPPED / f"{name}.json", _key(plan, mnist))
            print(f"{name}: {np.round(100 * outcome.accuracy.mean(0), 2)}", flush=True)
        else:
            build, recipe, seeds = STARTS[name]
            network = build()
            runs = training.train(network, recipe, mnist.train, seeds, fresh=True)
            key = training.run_key(network, recipe, mnist.train, seeds)
            training.save(runs, training.SHIPPED / recipe.name, key)
            print(f"{name}: loss {runs.history['loss'][:, -1].mean():.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
