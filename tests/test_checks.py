"""Every public function refuses every bad input: a table of functions, a table of bad inputs.

Each error must name the argument, say what was found, and give a remedy. One test is one bad input
tried on one function; the test summary counts them.
"""

import dataclasses
import functools
import importlib
import inspect
import re
import types
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from flax import nnx

from prunelib import (
    checks,
    curvature,
    data,
    figures,
    models,
    passes,
    pruning,
    retraining,
    streaming,
    taylor,
    training,
)
from prunelib.data import Examples

NETWORK = models.mlp((4, 3, 2))
PARAMS = NETWORK.init(jax.random.key(0))
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.random((6, 4), np.float32)
LABELS = np.array([0, 1, 0, 1, 1, 0], np.int32)
EXAMPLES = Examples(IMAGES, LABELS)
RECIPE = training.Recipe("tiny", steps=2, batch=2)
change = partial(dataclasses.replace, RECIPE)


def with_first(tree, value):
    """`tree` with one number replaced, in its last leaf."""
    *leaves, last = jax.tree.leaves(tree)
    return jax.tree.structure(tree).unflatten([*leaves, last.at[(0,) * last.ndim].set(value)])


def each(tree, function):
    return jax.tree.map(function, tree)


class Wrapped:
    """A network whose apply does something more to the logits."""

    def __init__(self, function):
        self.function = function

    def apply(self, params, images):
        return self.function(NETWORK.apply(params, images))


class WithDropout:
    """A network that somebody forgot to switch to evaluation."""

    def apply(self, params, images):
        return NETWORK.apply(params, images) + jax.random.normal(
            jax.random.key(0), (len(images), 2)
        )


class Unhashable:
    """A loss that cannot be an argument of a compiled program."""

    __hash__ = None

    def __call__(self, logits, labels):
        return passes.cross_entropy(logits, labels)


# Good arguments, by name -------------------------------------------------------------------------

DIAGONAL = each(PARAMS, jnp.abs)
KEPT = each(PARAMS, lambda w: w > 0)
GOOD = {
    "network": NETWORK,
    "params": PARAMS,
    "examples": EXAMPLES,
    "batch_size": 4,
    "method": "neuron",
    "probes": 2,
    "draws": 1,
    "chunk": 2,
    "first": 0,
    "scores": DIAGONAL,
    "percent": 50,
    "percents": [0, 50],
    "scope": "all",
    "prunable": each(PARAMS, lambda w: True),
    "diagonal": DIAGONAL,
    "kept": KEPT,
    "vector": DIAGONAL,
    "function": lambda params: sum(leaf.sum() for leaf in jax.tree.leaves(params)),
    "recipe": RECIPE,
    "seeds": [0],
    "images": IMAGES,
    "keep": 1.0,
    "logits": jnp.zeros((6, 2)),
    "labels": LABELS,
    "widths": (4, 3, 2),
    "flat": np.zeros(784 * 50 + 3 * 2500 + 500 + 210, np.float32),
    "layers": [("dense1", partial(nnx.Linear, 4, 2))],
    "figure": matplotlib.figure.Figure(),
    "name": "name",
    "table": {"x": [1.0, 2.0]},
    "index": 0,
    "key": jax.random.key(0),
    "window_strides": (1, 1),
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "feature_group_count": 1,
    "padding": "VALID",
    "loss": passes.cross_entropy,
    "mesh": jax.sharding.Mesh(jax.devices(), ("examples",)),
    "length": 8,
    "source": EXAMPLES,
    "size": 4,
    "chunks": [EXAMPLES],
    "every": 2,
    "train": EXAMPLES,
    "test": EXAMPLES,
    "criterion": "magnitude",
    "scored_on": 4,
    "plan": retraining.Plan("tiny", "magnitude", steps=1, kept=(50,)),
    "mnist": types.SimpleNamespace(train=EXAMPLES, test=EXAMPLES),
}


# Bad arguments: by name, what is wrong, the value, and what the message must say ------------------

