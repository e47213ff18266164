"""Faults that people's reports of like packages led to: of each kind the case, and others."""

import dataclasses
import functools
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import dense, error, flat, problem, squared, true_diagonal

from prunelib import (
    checks,
    curvature,
    models,
    passes,
    pruning,
    retraining,
    store,
    streaming,
    taylor,
)
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples
from prunelib.training import Recipe, train

ONE = Examples(np.ones((1, 1), np.float32), np.array([0], np.int32))
W = {"w": jnp.array(1.0)}
relu = jax.nn.relu
KERNEL = {"dense1": {"kernel": jnp.array([[1.0, -0.5]]), "bias": jnp.array([0.1, 0.2])}}


def two_logits(z):
    return jnp.stack([z, 0 * z], 1)


def doors(network, params, examples, loss=passes.cross_entropy):
    """What each public function says of a network, in one vector; the last ones know one loss."""
    none = jax.tree.map(lambda w: jnp.zeros(w.shape, bool), params)
    methods = (None, "gauss_newton", "one_hot", "hutchinson")
    found = [hessian_diagonal(network, params, examples, m, loss=loss) for m in methods]
    found.append(list(taylor.loss_change(network, params, none, examples, loss=loss)))
    found.append(hessian_diagonal(network, params, examples, "sampled"))
    found.append(list(pruning.evaluate(network, params, examples)))
    found.append(pruning.accuracy_curve(network, params, params, examples, [0, 50]).to_numpy())
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])


# 1. Programs that have gone stale ----------------------------------------------------------------

FACTOR = {"now": 1.0}


class Net:
    a = 1.0

    def apply(self, params, images):
        return two_logits(self.a * params["w"] * images[:, 0])


class Averages(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))

    def apply(self, params, images):
        return two_logits(params["w"] * self.norm(images)[:, 0])


def activation(x):
    return FACTOR["now"] * x


@jax.custom_jvp
def ruled(x):
    return 1 * x


@ruled.defjvp
def _rule(primals, tangents):
    return 1 * primals[0], FACTOR["now"] * tangents[0]


def chain(function):
    return models.Network([("dense1", partial(nnx.Linear, 1, 2)), function])


def set_factor(network, value):
    FACTOR["now"] = value


STALE = {
    "an attribute": (Net, lambda n, v: setattr(n, "a", v), W),
    "a global": (lambda: lambda p, x: two_logits(activation(p["w"] * x[:, 0])), set_factor, W),
    "averages": (Averages, lambda n, v: n.norm.var.set_value(jnp.array([1 / v**2])), W),
    "an activation's global": (lambda: chain(activation), set_factor, KERNEL),
    "what a lambda calls": (lambda: chain(lambda x: activation(x)), set_factor, KERNEL),
    "a rule's global": (lambda: lambda p, x: two_logits(ruled(p["w"] * x[:, 0])), set_factor, W),
    "what passes for JAX's": (lambda: chain(functools.wraps(relu)(activation)), set_factor, KERNEL),
}


@pytest.mark.parametrize("name", STALE)
def test_what_a_network_reads_may_change(name):
    """Every function sees the network as it is now, not as it was when it was compiled."""
    build, change, params = STALE[name]
    network, found = build(), []
    for value in (1.0, 2.0, 1.0):
        change(network, value)
        found.append(doors(network, params, ONE))
    change(network, 2.0)
    jax.clear_caches()
    np.testing.assert_allclose(found[1], doors(network, params, ONE), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found[2], found[0])
    assert not np.allclose(found[0], found[1])
    set_factor(None, 1.0)
    if name == "an attribute":  # the report's own numbers, for 1 and for 2
        np.testing.assert_allclose(found[0][[0, -1]], [0.1966, 0.3133], atol=1e-4)


