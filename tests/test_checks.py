"""What JAX is silent about is refused in words; and each public function asks its guards."""

import cProfile
import pstats
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import bent

from prunelib import (
    checks,
    curvature,
    data,
    experiments,
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
ONE_LAYER = {"dense1": PARAMS["dense1"]}
IMAGES = np.random.default_rng(0).random((6, 4), np.float32)
LABELS = np.array([0, 1, 0, 1, 1, 0], np.int32)
EXAMPLES = Examples(IMAGES, LABELS)
DIAGONAL = jax.tree.map(jnp.abs, PARAMS)
KEPT = jax.tree.map(lambda w: w > 0, PARAMS)
UNEVEN = KEPT | {"dense1": jax.tree.map(lambda k: k[None], KEPT["dense1"])}
RECIPE = training.Recipe(steps=2, batch=2)
WILD = training.Recipe(steps=20, batch=2, learning_rate=1e37)
SEEDS = jax.tree.map(lambda w: w[None], PARAMS)
KEYS = jax.random.split(jax.random.key(0), 1)


def each(function, tree=PARAMS):
    return jax.tree.map(function, tree)


def with_first(value):
    """The params with one number replaced, in their last leaf."""
    *leaves, last = jax.tree.leaves(PARAMS)
    return jax.tree.structure(PARAMS).unflatten([*leaves, last.at[(0,) * last.ndim].set(value)])


def evaluate(params=PARAMS, network=NETWORK, examples=EXAMPLES, **options):
    return pruning.evaluate(network, params, examples, **options)


def diagonal(method=None, params=PARAMS, network=NETWORK, **options):
    return curvature.hessian_diagonal(network, params, EXAMPLES, method, **options)


def change(kept=KEPT, diagonal=DIAGONAL, **options):
    return taylor.loss_change(NETWORK, PARAMS, kept, EXAMPLES, diagonal, **options)


def curve(scores=DIAGONAL, percents=(0,), **options):
    return pruning.accuracy_curve(NETWORK, PARAMS, scores, EXAMPLES, percents, **options)


def images(value):
    return evaluate(examples=EXAMPLES._replace(images=value))


def labels(value):
    return evaluate(examples=EXAMPLES._replace(labels=value))


def logits(function):
    return evaluate(network=lambda p, x: function(NETWORK.apply(p, x)))


def retrain(percents=(50,), **options):
    return retraining.prune_and_retrain(
        NETWORK, SEEDS, EXAMPLES, EXAMPLES, percents, RECIPE, **{"seeds": [0]} | options
    )


def train(network=NETWORK, recipe=RECIPE, seeds=(0,)):
    return training.train(network, recipe, EXAMPLES, seeds)


def without_a_place(params, images):
    return images @ params["w"]


def not_finite(logits, labels):
    return jnp.sqrt(-1 - jnp.abs(logits[:, 0]))


def layers(name, builder):
    return models.Network([("b", partial(nnx.Linear, 4, 2)), (name, builder)])


NAN, INF = "NaN or infinite", float("inf")
GREY = np.round(255 * IMAGES)
LARGE = {"w": jnp.full(2, 1e20)}
STEP = {"w": jnp.ones((1, 4, 2))}
# fmt: off
REFUSED = [  # the argument that is named, what is tried, and what the message must also hold
    ("params", lambda: evaluate(with_first(jnp.nan)), NAN),
    ("params", lambda: diagonal(params=with_first(INF)), NAN),
    ("params", lambda: evaluate(each(lambda w: w.astype(int))), "int32"),
    ("params", lambda: pruning.magnitude(each(lambda w: w + 0j)), "complex64"),
    ("params", lambda: evaluate({}), "no arrays"),
    ("params", lambda: evaluate(ONE_LAYER), "dense1"),
    ("params", lambda: evaluate(each(jnp.transpose)), r"\(4,\)|shape"),
    ("params", lambda: retrain(seeds=[0, 1]), "seeds"),
    ("params", lambda: retraining.keep_pruned(KEPT).update(PARAMS, None), "update"),
    ("images", lambda: images(np.tile(IMAGES, 2)), r"\(8,\)"),
    ("images", lambda: images(IMAGES * np.nan), NAN),
    ("images", lambda: images(IMAGES.astype(int)), "int64"),
    ("images", lambda: images(GREY), "divide grey values by 255"),
    ("images", lambda: images(jnp.asarray(GREY, jnp.bfloat16)), "divide grey values by 255"),
    ("images", lambda: labels(LABELS[1:]), r"\(6, 4\) and \(5,\)"),
    ("images", lambda: images(IMAGES[:, 0]), r"\(6,\)"),
    ("examples", lambda: evaluate(examples=EXAMPLES.first(0)), "n > 0"),
    ("examples", lambda: evaluate(examples=(IMAGES, LABELS)), "tuple"),
    ("examples", lambda: evaluate(examples=None), "NoneType"),
    ("examples", lambda: train(recipe=replace(RECIPE, batch=7)), "batch of 7"),
    ("examples", lambda: streaming.mean(lambda c: 0.0, [3]), "int"),
    ("examples.real", lambda: evaluate(examples=EXAMPLES._replace(real=LABELS)), "boolean"),
    ("labels", lambda: labels(LABELS + 1), "1 to 2"),
    ("labels", lambda: labels(LABELS - 1), "-1 to 0"),
    ("labels", lambda: labels(LABELS.astype(float)), "float64"),
    ("labels", lambda: passes.cross_entropy(IMAGES[:, :2], LABELS + 1), "1 to 2"),
    ("logits", lambda: passes.cross_entropy(IMAGES[:, :2] * np.nan, LABELS), NAN),
    ("logits", lambda: passes.cross_entropy(IMAGES[:, 0], LABELS), r"\[n, classes\]"),
    ("network", lambda: evaluate(network=3), "int"),
    ("network", lambda: logits(lambda z: z[:, 0]), r"\[n, classes\]"),
    ("network", lambda: logits(lambda z: z.astype(int)), "int32"),
    ("network", lambda: logits(lambda z: (z, z)), "float logits"),
    ("network", lambda: train(NETWORK.apply), "init"),
    ("network", lambda: training.trainer(without_a_place, replace(RECIPE, keep=0.5), STEP,
                                         EXAMPLES), "dropout_here"),
    ("the loss", lambda: logits(lambda z: jnp.log(-jnp.abs(z))), NAN),
    ("the Hessian diagonal", lambda: diagonal("one_hot", loss=not_finite), NAN),
    ("the loss change", lambda: change(loss=not_finite), NAN),
    ("the saliencies", lambda: pruning.obd_saliency(LARGE, LARGE), NAN),
    ("training", lambda: train(recipe=WILD), NAN),
    ("the mean", lambda: streaming.mean(lambda c: np.nan, [EXAMPLES]), NAN),
    ("loss", lambda: diagonal(loss=lambda z, y: bent(z, y).mean()), "mean"),
    ("loss", lambda: diagonal("sampled", loss=bent), "cross-entropy"),
    ("method", lambda: diagonal("newton"), re.escape(str(sorted(curvature.METHODS)))),
    ("method", lambda: diagonal(""), "one_hot"),
    ("batch_size", lambda: diagonal(batch_size=0), "0"),
    ("batch_size", lambda: evaluate(batch_size=2.5), "2.5"),
    ("batch_size", lambda: evaluate(batch_size=0), "0"),
    ("batch_size", lambda: curve(batch_size=0), "0"),
    ("batch_size", lambda: change(batch_size=0), "0"),
    ("probes", lambda: diagonal("hutchinson", probes=0), "0"),
    ("draws", lambda: diagonal("sampled", draws=0), "0"),
    ("chunk", lambda: diagonal("one_hot", chunk=0), "0"),
    ("scores", lambda: pruning.ranks(with_first(jnp.nan)), NAN),
    ("scores", lambda: curve(each(lambda w: w * jnp.nan)), NAN),
    ("scores", lambda: pruning.mask(KEPT, 5), "bool"),
    ("scores", lambda: curve(ONE_LAYER), "dense2"),
    ("scope", lambda: pruning.mask(DIAGONAL, 5, "row"), "'row'.*all.*layer"),
    ("prunable", lambda: pruning.mask(DIAGONAL, 5, prunable=KEPT), "bool"),
    ("percent", lambda: pruning.mask(DIAGONAL, 100.001), "100.001"),
    ("percent", lambda: curve(percents=[0, -1]), "-1"),
    ("percent", lambda: pruning.mask(DIAGONAL, np.nan), "nan"),
    ("percents", lambda: curve(percents=[]), "none"),
    ("percents", lambda: retrain([50, 40]), r"\[50, 40\]"),
    ("diagonal", lambda: pruning.obd_saliency(PARAMS, with_first(jnp.nan)), NAN),
    ("diagonal", lambda: pruning.obd_saliency(PARAMS, each(jnp.zeros_like)), "exactly zero"),
    ("diagonal", lambda: pruning.obd_saliency(PARAMS, ONE_LAYER), "dense1/kernel"),
    ("diagonal", lambda: change(diagonal=with_first(jnp.nan)), NAN),
    ("kept", lambda: pruning.apply_mask(PARAMS, DIAGONAL), "float32"),
    ("kept", lambda: retraining.keep_pruned(np.ones(2, int)), "int64"),
    ("kept", lambda: pruning.apply_mask(PARAMS, each(jnp.transpose, KEPT)), r"\(3, 4"),
    ("kept", lambda: change({"dense1": KEPT["dense1"]}), "dense2"),
    ("kept", lambda: change(UNEVEN), "dense1"),
    ("seeds", lambda: train(seeds=[]), r"\[\]"),
    ("seeds", lambda: train(seeds=[1, 1]), r"\[1, 1\]"),
    ("seeds", lambda: train(seeds=3), r"3.*pass range\("),
    ("seeds", lambda: retrain(seeds=3), r"3.*pass range\("),
    ("criterion", lambda: retrain(criterion="luck"), "'luck'"),
    ("scored_on", lambda: retrain(scored_on=0), "0"),
    ("keep", lambda: NETWORK.apply(PARAMS, IMAGES, keep=1.5), "1.5"),
    ("steps", lambda: replace(RECIPE, steps=0), "0"),
    ("optimizer", lambda: replace(RECIPE, optimizer="adagrad"), "adagrad"),
    ("learning_rate", lambda: replace(RECIPE, learning_rate=0.0), "learning_rate=0.0"),
    ("index", lambda: training.Runs(RECIPE, (0,), SEEDS, None).select(1), "1"),
    ("widths", lambda: models.mlp((4,)), r"\(4,\)"),
    ("layers", lambda: layers("a", partial(nnx.Linear, 2, 2)), r"\['b', 'a'\]"),
    ("layers", lambda: layers("c", partial(nnx.BatchNorm, 2)), "state besides"),
    ("layers", lambda: layers("c", partial(nnx.Dropout, 0.5)), "state besides"),
    ("flat", lambda: models.params_from_flat(np.zeros(47_409)), "47410"),
    ("mesh", lambda: data.place(EXAMPLES, jax.make_mesh((8,), ("examples",))), "type Auto"),
    ("length", lambda: data.filled(EXAMPLES, 5), "5"),
    ("chunks", lambda: streaming.mean(lambda c: 0.0, []), "none"),
    ("every", lambda: streaming.mean(lambda c: 0.0, [EXAMPLES], every=0), "0"),
    ("size", lambda: list(streaming.chunks(EXAMPLES, 0)), "0"),
    ("name", lambda: experiments.trained("nope"), "'nope'"),
    ("name", lambda: experiments.outcome("nope"), "'nope'"),
    ("name", lambda: data.load("cifar"), "'cifar'"),
    ("figure", lambda: figures.save(None, "name", None), "NoneType"),
]
# fmt: on


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN to int, by NumPy
@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused_by_name_and_in_words(number):
    name, call, says = REFUSED[number]
    with pytest.raises((ValueError, TypeError, FloatingPointError, IndexError)) as caught:
        call()
    assert re.search(f"{name}.*{says}|{says}.*{name}", str(caught.value), re.DOTALL)


# Each public function asks its guards ------------------------------------------------------------

PASS = "network params examples logits labels finite "
DOORS = {
    "evaluate": (evaluate, PASS + "concrete"),
    "accuracy_curve": (curve, PASS + "concrete params like one_of percent"),
    "loss_change": (change, PASS + "concrete booleans like"),
    "train": (train, PASS + "seeds"),
    "trainer": (lambda: training.trainer(NETWORK, RECIPE, SEEDS, EXAMPLES)(SEEDS, KEYS), PASS),
    "prune_and_retrain": (retrain, PASS + "seeds one_of percent params booleans"),
    "mask": (lambda: pruning.mask(DIAGONAL, 50), "one_of params percent"),
    "ranks": (lambda: pruning.ranks(DIAGONAL), "one_of params"),
    "magnitude": (lambda: pruning.magnitude(PARAMS), "params"),
    "random_scores": (lambda: pruning.random_scores(jax.random.key(0), PARAMS), "params"),
    "obd_saliency": (lambda: pruning.obd_saliency(PARAMS, DIAGONAL), "params like finite"),
    "apply_mask": (lambda: pruning.apply_mask(PARAMS, KEPT), "params booleans like"),
    "keep_pruned": (lambda: retraining.keep_pruned(KEPT), "booleans"),
    "mean": (lambda: streaming.mean(lambda c: 1.0, [EXAMPLES]), "whole examples finite"),
    "chunks": (lambda: list(streaming.chunks(EXAMPLES, 3)), "whole examples"),
    "place": (lambda: data.place(EXAMPLES), "examples"),
    "params_from_flat": (lambda: models.params_from_flat(np.zeros(47_410, "f")), "params"),
    "cross_entropy": (lambda: passes.cross_entropy(IMAGES[:, :2], LABELS), "labels finite"),
} | {f"by {m}": (partial(diagonal, m), PASS + "one_of") for m in (None, *curvature.METHODS)}


@pytest.mark.parametrize("name", DOORS)
def test_each_public_function_asks_its_guards(monkeypatch, name):
    """So that what is tried above on one of them is refused by all."""
    call, expected = DOORS[name]
    asked = set()
    for guard in {guard for _, guards in DOORS.values() for guard in guards.split()}:
        whole = getattr(checks, guard)
        spy = lambda *a, g=guard, f=whole, **o: asked.add(g) or f(*a, **o)  # noqa: E731
        monkeypatch.setattr(checks, guard, spy)
    call()
    assert set(expected.split()) <= asked


def test_the_share_of_checks_in_an_evaluation():
    """Of 1,000 images by the network of the series; how large it is stands in the output."""
    network, images = models.mlp(), np.zeros((1000, 784), np.uint8)
    params, some = network.init(jax.random.key(0)), Examples(images, np.zeros(1000, np.int32))
    pruning.evaluate(network, params, some)
    profile = cProfile.Profile()
    profile.runcall(lambda: [pruning.evaluate(network, params, some) for _ in range(20)])
    times = pstats.Stats(profile).stats  # place -> calls, ..., total time, who called it
    whole = max(entry[3] for entry in times.values())
    outer = [
        entry[3]
        for place, entry in times.items()
        if place[0] == checks.__file__ and not any(c[0] == checks.__file__ for c in entry[4])
    ]
    print(f"{sum(outer) / whole:.0%} of {whole / 20 * 1e3:.1f} ms")
    assert sum(outer) < 0.5 * whole