FINITE = {
    "NaN": (lambda tree: with_first(tree, jnp.nan), "NaN or infinite"),
    "infinite": (lambda tree: with_first(tree, jnp.inf), "NaN or infinite"),
}
NUMBERS = FINITE | {
    "complex": (lambda tree: each(tree, lambda w: w + 0j), "complex64"),
    "no arrays": (lambda tree: {}, "no arrays|structure|layers are"),
    "strings": (lambda tree: each(tree, lambda w: "0.5"), r"got str|got \(\)|leading axis"),
    "other bytes": (lambda tree: each(tree, lambda w: np.asarray(w).astype(">f4")), ">f4"),
    "too large": (lambda tree: each(tree, lambda w: np.full(w.shape, 1e300)), r"1e\+300"),
    "too small": (lambda tree: each(tree, lambda w: np.full(w.shape, 1e-300)), "1e-300"),
}
FLOATS = NUMBERS | {"integers": (lambda tree: each(tree, lambda w: w.astype(int)), "int32")}
SHAPES = {
    "a layer is missing": (lambda tree: {"dense1": tree["dense1"]}, "dense1"),
    "a layer too many": (lambda tree: tree | {"dense3": tree["dense2"]}, "dense3"),
    "transposed": (lambda tree: each(tree, jnp.transpose), r"\(3, 4\)|\(3,\)"),
}
MASKS = SHAPES | {
    "scores": (lambda tree: DIAGONAL, "float32"),
    "integers": (lambda tree: each(tree, lambda k: k.astype(int)), "int32"),
}
PIXELS = {
    "NaN": (lambda x: np.where(x == x[0, 0], np.nan, x), "NaN or infinite"),
    "infinite": (lambda x: np.where(x == x[0, 0], np.inf, x), "NaN or infinite"),
    "int32": (lambda x: x.astype(np.int32), "int32"),
    "bool": (lambda x: x > 0, "bool"),
    "complex": (lambda x: x + 0j, "complex64"),
    "a list": (lambda x: x.tolist(), "list"),
    "other bytes": (lambda x: x.astype(">f4"), ">f4"),
}
PICTURES = {
    "too many pixels": (lambda x: np.tile(x, 2), r"\(8,\)|8\)"),
    "no batch axis": (lambda x: x[:, 0], r"\(6,\)"),
}
CLASSES = {
    "one-hot": (lambda y: np.eye(2, dtype=np.float32)[y], r"\(6, 2\)"),
    "floats": (lambda y: y.astype(np.float32), "float32"),
    "strings": (lambda y: y.tolist(), "list|shape"),
    "other bytes": (lambda y: y.astype(">i4"), ">i4"),
    "one too few": (lambda y: y[1:], r"\(5,\)"),
}
RANGE = {
    "a class too high": (lambda y: y + 1, "1 to 2"),
    "negative": (lambda y: y - 1, "-1 to 0"),
}


def of(field, cases):
    """The same cases, for one field of Examples."""
    return {
        f"{field}: {what}": (lambda e, bad=bad: e._replace(**{field: bad(getattr(e, field))}), says)
        for what, (bad, says) in cases.items()
    }


def values(*cases, says=None):
    """Values that are bad in themselves; the message must show them."""
    return {repr(bad): (lambda good, bad=bad: bad, says or re.escape(repr(bad))) for bad in cases}


