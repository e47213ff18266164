"""Recipes, and training all seeds of a recipe together in one compiled scan.

A finished run is kept with Orbax and found again by a key over everything that determines it.
The runs of this series are shipped in ``prunelib/runs``; ``python -m prunelib.training`` makes
them again from their seeds.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CellType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from tqdm.auto import tqdm

from prunelib import checks
from prunelib.data import Examples, cache_dir, collected, load_mnist, scaled
from prunelib.models import Network, dropout_here, mlp
from prunelib.passes import count, cross_entropy

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
# What the study left out: its two differences, one at a time; and its recipe cut short.
SLOW_2016 = dataclasses.replace(PLAIN_2016, name="slow_2016", learning_rate=1e-5)
FAST_DROPOUT_2016 = dataclasses.replace(DROPOUT_2016, name="fast_dropout_2016", learning_rate=1e-4)
SHORT_2016 = dataclasses.replace(PLAIN_2016, name="short_2016", steps=1500)
PLAIN_TENTH = dataclasses.replace(PLAIN, name="plain_tenth", steps=2000)
PLAIN_HUNDREDTH = dataclasses.replace(PLAIN, name="plain_hundredth", steps=200)


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
            raise IndexError(
                f"index: expected 0 to {len(self.seeds) - 1}, got {index}; "
                f"it is a place in seeds = {self.seeds}"
            )
        return _take(self.params, index)


@jax.jit
def _take(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


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
    the checksum that was kept with them; otherwise it is trained anew, with a warning if what was
    kept is damaged.

    Parameters
    ----------
    network : Network
    recipe : Recipe
    examples : Examples
        NumPy or JAX arrays, wherever they are: what counts is their numbers. Training runs on
        JAX's default device, with all images in its memory (as uint8 if they are): a batch is too
        small to share out, and the run is to be the same to the last bit wherever the data are.
    seeds : sequence of int
        One network each: for its start, the order of its examples, and dropout.
    fresh : bool
        Train in any case, and keep nothing.

    Raises
    ------
    ValueError, TypeError
        If there are fewer examples than a batch holds, `seeds` is empty or not of integers, a
        recipe's numbers make no sense or it asks for dropout that the network has no place for, or
        `run_key` cannot tell the run from others; see also `checks.network_inputs`.
    FloatingPointError
        If the training diverged.
    """
    seeds = _checked(network, recipe, examples, seeds)
    examples = collected(examples)
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


def _checked(network, recipe, examples, seeds) -> tuple[int, ...]:
    """The seeds, if all arguments of `train` make sense."""
    plain = isinstance(network, Network) and all(
        getattr(getattr(network, name), "__func__", None) is getattr(Network, name)
        for name in ("init", "apply")
    )
    if not plain:
        raise TypeError(
            "network: expected a models.Network with the init and apply of that class, got "
            f"{type(network).__name__}; make what is special a layer of a models.Network"
        )
    check_recipe(recipe)
    check_dropout(network, recipe)
    start = _draw(_builders(network), recipe.std, jax.random.key(0))
    checks.network_inputs(network, start, examples)
    seeds = checks.seeds(seeds)
    if count(examples) - recipe.held_out < recipe.batch:
        raise ValueError(
            f"examples: {count(examples)} less {recipe.held_out} held out do not fill a "
            f"batch of {recipe.batch}; pass more, or a recipe with a smaller batch"
        )
    return seeds


