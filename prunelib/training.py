"""Recipes, and training all seeds of a recipe together in one compiled scan.

A finished run is kept with Orbax and found again by a key over everything that determines it.
The runs of this series are shipped in ``prunelib/runs``; ``python -m prunelib.training`` makes
them again from their seeds.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm.auto import tqdm

from prunelib import checks
from prunelib.data import Examples, cache_dir, load_mnist
from prunelib.models import Network, mlp
from prunelib.passes import cross_entropy

SHIPPED = Path(__file__).parent / "runs"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam on shuffled batches.

    Attributes
    ----------
    name : str
    steps : int
        Optimizer steps, of `batch` examples each.
    learning_rate : float
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
    """

    name: str
    steps: int
    batch: int = 64
    learning_rate: float = 1e-3
    decay: bool = True
    keep: float = 1.0
    std: float | None = None
    summed: bool = False
    held_out: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax optimizer of this recipe."""
        rate = self.learning_rate
        return optax.adam(optax.cosine_decay_schedule(rate, self.steps) if self.decay else rate)


PLAIN = Recipe("plain", steps=20_000)
FAIR_DROPOUT = Recipe("fair_dropout", steps=20_000, keep=0.8)
_AS_IN_2016 = dict(steps=50_000, decay=False, std=0.02, summed=True, held_out=5000)
PLAIN_2016 = Recipe("plain_2016", learning_rate=1e-4, **_AS_IN_2016)
DROPOUT_2016 = Recipe("dropout_2016", learning_rate=1e-5, keep=0.8, **_AS_IN_2016)


@dataclass(frozen=True)
class Runs:
    """Networks trained by one recipe from several seeds.

    Attributes
    ----------
    recipe : Recipe
    seeds : tuple of int
    params : pytree
        Shaped like the network's params, with a leading axis over seeds.
    history : dict of arrays
        "step" ``[points]``; "loss" (mean over the batches since the last point, in nats) and
        "accuracy" (likewise, a fraction), both ``[seeds, points]`` and with dropout on.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    params: Any
    history: dict[str, np.ndarray]

    def select(self, index: int) -> Any:
        """The params of the run at place `index` (0 is the first seed)."""
        if not 0 <= index < len(self.seeds):
            raise IndexError(f"index: expected 0 to {len(self.seeds) - 1}, got {index}")
        return jax.tree.map(lambda leaf: leaf[index], self.params)


def train(
    network: Network,
    recipe: Recipe,
    examples: Examples,
    seeds: Sequence[int] = range(5),
    *,
    fresh: bool = False,
) -> Runs:
    """Train one network for each seed, or fetch the same runs if they were trained before.

    A run is fetched only if recipe, network, data and seeds all agree with it and its numbers have
    the checksum that was kept with them; otherwise it is trained anew, with a warning.

    Parameters
    ----------
    fresh : bool
        Train in any case, and keep nothing.

    Raises
    ------
    ValueError
        If there are fewer examples than a batch holds, `seeds` is empty, or a recipe's numbers
        make no sense; see also `checks.network_inputs`.
    FloatingPointError
        If the training diverged.
    """
    seeds = tuple(int(seed) for seed in seeds)
    _check(network, recipe, examples, seeds)
    if fresh:
        return _train(network, recipe, examples, seeds)
    key = run_key(network, recipe, examples, seeds)
    kept = cache_dir() / "runs" / f"{recipe.name}-{_digest(key)[:16]}"
    for folder in (SHIPPED / recipe.name, kept):
        runs = _load(folder, key, recipe, seeds)
        if runs is not None:
            return runs
    runs = _train(network, recipe, examples, seeds)
    save(runs, kept, key)
    return runs


def _check(network, recipe, examples, seeds):
    checks.examples(examples)
    checks.network_inputs(network, network.init(jax.random.key(0)), examples)
    if not seeds:
        raise ValueError("seeds: there are none; pass for instance range(5)")
    if recipe.steps < 1 or recipe.batch < 1 or not 0 < recipe.keep <= 1 or recipe.held_out < 0:
        raise ValueError(f"recipe: steps, batch >= 1, 0 < keep <= 1, held_out >= 0; got {recipe}")
    if len(examples.labels) - recipe.held_out < recipe.batch:
        raise ValueError(
            f"examples: {len(examples.labels)} less {recipe.held_out} held out do not fill a "
            f"batch of {recipe.batch}; pass more, or a recipe with a smaller batch"
        )


# The compiled run --------------------------------------------------------------------------------


def _train(network, recipe, examples, seeds) -> Runs:
    used = len(examples.labels) - recipe.held_out
    images, labels = jnp.asarray(examples.images[:used]), jnp.asarray(examples.labels[:used])
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    starts, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    start = jax.vmap(partial(_start, network, recipe))(starts)
    global _bar
    with tqdm(total=recipe.steps, desc=f"training {recipe.name}", unit="step", leave=False) as _bar:
        params, loss, accuracy = _scan(network, recipe, start, images, labels, keys)
        jax.block_until_ready(params)
    checks.finite(f"the parameters trained by {recipe.name!r}", params)
    points = np.arange(1, loss.shape[0] + 1) * _interval(recipe)
    history = {"step": points, "loss": np.array(loss.T), "accuracy": np.array(accuracy.T)}
    return Runs(recipe, seeds, params, history)


def _start(network, recipe, key):
    params = network.init(key)
    if recipe.std is None:
        return params
    leaves, structure = jax.tree.flatten(params)
    normal = jax.nn.initializers.truncated_normal(recipe.std)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


_bar = None


def _advance(steps):
    if _bar is not None:
        _bar.update(int(steps))