EXAMPLES_ALONE = {
    **of("images", PIXELS | {"no batch axis": PICTURES["no batch axis"]}),
    **of("labels", CLASSES),
    "empty": (lambda e: Examples(e.images[:0], e.labels[:0]), "none"),
    "a tuple": (tuple, "tuple"),
    "None": (lambda e: None, "NoneType"),
    "none real": (lambda e: data.Placed(*e, np.zeros(len(e.labels), bool)), "all are False"),
}
EXAMPLES_ALL = EXAMPLES_ALONE | of("labels", RANGE) | of("images", {
    "too many pixels": PICTURES["too many pixels"],
})  # fmt: skip
NETWORKS = {
    "a function": (lambda n: n.apply, "no apply|got method"),
    "None": (lambda n: None, "NoneType"),
    "dropout on": (lambda n: WithDropout(), "dropout|WithDropout"),
    "one logit": (lambda n: Wrapped(lambda z: z[:, 0]), r"\(2,\)|Wrapped"),
    "all logits added": (lambda n: Wrapped(jnp.sum), r"\(\)|Wrapped"),
    "log of zero": (lambda n: Wrapped(lambda z: jnp.log(jnp.zeros_like(z))), "infinite|Wrapped"),
    "batch statistics": (
        lambda n: Wrapped(lambda z: z - z.mean(0, keepdims=True)),
        "other images|Wrapped",
    ),
    "batch statistics of small logits": (
        lambda n: Wrapped(lambda z: 1e-5 * (z - z.mean(0, keepdims=True))),
        "other images|Wrapped",
    ),
    "integers": (lambda n: Wrapped(lambda z: z.astype(int)), "int32|Wrapped"),
    "two outputs": (lambda n: Wrapped(lambda z: (z, z)), "tuple|Wrapped"),
    "no hash": (lambda n: types.SimpleNamespace(apply=n.apply), "cannot be hashed|got SimpleNa"),
}
RECIPES = {
    "a name": (lambda r: "plain", "str"),
    **{
        f"{name}={bad!r}": (lambda r, n=name, b=bad: change(**{n: b}), f"{name}={bad!r}")
        for name, bads in {
            "steps": (0, -5, 2.0, True),
            "batch": (0, 1.5, True),
            "keep": (0, 1.5, np.nan, True, None),
            "learning_rate": (0.0, -1e-3, np.nan, np.inf, "0.1", True),
            "std": (0.0, -1.0, np.nan, True, "0.1"),
            "held_out": (-1, False),
            "decay": ("no", 1, None),
            "summed": ("no", 0, None),
        }.items()
        for bad in bads
    },
    **{
        f"name={bad!r}": (lambda r, b=bad: change(name=b), repr(bad))
        for bad in ("", "a/b", "../runs", "two  words", " edge", None, "retraining")
    },
}
SIZES = values(0, -1, 2.5, True, "64", np.nan)
LEVELS = values(-1, -1e-9, 100.001, np.nan, np.inf, "half", "20", None, [5], 1j)
BAD = {
    "loss": {
        "the mean": (lambda e: lambda z, y: e(z, y).mean(), "the mean is taken here"),
        "a column": (lambda e: lambda z, y: e(z, y)[:, None], "the mean is taken here"),
        "shares of the mean": (lambda e: lambda z, y: e(z, y) / len(y), "the mean is taken here"),
        "the mean for each": (
            lambda e: lambda z, y: jnp.broadcast_to(e(z, y).mean(), y.shape),
            "the mean is taken here",
        ),
        "None": (lambda e: None, "None"),
        "no hash": (lambda e: Unhashable(), "cannot be hashed"),
        "no labels": (lambda e: lambda z: z, r"labels \(4,\)"),
    },
    "key": values(0, "seed") | {"keys": (lambda k: jax.random.split(k), r"\(2,\)")},
    "network": NETWORKS,
    "params": FLOATS | SHAPES,
    "params alone": FLOATS,
    "params of a network": {
        "one bias for all": (
            lambda tree: tree | {"dense1": tree["dense1"] | {"bias": jnp.zeros(1)}},
            r"expected shape \(3,\)",
        ),
        "other widths": (lambda tree: models.mlp((4, 5, 2)).init(GOOD["key"]), r"\(5,\)"),
        "no bias": (lambda tree: each(tree, lambda w: w) | {"dense2": {}}, "structure"),
    },
    "examples": EXAMPLES_ALL,
    "examples alone": EXAMPLES_ALONE,
    "batch_size": SIZES,
    "batch_size given": values(None),
    "method": values("newton", None, ["neuron"]),
    "probes": values(1, 0, -2, 2.5),
    "draws": values(0, -2, 2.5, None),
    "first": values(-1, 2.5, None),
    "scores": NUMBERS | SHAPES,
    "scores alone": NUMBERS | {"booleans": (lambda tree: each(tree, lambda s: s > 0), "bool")},
    "percent": LEVELS,
    "percents": {f"[0, {w}]": (lambda p, b=b: [0, b(p)], says) for w, (b, says) in LEVELS.items()}
    | {"none": (lambda p: [], "none")},
    "scope": values("layers", "", None, ["all"]),
    "prunable": {
        "strings": (lambda tree: each(tree, lambda _: "no"), "got 'no'"),
        "a number": (lambda tree: each(tree, lambda _: 1), "got 1"),
        "one bool": (lambda tree: True, r"\*"),
        "a mask": (lambda tree: KEPT, "PyTreeDef"),
        "a layer is missing": (lambda tree: {"dense1": tree["dense1"]}, "dense1"),
    },
    "diagonal": FLOATS | SHAPES,
    "diagonal of OBD": FLOATS
    | SHAPES
    | {"zero everywhere": (lambda tree: each(tree, jnp.zeros_like), "every entry is exactly zero")},
    "diagonal of real numbers": FINITE | SHAPES,
    "kept": MASKS,
    "kept alone": {what: MASKS[what] for what in ("scores", "integers")},
    "vector": FLOATS | SHAPES,
    "recipe": RECIPES,
    "recipe and examples": {
        "batch too large": (lambda r: change(batch=7), "do not fill a batch of 7"),
        "all held out": (lambda r: change(held_out=6), "6 held out"),
    },
    "seeds": {
        "none": (lambda s: [], r"got \[\]"),
        "a half": (lambda s: [0, 0.5], "0.5"),
        "a bool": (lambda s: [True], "True"),
        "a string": (lambda s: "01", "01"),
        "a number": (lambda s: 5.0, "5.0"),
        "more than 32 bits": (lambda s: [0, 2**32], "4294967296"),
        "negative": (lambda s: [-1], "-1"),
    },
    "images": PIXELS | PICTURES,
    "images alone": PIXELS,
    "keep": values(0, -0.5, 1.5, np.nan),
    "logits": {
        "NaN": (lambda z: z.at[0, 0].set(jnp.nan), "NaN or infinite"),
        "infinite": (lambda z: z.at[0, 0].set(-jnp.inf), "NaN or infinite"),
        "probability of one class": (lambda z: z[:, 0], r"\(6,\)"),
    },
    "labels": CLASSES | RANGE,
    "widths": values((), (4,), (4, 0, 2), (4, -3), (4, 2.5)),
    "flat": {
        "NaN": (lambda x: np.where(np.arange(x.size) == 3, np.nan, x), "1 of 47410"),
        "infinite": (lambda x: np.where(np.arange(x.size) == 3, np.inf, x), "1 of 47410"),
        "too short": (lambda x: x[1:], r"\(47409,\)"),
        "too large": (lambda x: np.full(x.shape, 1e300), "1e.300"),
        "a matrix": (lambda x: x[None], r"\(1, 47410\)"),
        "integers": (lambda x: x.astype(int), "int64"),
    },
    "layers": {
        "not in order": (lambda _: [("b", _[0][1]), ("a", _[0][1])], r"\['b', 'a'\]"),
        "twice one name": (lambda _: _ * 2, r"\['dense1', 'dense1'\]"),
        "a number": (lambda _: [5], "5"),
        "a name alone": (lambda _: ["dense1"], "dense1"),
        "a name and a number": (lambda _: [("dense1", 5)], "5"),
        "batch normalization": (lambda _: [("a", partial(nnx.BatchNorm, 4))], r"\['mean', 'var'\]"),
        "dropout": (lambda _: [("a", partial(nnx.Dropout, 0.5))], "rngs"),
        "a mask": (
            lambda _: [("a", partial(nnx.Conv, 1, 1, (2,), mask=jnp.ones((2, 1, 1))))],
            "mask",
        ),
    },
    "figure": values(None, says="NoneType"),
    "name": values("", "a/b", "..", says="''|'a/b'|'..'"),
    "table": {
        "no column": (lambda t: {}, "{}"),
        "no row": (lambda t: {"x": []}, "'x': 0"),
        "uneven": (lambda t: t | {"y": [1]}, "'y': 1"),
        "NaN": (lambda t: {"x": [1.0, np.nan]}, "1 of 2"),
        "infinite": (lambda t: {"x": np.array([1.0, np.inf])}, "1 of 2"),
        "NaN of JAX": (lambda t: {"x": jnp.array([1.0, jnp.nan])}, "1 of 2"),
        "NaN of half precision": (lambda t: {"x": jnp.array([1, jnp.nan], jnp.bfloat16)}, "1 of 2"),
        "NaN in arrays": (lambda t: {"x": [np.array(np.nan), jnp.array(1.0)]}, "1 of 2"),
        "a row of arrays": (lambda t: {"x": np.ones((2, 2))}, "has arrays in its rows"),
    },
    "index": values(-1, 1),
    "chunk": SIZES,
    "window_strides": values((2, 2)),
    "lhs_dilation": values((2, 2)),
    "rhs_dilation": values((2, 2)),
    "feature_group_count": values(2),
    "padding": values("SAME"),
    "train": EXAMPLES_ALL,
    "test": EXAMPLES_ALL,
    "criterion": values("luck", "", None),
    "scored_on": values(0, -5, 2.5, True, "4"),
    "plan": {
        "a name": (lambda p: p.name, "got str"),
        "unknown start": (lambda p: dataclasses.replace(p, start="nope"), "plan.start: 'nope'"),
        "unknown scope": (lambda p: dataclasses.replace(p, scope="row"), "plan.scope: 'row'"),
        "luck": (lambda p: dataclasses.replace(p, criterion="luck"), "plan.criterion: 'luck'"),
        "no steps": (lambda p: dataclasses.replace(p, steps=0), "steps=0"),
        "a level of no loop": (lambda p: dataclasses.replace(p, one_shot=True), r"got \(50,\)"),
    },
    "mnist": {
        "examples": (lambda m: EXAMPLES, "got Examples without train"),
        "None": (lambda m: None, "NoneType"),
        "tuples": (lambda m: types.SimpleNamespace(train=(), test=()), "tuple"),
        "no test": (lambda m: types.SimpleNamespace(train=EXAMPLES), "without test"),
    },
    "mesh": {
        "devices": (lambda m: jax.devices(), "list"),
        "explicit axes": (lambda m: jax.make_mesh((8,), ("examples",)), "Explicit"),
    },
    "length": values(5),
    "source": {
        "a path": (lambda s: "images.npy", "str"),
        "None": (lambda s: None, "NoneType"),
    },
    "size": SIZES,
    "every": SIZES,
    "chunks": {
        "none": (lambda c: [], "none"),
        "images alone": (lambda c: [c[0].images], "ndarray"),
    },
}
# Messages speak of parts of an argument, or of arguments that do not fit together.
SPOKEN_OF = {
    "examples": "examples|params",
    "images": "images|params",
    "labels": "labels",
    "params": "params",
    "recipe and examples": "examples",
    "percents": "percent",
    "chunks": "chunks|examples",
    "mnist": "mnist|examples",
    "plan": "plan|recipe",
    "scope": "scope",
}