def test_what_a_loss_or_training_reads_may_change():
    def loss(logits, labels):
        return activation(passes.cross_entropy(logits, labels))

    network, params, examples = dense()
    layers = [("dense1", partial(nnx.Linear, 5, 4)), activation]
    trained = models.Network([*layers, ("dense2", partial(nnx.Linear, 4, 3))])
    found, runs = [], []
    for factor in (1.0, 2.0, 1.0):
        set_factor(None, factor)
        found.append(doors(network, params, examples, loss)[: 4 * flat(params).size + 5])
        runs.append(flat(train(trained, Recipe(steps=2, batch=4), examples, [0]).params))
    for some in (found, runs):
        np.testing.assert_array_equal(some[0], some[2])
    assert np.abs(runs[0] - runs[1]).max() > 1e-5
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-4, atol=1e-6)


def test_noise_that_is_fixed_may_be_in_a_network():
    """It closes over a random key, which is no array of numbers."""
    network, params, examples = dense()
    losses = []
    for seed in (0, 1):
        key = jax.random.key(seed)

        def noisy(p, x, key=key):
            return network.apply(p, x) + jax.random.normal(key, (1, 3))

        losses.append(pruning.evaluate(noisy, params, examples).loss)
    assert losses[0] != losses[1]


# 2 is in test_numerics.py. 3. Weights at several depths ------------------------------------------


def rnn(p, x):
    def step(h, column):
        return relu(h @ p["a"] + jnp.outer(column, p["b"])), None

    return jax.lax.scan(step, jnp.zeros((len(x), 3)), x.T)[0]


def attention(p, x):
    h = (x @ p["c"])[:, :, None]
    return ((h * h.swapaxes(1, 2)) @ h)[:, :, 0]


SHARED = {
    "tied": lambda p, x: relu(x @ p["c"]) @ p["c"].T[:, :3],
    "two depths": lambda p, x: relu(relu(x @ p["c"]) @ p["a"]) @ p["a"],
    "again": lambda p, x: jax.checkpoint(lambda h: relu(h @ p["a"]) @ p["a"])(x @ p["c"]),
    "by scan": rnn,
    "times itself": lambda p, x: (x @ p["c"]) * (x @ p["c"]),
    "squared": lambda p, x: jnp.square(x @ p["c"]),
    "attention": attention,
    "its own gate": lambda p, x: (x @ p["c"]) * jnp.clip(x @ p["c"], 0, 1),
    "in a product of matrices": lambda p, x: x[:, :3] @ (p["a"] @ p["a"]),
}
ONCE = {
    "residual": lambda p, x: x @ p["c"] + relu((x @ p["c"]) @ p["a"]),
    "activations twice": lambda p, x: relu(x @ p["c"]) @ p["a"] - jnp.abs(x @ p["c"]),
    "gate of another array": lambda p, x: (x @ p["c"]) * (x[:, :3] @ p["a"]),
    "sorted": lambda p, x: jnp.sort(x @ p["c"], 1) @ p["a"],
    "cut": lambda p, x: jax.nn.hard_tanh(jax.nn.relu6(x @ p["c"])) @ p["a"],
    "maxout": lambda p, x: jnp.maximum(x @ p["c"], x[:, :3] @ p["a"]),
    "mapped": lambda p, x: jax.lax.map(lambda row: relu(row @ p["c"]) @ p["a"], x),
    "again": lambda p, x: jax.checkpoint(lambda x: relu(x @ p["c"]))(x) @ p["a"],
}


def three_arrays():
    a, b, c, x = jax.random.split(jax.random.key(3), 4)
    draw = jax.random.normal
    params = {"a": draw(a, (3, 3)), "b": draw(b, (3,)), "c": draw(c, (4, 3))}
    return params, Examples(draw(x, (6, 4)), jnp.arange(6) % 3)