def check_recipe(recipe: Recipe) -> None:
    """Raise unless `recipe` is a Recipe whose name can name a folder and whose numbers make sense.

    Raises
    ------
    TypeError
        If it is no Recipe.
    ValueError
        If its name or a number is not as it should be; the message says how.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe: expected a Recipe, got {type(recipe).__name__}; pass for instance PLAIN"
        )
    plain = isinstance(recipe.name, str) and re.fullmatch(r"[\w-]+( [\w-]+)*", recipe.name)
    if not plain or recipe.name == "retraining":
        raise ValueError(
            f"recipe: its name is to name a folder, got {recipe.name!r}; use letters, digits, "
            "_, - and single spaces, and not 'retraining', which is taken"
        )
    integers = (recipe.steps, 1), (recipe.batch, 1), (recipe.held_out, 0)
    numbers = (recipe.learning_rate, np.inf), (recipe.keep, 1), (recipe.std or 1, np.inf)
    if not (
        all(type(number) is int and number >= least for number, least in integers)
        and all(type(n) in (int, float) and 0 < n <= most and n < np.inf for n, most in numbers)
        and (recipe.std is None or recipe.std > 0)
        and type(recipe.decay) is type(recipe.summed) is bool
    ):
        raise ValueError(
            "recipe: expected integers steps >= 1, batch >= 1, held_out >= 0; 0 < keep <= 1; "
            "learning_rate > 0; std > 0 or None; decay and summed True or False (Python's own "
            f"int, float and bool); got {recipe}; change it by dataclasses.replace"
        )


def check_dropout(network: Any, recipe: Recipe) -> None:
    """Raise ValueError if `recipe` asks for dropout and `network` has no place for it."""
    if recipe.keep == 1:
        return
    if isinstance(network, Network):
        there = any(layer.function is dropout_here for layer in network.layers)
    else:
        names = inspect.signature(network.apply).parameters
        there = {"keep", "key"} <= names.keys()
    if not there:
        raise ValueError(
            f"network, recipe: {recipe.name!r} keeps activations with probability {recipe.keep}, "
            "but the network has no place for dropout; put models.dropout_here among its layers "
            "(or give apply keep and key), or use a recipe with keep=1"
        )


# The compiled run --------------------------------------------------------------------------------


def _train(network, recipe, examples, seeds) -> Runs:
    used = len(examples.labels) - recipe.held_out
    images = jnp.asarray(examples.images[:used])
    labels = jnp.asarray(examples.labels[:used], jnp.int32)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    starts, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    start = jax.vmap(partial(_start, network, recipe.std))(starts)
    with _progress(recipe) as number:
        params, loss, accuracy = _scan(network, recipe, start, images, labels, keys, number)
        jax.block_until_ready(params)
    checks.finite(f"training by {recipe.name!r}: the loss", loss)
    checks.finite(f"training by {recipe.name!r}: the parameters", params)
    points = np.arange(1, loss.shape[0] + 1) * _interval(recipe)
    history = {"step": points, "loss": np.array(loss.T), "accuracy": np.array(accuracy.T)}
    return Runs(recipe, seeds, params, history)


def _start(network, std, key):
    params = network.init(key)
    if std is None:
        return params
    leaves, structure = jax.tree.flatten(params)
    normal = jax.nn.initializers.truncated_normal(std)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


# Compiled code outlives the bar of one call; so it is told a number, and reports to that number.
_bars: dict[int, tqdm] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def _progress(recipe):
    """A bar on the screen, and the number by which `_advance` finds it."""
    number = next(_numbers)
    with tqdm(total=recipe.steps, desc=f"training {recipe.name}", unit="step", leave=False) as bar:
        _bars[number] = bar
        try:
            yield number
            jax.effects_barrier()  # the last reports
        finally:
            del _bars[number]


def _advance(number, steps):
    if int(number) in _bars:
        _bars[int(number)].update(int(steps))


def _interval(recipe) -> int:
    """Steps between two points of the history: 50 points, or as many as divide the steps."""
    steps = recipe.steps
    return next(k for k in range(max(1, steps // 50), steps + 1) if steps % k == 0)


@partial(jax.jit, static_argnums=(0, 1))
def _scan(network, recipe, start, images, labels, keys, number):
    optimizer = recipe.optimizer()
    interval = _interval(recipe)

    def order(key):
        """Every example once, in random order, again and again: ``[steps, batch]``."""
        epochs = -(-recipe.steps * recipe.batch // len(labels))
        shuffled = jax.vmap(lambda k: jax.random.permutation(k, len(labels)))(
            jax.random.split(key, epochs)
        )
        return shuffled.ravel()[: recipe.steps * recipe.batch].reshape(recipe.steps, recipe.batch)

    def step(state, batch, count):
        params, moments, key = state
        dropout = jax.random.fold_in(key, count) if recipe.keep < 1 else None

        def objective(params):
            logits = network.apply(params, images[batch], keep=recipe.keep, key=dropout)
            losses = cross_entropy(logits, labels[batch])
            total = losses.sum() if recipe.summed else losses.mean()
            return total, (losses.mean(), (logits.argmax(1) == labels[batch]).mean())

        gradient, metrics = jax.grad(objective, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments, key), metrics

    def one_step(states, scanned):
        return jax.vmap(step, in_axes=(0, 0, None))(states, *scanned)

    def between_points(states, scanned):
        states, metrics = jax.lax.scan(one_step, states, scanned)
        jax.debug.callback(_advance, number, interval)
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
    """Everything that determines a run, as a JSON-able dict; the same in every process.

    Versions of libraries are not in it: they change the last digits of a run, not what it is.

    Raises
    ------
    ValueError
        If a layer calls Python back, whose code is in no key.
    """
    content = hashlib.sha256()
    examples = collected(examples)
    for array in (examples.images, examples.labels.astype(np.int32)):
        array = np.ascontiguousarray(array)
        content.update(f"{array.dtype} {array.shape}".encode())
        content.update(array)
    params = network.shapes
    x = jax.eval_shape(lambda images: scaled(images[:1]), examples.images)
    layers = []
    for layer in network.layers:
        layers.append(_describe(layer, params, x))
        x = jax.eval_shape(layer, params, x)
    return {
        "format": 4,
        "recipe": dataclasses.asdict(recipe),
        "layers": layers,
        "start": _sketch(_draw(_builders(network), recipe.std, jax.random.key(0))),
        "made by": {name: _words(build) for name, build in _builders(network)},
        "data": content.hexdigest(),
        "seeds": [int(seed) for seed in seeds],
    }


def _builders(network):
    """What makes the layers. Equal networks compute the same, and may yet start otherwise."""
    return tuple((layer.name, layer.function) for layer in network.layers if layer.name)


# It runs once or twice, so the least time goes into compiling it.
@partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def _draw(builders, std, key):
    return _start(Network(builders), std, key)


def _sketch(start) -> dict[str, str]:
    """What each array starts as: to two digits, since processors differ in the last ones."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(start):
        low, spread, high = (f"{f(np.asarray(leaf)):.1e}" for f in (np.min, np.std, np.max))
        text = f"{leaf.dtype} {leaf.shape} from {low} to {high}, spread {spread}"
        found[jax.tree_util.keystr(path)] = text
    return found