# The functions, and which of their arguments can be bad -------------------------------------------

MEASURES = ("network", "params", "examples", "batch_size")
LOOP = ("network", "params", "train", "test", "percents", "recipe", "criterion")


def method(function):
    return lambda network, params, examples, loss, batch_size, **options: function(
        network, params, examples, loss, batch_size, **options
    )


def mean_of_images(examples, batch_size):
    return passes.mean_over_batches(lambda x, y, w: w @ x, examples, batch_size)


def stacked_changes(params, kept, diagonal, examples, network, batch_size):
    one = each(
        (params, kept, diagonal), lambda leaf: leaf[None] if hasattr(leaf, "dtype") else leaf
    )
    return taylor.loss_changes(network, one[0], one[1], examples, one[2], batch_size=batch_size)


def retrain(network, params, train, test, percents, recipe, criterion, scope, seeds, scored_on):
    """With the leading axis over seeds that params have there."""
    params = each(params, lambda leaf: leaf[None] if hasattr(leaf, "dtype") else leaf)
    return retraining.prune_and_retrain(
        network, params, train, test, percents, recipe, criterion, scope, seeds, scored_on
    )


def tiny(function):
    """The experiment with a tiny network, and nothing kept."""

    @functools.wraps(function)
    def small(**arguments):
        start = (lambda: NETWORK, RECIPE, (0,))
        fresh = partial(training.train, fresh=True)
        with (
            mock.patch.dict(retraining.STARTS, tiny=start, lenet5=start),
            mock.patch.object(training, "train", fresh),
        ):
            return function(**arguments, fresh=True)

    return small