@pytest.mark.parametrize("name", SHARED)
def test_weights_that_multiply_themselves(x64, name):
    """By default exact, for networks as small as this; Gauss-Newton by name warns.

    Not where the network bends in its images too: there it is as with a smooth activation.
    """
    params, examples = three_arrays()
    expected = true_diagonal(SHARED[name], params, examples)
    assert error(hessian_diagonal(SHARED[name], params, examples), expected) < 1e-10
    for method in ("gauss_newton", "sampled"):
        if name in ("times itself", "squared", "attention", "its own gate"):
            hessian_diagonal(SHARED[name], params, examples, method)
            continue
        with pytest.warns(UserWarning, match="multiply themselves"):
            hessian_diagonal(SHARED[name], params, examples, method)


@pytest.mark.parametrize("name", ONCE)
def test_weights_used_once(x64, name):
    """However their activations are used: no warning (it would be an error), and exact."""
    params, examples = three_arrays()
    expected = true_diagonal(ONCE[name], params, examples)
    assert error(hessian_diagonal(ONCE[name], params, examples, "gauss_newton"), expected) < 1e-10


def test_a_tied_weight_has_no_cross_term():
    def tied(p, x):
        return two_logits(p["w"] * relu(p["w"] * x[:, 0]))

    assert float(hessian_diagonal(tied, W, ONE)["w"]) == pytest.approx(0.2486, abs=1e-4)
    change = taylor.loss_change(tied, W, {"w": jnp.array(False)}, ONE)
    assert change.cross == pytest.approx(0, abs=1e-6)


# 4. Memory ---------------------------------------------------------------------------------------