def _interval(recipe) -> int:
    """Steps between two points of the history: 50 points, or as many as divide the steps."""
    return next(k for k in range(max(1, recipe.steps // 50), recipe.steps + 1) if recipe.steps % k == 0)


@partial(jax.jit, static_argnums=(0, 1))
def _scan(network, recipe, start, images, labels, keys):
    optimizer = recipe.optimizer()
    interval = _interval(recipe)

    def order(key):
        """Every example once, in random order, again and again: ``[steps, batch]``."""
        epochs = -(-recipe.steps * recipe.batch // len(labels))
        shuffled = jax.vmap(lambda k: jax.random.permutation(k, len(labels)))(
            jax.random.split(key, epochs)
        )
        return shuffled.ravel()[: recipe.steps * recipe.batch].reshape(recipe.steps, recipe.batch)

    def step(state, batch, number):
        params, moments, key = state
        dropout = jax.random.fold_in(key, number) if recipe.keep < 1 else None

        def objective(params):
            logits = network.apply(params, images[batch], keep=recipe.keep, key=dropout)
            losses = cross_entropy(logits, labels[batch])
            total = losses.sum() if recipe.summed else losses.mean()
            return total, (losses.mean(), (logits.argmax(1) == labels[batch]).mean())

        gradient, metrics = jax.grad(objective, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments, key), metrics

    def one_step(states, scanned):
        batches, number = scanned
        return jax.vmap(step, in_axes=(0, 0, None))(states, batches, number)

    def between_points(states, scanned):
        states, metrics = jax.lax.scan(one_step, states, scanned)
        jax.debug.callback(_advance, interval)
        return states, jax.tree.map(lambda m: m.mean(0), metrics)

    orders, noise = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    batches = jax.vmap(order)(orders).swapaxes(0, 1)
    scanned = (
        batches.reshape(-1, interval, *batches.shape[1:]),
        jnp.arange(recipe.steps).reshape(-1, interval),
    )
    states = (start, jax.vmap(optimizer.init)(start), noise)
    (params, _, _), (loss, accuracy) = jax.lax.scan(between_points, states, scanned)
    return params, loss, accuracy


# Keeping finished runs ---------------------------------------------------------------------------


def run_key(network: Network, recipe: Recipe, examples: Examples, seeds: Sequence[int]) -> dict:
    """Everything that determines a run, as a JSON-able dict.

    Versions of libraries are not in it: they change the last digits of a run, not what it is.
    """
    content = hashlib.sha256()
    for array in examples:
        content.update(np.ascontiguousarray(array))
    start = network.init(jax.random.key(0))
    return {
        "format": 1,
        "recipe": dataclasses.asdict(recipe),
        "layers": [_describe(layer) for layer in network.layers],
        # Two digits: what initializer it is, not in which last bits a processor differs.
        "spread": [f"{float(jnp.std(leaf)):.1e}" for leaf in jax.tree.leaves(start)],
        "data": content.hexdigest(),
        "seeds": list(seeds),
    }


def _describe(layer) -> str:
    if not layer.name:
        return getattr(layer.function, "__name__", repr(layer.function))
    settings = vars(layer.function(rngs=nnx.Rngs(0)))
    plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str | tuple)}
    return f"{layer.name} = {layer.kind.__name__} {sorted(plain.items())}"


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _content(tree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf)
    return digest.hexdigest()


def save(runs: Runs, folder: Path, key: dict) -> bool:
    """Keep runs in `folder`, whole or not at all; False (and a warning) if it cannot be written."""
    import orbax.checkpoint as ocp

    tree = {"params": jax.tree.map(np.asarray, runs.params), "history": runs.history}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as temporary:
            whole = Path(temporary) / "run"
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(whole.absolute() / "arrays", tree)
            (whole / "arrays" / "commit_success.txt").unlink(missing_ok=True)
            (whole / "run.json").write_text(
                json.dumps({"key": key, "content": _content(tree)}, indent=1) + "\n"
            )
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(whole, folder)
    except OSError as error:
        if folder.exists():
            return True  # another process was faster, with the same run
        warnings.warn(f"the run cannot be kept in {folder} ({error}); it will be trained again",
                      stacklevel=3)
        return False
    return True


def _load(folder: Path, key: dict, recipe: Recipe, seeds: tuple[int, ...]) -> Runs | None:
    if not folder.exists():
        return None
    import orbax.checkpoint as ocp

    try:
        record = json.loads((folder / "run.json").read_text())
        if record["key"] != key:
            return None
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder.absolute() / "arrays")
        if _content(tree) != record["content"]:
            raise ValueError("its numbers do not have the checksum kept with them")
    except Exception as error:
        warnings.warn(
            f"the kept run in {folder} is damaged ({error}); training it again. "
            "Delete that folder to be rid of this warning",
            stacklevel=3,
        )
        return None
    return Runs(recipe, seeds, jax.tree.map(jnp.asarray, tree["params"]), tree["history"])


# The runs of the series --------------------------------------------------------------------------

SERIES = [(mlp, PLAIN), (mlp, FAIR_DROPOUT), (mlp, PLAIN_2016), (mlp, DROPOUT_2016)]


def main() -> None:
    """Train the runs of the series from their seeds, and put them where they are shipped."""
    mnist = load_mnist()
    for build, recipe in SERIES:
        network = build()
        runs = train(network, recipe, mnist.train, fresh=True)
        save(runs, SHIPPED / recipe.name, run_key(network, recipe, mnist.train, runs.seeds))
        print(f"{recipe.name}: loss {runs.history['loss'][:, -1].mean():.4f}")


if __name__ == "__main__":
    main()