FUNCTIONS = {
    "data.place": (data.place, ["examples alone", "mesh"]),
    "data.collected": (data.collected, ["examples alone"]),
    "data.filled": (data.filled, ["examples alone", "length"]),
    "data.scaled": (data.scaled, ["images alone"]),
    "models.Network": (models.Network, ["layers"]),
    "models.Network.apply": (NETWORK.apply, ["params", "images", "keep"]),
    "models.mlp": (models.mlp, ["widths"]),
    "models.params_from_flat": (lambda flat: models.params_from_flat(flat), ["flat"]),
    "models.flat_from_params": (partial(models.flat_from_params, network=NETWORK), ["params"]),
    "models.convolve": (
        partial(models.convolve, jnp.ones((1, 5, 5, 1)), jnp.ones((2, 2, 1, 1))),
        ["window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count"],
    ),
    "passes.cross_entropy": (passes.cross_entropy, ["logits", "labels"]),
    "passes.count": (passes.count, ["examples alone"]),
    "passes.mean_over_batches": (
        mean_of_images,
        ["examples alone", "batch_size", "batch_size given"],
    ),
    "training.train": (
        partial(training.train, fresh=True),
        ["network", "recipe", "recipe and examples", "examples", "seeds"],
    ),
    "training.check_recipe": (training.check_recipe, ["recipe"]),
    "training.Runs.select": (training.Runs(RECIPE, (0,), PARAMS, {}).select, ["index"]),
    "curvature.hvp": (curvature.hvp, ["params alone", "vector"]),
    "curvature.hessian_diagonal": (
        curvature.hessian_diagonal,
        [*MEASURES, "params of a network", "method", "loss"],
    ),
    **{f"curvature.{name}": (method(f), MEASURES) for name, f in curvature.METHODS.items()},
    "curvature.one_hot": (method(curvature.one_hot), [*MEASURES, "chunk"]),
    "curvature.sampled": (method(curvature.sampled), [*MEASURES, "draws", "first", "key"]),
    "curvature.hutchinson_estimate": (
        method(curvature.hutchinson_estimate),
        [*MEASURES, "probes", "key"],
    ),
    "pruning.magnitude": (pruning.magnitude, ["params alone"]),
    "pruning.obd_saliency": (pruning.obd_saliency, ["params alone", "diagonal of OBD"]),
    "pruning.random_scores": (pruning.random_scores, ["params alone", "key"]),
    "pruning.weights_only": (pruning.weights_only, ["params alone"]),
    "pruning.ranks": (pruning.ranks, ["scores alone", "scope", "prunable"]),
    "pruning.counts": (pruning.counts, ["scores alone", "percent", "scope", "prunable"]),
    "pruning.mask": (pruning.mask, ["scores alone", "percent", "scope", "prunable"]),
    "pruning.apply_mask": (pruning.apply_mask, ["params alone", "kept"]),
    "pruning.accuracy_curve": (
        pruning.accuracy_curve,
        [*MEASURES, "batch_size given", "scores", "percents", "scope", "prunable"],
    ),
    "pruning.evaluate": (
        pruning.evaluate,
        [*MEASURES, "batch_size given", "params of a network"],
    ),
    "taylor.loss_change": (
        taylor.loss_change,
        [*MEASURES, "batch_size given", "kept", "diagonal of real numbers", "loss"],
    ),
    "taylor.loss_changes": (stacked_changes, [*MEASURES, "kept", "diagonal of real numbers"]),
    "taylor.layer_terms": (taylor.layer_terms, [*MEASURES, "batch_size given", "kept", "loss"]),
    "retraining.keep_pruned": (retraining.keep_pruned, ["kept alone"]),
    "retraining.prune_and_retrain": (
        retrain,
        [*LOOP, "scope", "seeds", "scored_on"],
    ),
    "retraining.experiment": (tiny(retraining.experiment), ["plan", "mnist"]),
    "retraining.lenet5_curves": (tiny(retraining.lenet5_curves), ["mnist"]),
    "streaming.chunks": (streaming.chunks, ["source", "size"]),
    "streaming.mean": (
        lambda chunks, every: streaming.mean(lambda c: c.images.mean(0), chunks, every=every),
        ["chunks", "every"],
    ),
    "streaming.hessian_diagonal": (
        streaming.hessian_diagonal,
        ["network", "params", "method", "chunks", "every"],
    ),
    "figures.save": (figures.save, ["figure", "name", "table"]),
}
# What needs no row, and why.
EXEMPT = {
    "data.cache_dir": "takes nothing",
    "data.load_mnist": "test_data.py tries each kind of damage and each bad folder",
    "data.published_2016": "takes nothing",
    "models.as_picture": "a link of a chain: Network.apply checks what goes in",
    "models.dropout_here": "a link of a chain",
    "models.flatten": "a link of a chain",
    "models.max_pool": "a link of a chain",
    "models.lenet300": "takes nothing",
    "models.lenet5": "takes nothing",
    "curvature.loss_factor": "runs inside compiled code, after hessian_diagonal's checks",
    "training.run_key": "train checks first",
    "training.content": "takes any pytree of arrays",
    "training.read_arrays": "raises whatever is wrong: test_faults.py and test_sharding.py",
    "training.write_arrays": "raises whatever is wrong: test_faults.py and test_sharding.py",
    "training.save": "train checks first; test_faults.py tries what can go wrong",
    "training.main": "takes nothing",
    "training.check_dropout": "test_training.py and test_retraining.py try it",
    "training.in_words": "takes anything",
    "retraining.main": "takes nothing",
    "retraining.plans": "takes nothing",
}