MEMORY = """
import sys
import jax, jax.numpy as jnp, numpy as np
from prunelib import curvature, models, pruning, taylor
from prunelib.data import Examples
classes, numbers = sys.argv[1] == "classes", np.random.default_rng(0)
network = models.mlp((784, 600, 300, 100)) if classes else models.lenet5()
params = network.init(jax.random.key(0))
n = 20 if classes else 100
examples = Examples(numbers.random((n, 784), np.float32), numbers.integers(0, 10, n))
if classes:
    curvature.hessian_diagonal(lambda p, x: network.apply(p, x), params, examples)
else:
    masks = [pruning.mask(pruning.magnitude(params), level) for level in range(0, 100, 10)]
    masks = jax.tree.map(lambda *each: jnp.stack(each), *masks)
    taylor.loss_change(network, params, masks, examples, params)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["classes", "masks"])
def test_memory_of_the_defaults(kind):
    """A hundred classes of 680,000 parameters by the general path; ten masks of LeNet-5."""
    command, folder = [sys.executable, "-c", MEMORY, kind], Path(store.__file__).parents[1]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1e6  # kilobytes


# 5 and 9. Params in any pytree -------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=["hidden", "classify"], meta_fields=[])
@dataclasses.dataclass
class Fields:
    hidden: Any
    classify: Any


class Module(Fields):
    """As Equinox registers its modules."""


jax.tree_util.register_pytree_node(
    Module, lambda m: ((m.hidden, m.classify), None), lambda _, children: Module(*children)
)
TREES = {
    "linen": lambda h, c: {"params": {"hidden": h, "classify": c}},
    "FrozenDict": lambda h, c: flax.core.freeze({"hidden": h, "classify": c}),
    "nnx.State": lambda h, c: nnx.State({"hidden": h, "classify": c}),
    "Variables": lambda h, c: nnx.State(jax.tree.map(nnx.Param, {"hidden": h, "classify": c})),
    "list": lambda h, c: [h, c],
    "dataclass": Fields,
    "Module": Module,
}


def as_plain(tree):
    """Any of these trees as the dict that `models.mlp` makes."""
    if isinstance(tree, Fields):
        tree = {"hidden": tree.hidden, "classify": tree.classify}
    if not isinstance(tree, list):
        tree = tree.get("params", tree)
        tree = tree["hidden"], tree["classify"]
    layers = zip(("dense1", "dense2"), tree, strict=True)
    return {n: {k: jnp.asarray(layer[k]) for k in ("kernel", "bias")} for n, layer in layers}


@pytest.mark.parametrize("name", TREES)
def test_params_in_any_pytree(x64, name):
    """Whatever order the leaves are in; results have the same form."""
    network, params, examples = dense()
    tree = TREES[name](params["dense1"], params["dense2"])

    def apply(tree, images):
        return network.apply(as_plain(tree), images)

    diagonal = hessian_diagonal(apply, tree, examples)
    assert jax.tree.structure(diagonal) == jax.tree.structure(tree)
    assert error(as_plain(diagonal), hessian_diagonal(network, params, examples)) < 1e-12
    kept = pruning.mask(pruning.obd_saliency(tree, diagonal), 50)
    assert pruning.evaluate(apply, tree, examples) == pruning.evaluate(network, params, examples)
    one = taylor.loss_change(apply, tree, kept, examples)
    two = taylor.loss_change(network, params, as_plain(kept), examples)
    np.testing.assert_allclose(one, two, atol=1e-12)


# 8. The usual NNX way ----------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False], ids=["a mask of arrays", "a mask of Variables"])
def test_keep_pruned_under_nnx_optimizer(plain):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    kept = pruning.mask(pruning.magnitude(nnx.to_pure_dict(state) if plain else state), 50)
    nnx.update(model, pruning.apply_mask(state, kept))
    chained = optax.chain(optax.adam(0.1), retraining.keep_pruned(kept))
    optimizer = nnx.Optimizer(model, chained, wrt=nnx.Param)
    before = flat(nnx.to_pure_dict(nnx.state(model)))
    for _ in range(3):
        gradient = nnx.grad(lambda m: (m(jnp.ones((2, 4))) ** 2).sum())(model)
        optimizer.update(model, gradient)
    after, mask = flat(nnx.to_pure_dict(nnx.state(model))), flat(kept)
    assert not after[~mask].any()
    assert (after[mask] != before[mask]).any()


# 10. Debugging -----------------------------------------------------------------------------------


def test_two_rounds_without_jit():
    network = models.mlp((5, 4, 3))
    _, examples = problem(network)
    params = jax.vmap(network.init)(jax.random.split(jax.random.key(0), 1))
    arguments = network, params, examples, examples, [20, 50], Recipe(steps=1, batch=4)
    go = partial(retraining.prune_and_retrain, *arguments, seeds=[0])
    with jax.disable_jit():
        found = go("magnitude")
    np.testing.assert_allclose(flat(found.params), flat(go("magnitude").params), atol=1e-5)


# 11. Any network ---------------------------------------------------------------------------------


@dataclasses.dataclass
class NoHash:
    """Its instances cannot be keys: a dataclass with equality has no hash."""

    inner: Any

    def apply(self, params, images):
        return self.inner.apply(params, images)


def namespace(network):
    return SimpleNamespace(apply=network.apply)


@pytest.mark.parametrize("wrap", [lambda n: n.apply, namespace, NoHash])
def test_a_network_is_what_it_computes(wrap):
    network, params, examples = dense()
    found, expected = (doors(n, params, examples) for n in (wrap(network), network))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# 13. Small ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_a_leaf_of_size_zero(scope):
    network, params, examples = dense()
    more = params | {"empty": jnp.zeros((0, 3))}

    def apply(p, x):
        return network.apply({name: p[name] for name in params}, x)

    doors(apply, more, examples)
    kept, plain = (pruning.mask(pruning.magnitude(p), 50, scope) for p in (more, params))
    found = taylor.loss_change(apply, more, kept, examples)
    expected = taylor.loss_change(network, params, plain, examples)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_numpys_double_precision_is_no_trouble():
    """Neither of images nor of params, where JAX has float32: no warning, the same result."""
    network, params, examples = dense()
    wide = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    more = Examples(np.asarray(examples.images, np.float64), np.asarray(examples.labels, np.int64))
    expected = doors(network, params, examples)
    np.testing.assert_allclose(doors(network, wide, more), expected, rtol=1e-5, atol=1e-7)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    chunks = streaming.chunks(dense()[2], 2)
    streaming.mean(lambda c: c.images.mean(0), chunks, file="~/x/sum.npz", every=1)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_no_home(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "PRUNELIB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError))
    assert store.cache_dir().name == "prunelib"


AROUND = {
    "jit of params": lambda f, p, x: jax.jit(lambda p: f(p, x))(p),
    "jit of examples": lambda f, p, x: jax.jit(lambda x: f(p, x))(x),
    "vmap": lambda f, p, x: jax.vmap(lambda p: f(p, x))(jax.tree.map(lambda w: w[None], p)),
    "grad": lambda f, p, x: jax.grad(lambda p: f(p, x)[1])(p),
}


@pytest.mark.parametrize("around", AROUND)
def test_plain_numbers_are_refused_inside_jit_in_words(around):
    network, params, (images, labels, _) = dense()
    kept = pruning.mask(pruning.magnitude(params), 50)
    for function in (
        lambda p, x: pruning.evaluate(network, p, Examples(x, labels)),
        lambda p, x: pruning.accuracy_curve(network, p, p, Examples(x, labels), [0]),
        lambda p, x: taylor.loss_change(network, p, kept, Examples(x, labels)),
    ):
        with pytest.raises(TypeError, match="not known yet, inside jit, vmap or grad"):
            AROUND[around](function, params, images)


def test_the_rest_works_inside_jit():
    """And what checks find is not in the program."""
    network, params, examples = dense()

    def pruned(params, examples):
        diagonal = hessian_diagonal(network, params, examples)
        kept = pruning.mask(pruning.obd_saliency(params, diagonal), 50)
        return pruning.apply_mask(params, kept)

    found = jax.jit(pruned)(params, examples)
    np.testing.assert_allclose(flat(found), flat(pruned(params, examples)), rtol=1e-6)
    text = jax.jit(pruned).lower(params, examples).as_text()
    assert "is_finite" not in text
    assert "callback" not in text


@pytest.mark.parametrize("method", curvature.METHODS)
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh], ids=["relu", "tanh"])
def test_strict_promotion_of_dtypes(strict_dtypes, method, activation):
    """Also from bytes; and of the functions that use a diagonal."""
    network, params, examples = dense(activation=activation)
    grey = Examples(np.arange(35, dtype=np.uint8).reshape(7, 5), np.asarray(examples.labels))
    for some in (examples, grey):
        diagonal = hessian_diagonal(network, params, some, method)
    kept = pruning.mask(pruning.obd_saliency(params, diagonal), 50)
    pruning.evaluate(network, pruning.apply_mask(params, kept), grey)
    taylor.loss_change(network, params, kept, grey, diagonal)
    if method != "sampled":
        hessian_diagonal(network, params, examples, method, loss=squared)


def test_a_key_named_value_is_a_name():
    """Only the attribute of a Variable is no name."""
    tree = {"a": {"value": jnp.ones(2)}, "b": {"other": jnp.ones(2)}}
    other = {"a": jnp.ones(2), "b": {"other": jnp.ones(2)}}
    assert checks.names_of(jax.tree.leaves_with_path(tree)[0][0]) == ("a", "value")
    with pytest.raises(ValueError, match="kept: expected the arrays of params"):
        pruning.apply_mask(tree, jax.tree.map(lambda w: w > 0, other))


def test_a_network_that_calls_back_has_an_accuracy():
    """It has no derivative, and none is asked for."""

    def network(params, images):
        out = jax.ShapeDtypeStruct((len(images), 3), jnp.float32)
        return jax.pure_callback(lambda w, x: np.asarray(x @ w, np.float32), out, params, images)

    w, images = np.eye(4, 3, dtype="f"), np.eye(3, 4, dtype="f")
    found = pruning.evaluate(network, jnp.asarray(w), Examples(images, np.arange(3)))
    assert found.accuracy == 1