def _describe(layer, params, x) -> str:
    """A layer by its class and settings; if those are not all told in words, by what it computes.

    Words are the same in all versions of JAX, and a program is not.
    """
    if not layer.name:
        return in_words(layer.function) or _computed(layer.function, x)
    module = vars(nnx.eval_shape(lambda: layer.function(rngs=nnx.Rngs(0))))
    settings = {
        name: value
        for name, value in module.items()
        if not (value is None or isinstance(value, nnx.Variable) or name.startswith("_pytree_"))
    }
    text = f"{layer.name} = {_words(layer.kind)} {_words(settings)}"
    if _UNTOLD in text:
        own = {layer.name: params[layer.name]}
        return f"{text}: {_computed(layer, own, x)}"
    return text


_UNTOLD = "<?>"  # stands where something of a value is not told
_LIBRARIES = ("jax", "flax", "numpy", "optax", "prunelib")


def in_words(value: Any) -> str | None:
    """What tells `value` from all others, the same in every process; None if words do not."""
    words = _words(value)
    return None if _UNTOLD in words else words


def _words(value: Any, within: tuple = ()) -> str:
    """What can be told of a value; with _UNTOLD in it if that is not all."""
    if any(value is each for each in within):  # a function that its own closure holds
        return _UNTOLD
    tell = partial(_words, within=(*within, value))
    if isinstance(value, int | float | str | None):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(tell, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{tell(k)}: {tell(v)}' for k, v in value.items()))}}}"
    if isinstance(value, np.dtype | jax.lax.Precision):
        return value.name
    if isinstance(value, np.ndarray | np.generic | jax.Array) and value.dtype != object:
        return content(value)
    if type(value) is partial:
        return f"partial({tell(value.func)}, {tell(value.args)}, {tell(value.keywords)})"
    name, home = getattr(value, "__name__", ""), getattr(value, "__module__", None) or ""
    if home.split(".")[0] in _LIBRARIES:
        # Where a library says that it is may change; where it is to be used does not.
        for module in (jax.nn, jax.nn.initializers, jnp, jax.lax, nnx, sys.modules.get(home)):
            if getattr(module, name, None) is value:
                return f"{module.__name__}.{name}"
    made_from = {}
    if inspect.isfunction(value):  # by its name, and by what is in its closure or a default
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        empty = CellType()
        made_from = {key: cell.cell_contents for key, cell in cells if cell != empty}
        for key, parameter in inspect.signature(value, follow_wrapped=False).parameters.items():
            if parameter.default is not parameter.empty and parameter.default is not None:
                made_from[key] = parameter.default
    name = getattr(value, "__qualname__", type(value).__name__)
    return f"{name} {tell(made_from)} {_UNTOLD}"


def _computed(function: Callable, *inputs) -> str:
    """A digest of what a function and its gradient compute on inputs of these shapes."""
    program = jax.make_jaxpr(lambda *x: jax.vjp(function, *x)[1](function(*x)))(*inputs)
    digest = hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", str(program)).encode())
    name = getattr(function, "__name__", "<unnamed>")
    for value in _values(program, name):
        digest.update(content(value).encode())
    return f"{name} {digest.hexdigest()[:16]}"


def _values(program, name):
    """All constants of a program and of those that it calls; what it prints may leave out some."""
    if isinstance(program, ClosedJaxpr):
        yield from program.consts
        program = program.jaxpr
    for equation in program.eqns:
        if "callback" in equation.primitive.name:
            raise ValueError(
                f"network: {name} calls Python back ({equation.primitive.name}), and no key can "
                "tell what that computes; pass fresh=True, so that nothing is kept or fetched"
            )
        yield from (entry.val for entry in equation.invars if isinstance(entry, Literal))
        for value in jax.tree.leaves(equation.params):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from _values(value, name)
            elif hasattr(value, "__array__") and not isinstance(value, type):
                yield value


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content(tree: Any) -> str:
    """A digest of all numbers of a pytree, of their dtypes, shapes and places."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf)
    return digest.hexdigest()


def save(runs: Runs, folder: Path, key: dict) -> bool:
    """Keep runs in `folder`, whole or not at all; False (and a warning) if it cannot be written.

    What is there already stays if it is the same run (another process was faster).
    """
    tree = {"params": jax.tree.map(np.asarray, runs.params), "history": runs.history}
    try:
        write_arrays(folder, tree, {"key": key})
    except Exception as error:  # a full disk is not always an OSError of Python's
        with contextlib.suppress(Exception):
            if read_arrays(folder)[1] == {"key": key, "content": content(tree)}:
                return True
        warnings.warn(
            f"the run cannot be kept in {folder} ({_first_line(error)}), so it will be trained "
            "again; set PRUNELIB_CACHE to a folder that can be written",
            stacklevel=3,
        )
        return False
    return True


def write_arrays(folder: Path, tree: Any, record: dict) -> None:
    """Write a pytree of NumPy arrays, and a JSON-able record, whole or not at all."""
    import orbax.checkpoint as ocp

    record = record | {"content": content(tree)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as temporary:
        whole = Path(temporary, "run")
        large = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) > 2**20
        arguments = ocp.args.PyTreeSave(  # files of less than a megabyte, for git's sake
            tree, ocdbt_target_data_file_size=2**19 if large else None
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(whole.absolute() / "arrays", args=arguments)
        (whole / "arrays" / "commit_success.txt").unlink(missing_ok=True)  # names a folder
        (whole / "run.json").write_text(json.dumps(record, indent=1) + "\n")
        if read_arrays(whole)[1] != record:
            raise OSError("what was written is not what is read back")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, Path(temporary, "old"))
        os.replace(whole, folder)


def read_arrays(folder: Path) -> tuple[dict, dict]:
    """The arrays in `folder`, and their record; raises whatever is wrong."""
    import orbax.checkpoint as ocp

    record = json.loads((folder / "run.json").read_text())
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.absolute() / "arrays")
    if content(tree) != record["content"]:
        raise ValueError("its numbers do not have the checksum kept with them")
    return tree, record


def _load(folder: Path, key: dict, recipe: Recipe, seeds: tuple[int, ...]) -> Runs | None:
    if not folder.exists():
        return None
    try:
        if json.loads((folder / "run.json").read_text())["key"] != key:
            if folder.parent == SHIPPED:
                return None  # the name of a recipe says not all; that of a kept run does
            raise ValueError("it holds another run than its name says")
        tree, _ = read_arrays(folder)
    except Exception as error:
        warnings.warn(
            f"the kept run in {folder} is damaged ({_first_line(error)}); training it again. "
            "Delete that folder to be rid of this warning",
            stacklevel=3,
        )
        return None
    return Runs(recipe, seeds, jax.tree.map(jnp.asarray, tree["params"]), tree["history"])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# The runs of the series --------------------------------------------------------------------------

_WHOLE = (PLAIN, FAIR_DROPOUT, PLAIN_2016, DROPOUT_2016, SLOW_2016, FAST_DROPOUT_2016)
_CUT_SHORT = (SHORT_2016, PLAIN_TENTH, PLAIN_HUNDREDTH)
SERIES = [(mlp, recipe) for recipe in (*_WHOLE, *_CUT_SHORT)]


def main(names: Sequence[str] = ()) -> None:
    """Train runs of the series, all or those named, from their seeds, to where they are shipped."""
    mnist = load_mnist()
    known = {recipe.name: (build, recipe) for build, recipe in SERIES}
    for name in names or known:
        checks.one_of("name", name, known)
        build, recipe = known[name]
        network = build()
        runs = train(network, recipe, mnist.train, fresh=True)
        save(runs, SHIPPED / recipe.name, run_key(network, recipe, mnist.train, runs.seeds))
        print(f"{recipe.name}: loss {runs.history['loss'][:, -1].mean():.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