def base(argument):
    """ "params alone" -> "params", and so on."""
    return argument.split(" ")[0]


def tries():
    for name, (function, arguments) in FUNCTIONS.items():
        for argument in arguments:
            for what in BAD[argument]:
                yield pytest.param(function, argument, what, id=f"{name}-{argument}-{what}")


def call(function, **replaced):
    """Call `function` with good arguments, but for those replaced."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.name in GOOD]
    names += [name for name in replaced if name not in names]
    return function(**{name: GOOD[name] for name in names} | replaced)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_good_arguments_are_taken(name, tmp_path, monkeypatch):
    """Otherwise the tests below would show nothing."""
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    function, arguments = FUNCTIONS[name]
    call(function, **{base(argument): GOOD[base(argument)] for argument in arguments})


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN to int, by NumPy
@pytest.mark.parametrize(("function", "argument", "what"), list(tries()))
def test_bad_input_is_refused_by_name(function, argument, what):
    make, says = BAD[argument][what]
    bad = make(GOOD[base(argument)])
    with pytest.raises((ValueError, TypeError, FloatingPointError, IndexError)) as caught:
        call(function, **{base(argument): bad})
    message = str(caught.value)
    assert re.search(
        SPOKEN_OF.get(base(argument), SPOKEN_OF.get(argument, base(argument))), message
    )
    assert re.search(says, message), message
    remedy = (
        r"\b(pass|use|choose|convert|make|give|cut|leave|call|change|switch|rank|find|take|end)\b"
    )
    assert re.search(remedy + "|any will do|number the|it is |rename|such as|expected", message)


MODULES = ["data", "models", "passes", "training", "curvature", "pruning", "taylor"]
MODULES += ["retraining", "streaming"]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_is_in_the_table(module):
    found = importlib.import_module(f"prunelib.{module}")
    public = {
        f"{module}.{name}"
        for name, function in inspect.getmembers(found, inspect.isfunction)
        if function.__module__ == found.__name__ and not name.startswith("_")
    }
    missing = public - set(FUNCTIONS) - set(EXEMPT)
    assert not missing, f"these functions stand in neither FUNCTIONS nor EXEMPT: {missing}"
    gone = {name for name in EXEMPT if name.startswith(f"{module}.")} - public
    assert not gone, f"EXEMPT names what does not exist: {gone}"


def test_the_known_names_are_listed():
    with pytest.raises(ValueError, match=re.escape(str(sorted(curvature.METHODS)))):
        curvature.hessian_diagonal(NETWORK, PARAMS, EXAMPLES, "newton")
    with pytest.raises(ValueError, match=re.escape("['all', 'layer']")):
        pruning.mask(DIAGONAL, 5, scope="everything")


def test_broken_losses_do_not_pass():
    """What is finite at first and NaN in the result is refused as well."""

    def log_softmax_by_hand(logits, labels):
        p = jax.nn.softmax(1e4 * logits)
        return -(jax.nn.one_hot(labels, 2) * jnp.log(p)).sum(1)

    for name in set(curvature.METHODS) - {"sampled"}:  # which refuses any other loss
        with pytest.raises(FloatingPointError, match="the Hessian diagonal"):
            curvature.hessian_diagonal(NETWORK, PARAMS, EXAMPLES, name, loss=log_softmax_by_hand)
    with pytest.raises(FloatingPointError, match="the loss change"):
        taylor.loss_change(NETWORK, PARAMS, KEPT, EXAMPLES, DIAGONAL, loss=log_softmax_by_hand)
    huge = each(PARAMS, lambda w: w * 1e25)
    with pytest.raises(FloatingPointError, match="logits"):
        pruning.evaluate(NETWORK, huge, EXAMPLES)


def test_diverged_training_is_no_result():
    with pytest.raises(FloatingPointError, match="training by 'tiny'"):
        training.train(NETWORK, change(steps=20, learning_rate=1e37), EXAMPLES, [0], fresh=True)


def test_checks_cost_nothing_under_jit():
    """Inside `jit` there are no numbers to look at: the same functions compile, and stay pure."""

    @jax.jit
    def pruned(params, images):
        kept = pruning.mask(pruning.magnitude(params), 50)
        return NETWORK.apply(pruning.apply_mask(params, kept), images)

    assert pruned(PARAMS, IMAGES).shape == (6, 2)
    text = pruned.lower(PARAMS, IMAGES).as_text()
    assert "is_finite" not in text
    assert "callback" not in text


def test_floats_that_look_like_bytes_are_warned_of():
    grey = Examples(np.round(255 * IMAGES), LABELS)
    with pytest.warns(UserWarning, match="divide by 255"):
        pruning.evaluate(NETWORK, PARAMS, grey)
    pruning.evaluate(NETWORK, PARAMS, grey._replace(images=grey.images.astype(np.uint8)))


def test_finite_says_where_and_how_many():
    tree = {"a": jnp.zeros(3), "b": [np.array([1.0, np.nan, np.inf])]}
    with pytest.raises(FloatingPointError, match=r"thing: 2 of 3 numbers in \['b'\]\[0\]"):
        checks.finite("thing", tree)
    assert checks.finite("thing", 3.0) == 3.0
