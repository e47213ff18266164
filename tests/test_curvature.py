"""Every method against the diagonal of jax.hessian, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import (
    ACTIVATIONS,
    Opaque,
    bent,
    compilations,
    conv_problem,
    convolutional,
    dense,
    error,
    flat,
    ggn_diagonal,
    hessian,
    mean_loss,
    problem,
    squared,
    true_diagonal,
)

from prunelib import curvature, models, passes
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("depth", range(6))
def test_exact_at_any_depth(x64, depth, name):
    """Hidden layers: none to five; two losses, one of them not convex; and it is the default."""
    widths = (5, *(4, 6, 3, 5, 4)[:depth], 3)
    for seed, loss in enumerate([passes.cross_entropy, bent, passes.cross_entropy]):
        network, params, examples = dense(widths, ACTIVATIONS[name], seed)
        expected = true_diagonal(network, params, examples, loss)
        for method in ("exact", None):
            found = hessian_diagonal(network, params, examples, method, loss=loss)
            assert error(found, expected) < 1e-10


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_other_methods_that_are_exact(x64, name):
    network, params, examples = dense((6, 5, 4, 3, 2), ACTIVATIONS[name])
    expected = true_diagonal(network, params, examples)
    for method in ("one_hot", *["gauss_newton"] * (name == "relu")):
        assert error(hessian_diagonal(network, params, examples, method), expected) < 1e-10


def smooth_chain(*functions, build=models.Network, **options):
    """Three dense layers, with `functions` behind the first, and others before and after all."""
    shapes = [(5, 4), (4, 4), (4, 3)]
    first, middle, last = (partial(nnx.Linear, *shape, **options) for shape in shapes)
    return build(
        [lambda x: jnp.cumsum(x, 1), ("dense1", first), *functions, ("dense2", middle), jnp.tanh,
         models.dropout_here, jax.nn.relu, ("dense3", last), jnp.sin]
    )  # fmt: skip


def test_exact_with_any_functions_unit_by_unit(x64):
    """Several in a row, one of each unit's own, and one behind the logits; no bias; masks."""
    scale = jnp.linspace(0.5, 2, 4)
    network = smooth_chain(jax.nn.softplus, lambda x: x * scale[None], jnp.sin, use_bias=False)
    params, examples = problem(network)
    expected = true_diagonal(network, params, examples)
    for size in (1, 3, None):
        found = hessian_diagonal(network, params, examples, "exact", batch_size=size)
        assert error(found, expected) < 1e-10
    real = jnp.arange(9) < 7
    more = Examples(*(jnp.concatenate([x, x[:2]]) for x in examples[:2]), real)
    assert error(hessian_diagonal(network, params, more, "exact"), expected) < 1e-10


MIXING = {
    "softmax": jax.nn.softmax,
    "norm": lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True),
    "running sum": lambda x: jnp.cumsum(x, axis=1),
    "turned": lambda x: jnp.tanh(x)[:, ::-1],
    "over examples": lambda x: x - x.mean(0, keepdims=True),
}


def calls(monkeypatch):
    """The names of the methods that `hessian_diagonal` really runs, as it runs them."""
    names = []

    def note(name, method):
        return lambda *inputs, **options: names.append(name) or method(*inputs, **options)

    for name, method in curvature.METHODS.items():
        monkeypatch.setitem(curvature.METHODS, name, note(name, method))
    return names


@pytest.mark.parametrize("name", MIXING)
def test_a_function_that_mixes_units_is_no_smooth_chain(x64, name, monkeypatch):
    """Small networks get the reference; large ones the choice."""
    network, ran = smooth_chain(MIXING[name]), calls(monkeypatch)
    params, examples = problem(network, n=5)
    expected = true_diagonal(network, params, examples)
    for method in ("exact", None):
        if name == "over examples":  # no loss of one example: only the whole batch has a Hessian
            hessian_diagonal(network, params, examples, method, batch_size=5)
        else:
            assert error(hessian_diagonal(network, params, examples, method), expected) < 1e-10
    assert ran == ["one_hot"] * 2
    monkeypatch.setattr(curvature, "_operations", lambda *sizes: 1e12)
    with pytest.raises(ValueError, match=r'"exact".*"gauss_newton".*"one_hot"'):
        hessian_diagonal(network, params, examples, "exact")
    with pytest.warns(UserWarning, match=r"not the Hessian's: .*dense1.*\"one_hot\""):
        hessian_diagonal(network, params, examples)


def test_exact_is_gauss_newton_where_that_is_exact(monkeypatch):
    """At its price, for a ReLU network in any form."""
    ran = calls(monkeypatch)
    network, *made = dense((6, 5, 4, 3))
    hessian_diagonal(network, *made, "exact")
    hessian_diagonal(network.apply, *made, "exact")
    hessian_diagonal(convolutional(), *conv_problem(convolutional()), "exact")
    assert ran == ["gauss_newton"] * 3


# Derivative rules of a function's own


def ruled(slope, forward=jnp.round):
    """A function with a derivative rule of its own: `forward`, with this slope."""
    function = jax.custom_jvp(lambda x: forward(x))
    function.defjvp(lambda x, t: (function(*x), slope(*x) * t[0]))
    return function


def ruled_backwards(slope, forward=jnp.round):
    """The same for reverse mode only, so that `jax.hessian` refuses."""
    function = jax.custom_vjp(lambda x: forward(x))
    function.defvjp(lambda x: (function(x), x), lambda x, signal: (slope(x) * signal,))
    return function


def inside(x):
    return (jnp.abs(x) < 1).astype(x.dtype)


RULES = {  # the function; whether its slope is constant but for jumps
    "relu": (jax.nn.relu, True),
    "relu6": (jax.nn.relu6, True),
    "straight through": (ruled(jnp.ones_like), True),
    "clipped": (ruled(inside, jnp.sign), True),
    "rounds, slope cos": (ruled(jnp.cos), False),
    "rounds, slope x": (ruled(lambda x: x), False),
    "exp with slope 1": (ruled(jnp.ones_like, jnp.exp), True),
    "tanh with the slope of softmax": (ruled(jax.nn.softmax, jnp.tanh), False),
    "stop_gradient": (lambda x: x + jax.lax.stop_gradient(jnp.sin(x)), True),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("opaque", [False, True])
def test_derivative_rules_of_ones_own(x64, opaque, name, monkeypatch):
    """The Hessian is what JAX's rules say, and Gauss-Newton only where that is it."""
    function, linear = RULES[name]
    network, ran = models.mlp((5, 4, 4, 3), function), calls(monkeypatch)
    params, examples = problem(network)
    expected = true_diagonal(network, params, examples)
    found = hessian_diagonal(Opaque(network) if opaque else network, params, examples)
    assert error(found, expected) < 1e-10
    whole = opaque or "softmax" in name
    assert ran == ["gauss_newton" if linear else "one_hot" if whole else "exact"]


@pytest.mark.parametrize(("slope", "forward"), [(inside, jnp.sign), (jnp.cos, jnp.round)])
def test_rules_for_reverse_mode_only(x64, slope, forward):
    """Two derivatives in reverse do; a Hessian-vector product is refused, by JAX."""
    network = models.mlp((5, 4, 4, 3), ruled_backwards(slope, forward))
    params, examples = problem(network)
    expected = true_diagonal(models.mlp((5, 4, 4, 3), ruled(slope, forward)), params, examples)
    assert error(hessian_diagonal(network, params, examples), expected) < 1e-10
    with pytest.raises(TypeError, match="custom_vjp"):
        hessian_diagonal(network, params, examples, "one_hot")


def test_gauss_newton_of_a_smooth_network_is_the_ggn_and_not_the_hessian(x64):
    network, params, examples = dense(activation=jnp.tanh)
    found = hessian_diagonal(network, params, examples, "gauss_newton")
    assert error(found, ggn_diagonal(network, params, examples)) < 1e-10
    assert error(found, true_diagonal(network, params, examples)) > 1e-2


# Convolutions: shared weights


def twice(product):
    return lambda *arguments, **options: 2 * product(*arguments, **options)


CONVOLUTIONS = {
    "max-pool": {},
    "strided": {"strides": (3, 3), "padding": "SAME", "pool": jax.nn.relu},
    "one stride": {"strides": 3, "padding": "SAME", "pool": jax.nn.relu},
    "dilated": {"kernel_dilation": (2, 2), "pool": models.max_pool, "inputs": 8},
    "circular": {"padding": "CIRCULAR", "inputs": 32},
    "reflected": {"padding": "REFLECT", "inputs": 32},
    "padded by numbers": {"padding": ((1, 0), (0, 1)), "pool": jax.nn.relu, "inputs": 98},
    "as one product": {"conv_general_dilated": models.convolve},
    "of one's own": {"conv_general_dilated": twice(jax.lax.conv_general_dilated)},
    "no bias": {"use_bias": False},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gauss_newton_is_exact_for_convolutions(x64, name):
    """By layers where they are plain, and else by the general path."""
    network = convolutional(**CONVOLUTIONS[name])
    for seed in range(2):
        params, examples = conv_problem(network, seed)
        found = hessian_diagonal(network, params, examples, batch_size=2)
        assert error(found, true_diagonal(network, params, examples)) < 1e-10


def test_convolutions_of_a_smooth_network(x64):
    network = convolutional(jnp.tanh)
    params, examples = conv_problem(network)
    found = hessian_diagonal(network, params, examples, "gauss_newton")
    assert error(found, ggn_diagonal(network, params, examples)) < 1e-10
    one_hot = hessian_diagonal(network, params, examples)  # the default: no method above is exact
    assert error(one_hot, true_diagonal(network, params, examples)) < 1e-10


def test_a_dense_layer_at_several_places_is_no_layer_of_vectors(x64):
    """Its weights are shared as a convolution's are: the general path takes it."""
    for activation in (jax.nn.relu, jnp.tanh):
        first, last = partial(nnx.Linear, 3, 4), partial(nnx.Linear, 16, 3)
        network = models.Network(
            [lambda x: x.reshape(-1, 4, 3), ("dense1", first), activation, models.flatten,
             ("dense2", last)]
        )  # fmt: skip
        params, examples = problem(network, 0, 7, 12)
        expected = true_diagonal(network, params, examples)
        assert error(hessian_diagonal(network, params, examples), expected) < 1e-10


# Any network, any loss


def test_a_network_without_layers_takes_the_general_path(x64):
    network = convolutional()
    params, examples = conv_problem(network)
    fast = hessian_diagonal(network, params, examples)
    for general in (Opaque(network), network.apply):
        assert error(hessian_diagonal(general, params, examples), fast) < 1e-12


def residual(p, x, activation=jax.nn.relu):
    x = x @ p["in"]
    for block in ("block1", "block2"):
        x = x + activation(x @ p[block]["down"]) @ p[block]["up"]
    return x @ p["out"]


class Cnn(nnx.Module):
    """Flax's own for MNIST, from its first tutorial, with fewer and smaller layers."""

    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 3, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, kernel_size=(3, 3), rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(16, 6, rngs=rngs)
        self.linear2 = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.conv1(x)))
        x = self.avg_pool(nnx.relu(self.conv2(x)))
        return self.linear2(nnx.relu(self.linear1(x.reshape(len(x), -1))))


def flax_cnn():
    """A module as it comes, split into a function and its params."""
    graph, params = nnx.split(Cnn(rngs=nnx.Rngs(0)), nnx.Param)

    def apply(params, images):
        return nnx.merge(graph, params)(images.reshape(-1, 8, 8, 1))

    return apply, nnx.to_pure_dict(params)


def linen_like():
    """Params under "params", as linen's `apply` takes them; Equinox's partition gives the same."""
    one, two = (jax.random.normal(jax.random.key(k), s) for k, s in enumerate([(64, 5), (5, 4)]))
    layers = {"Dense_0": {"kernel": one, "bias": jnp.ones(5)}}
    layers["Dense_1"] = {"kernel": two, "bias": jnp.ones(4)}

    def apply(variables, images):
        for name, layer in variables["params"].items():
            images = jax.nn.relu(images) if name == "Dense_1" else images
            images = images @ layer["kernel"] + layer["bias"][None]
        return images

    return apply, {"params": layers}


def blocks():
    shapes = {"in": (64, 5), "out": (5, 4)}
    shapes |= {block: {"down": (5, 3), "up": (3, 5)} for block in ("block1", "block2")}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = [jax.random.normal(key, shape) / 3 for key, shape in zip(keys, leaves, strict=True)]
    return residual, tree.unflatten(draw)


@pytest.mark.parametrize("make", [flax_cnn, linen_like, blocks])
def test_networks_that_a_reader_brings(x64, make, monkeypatch):
    """All are piecewise linear, so that Gauss-Newton is exact, and known to be."""
    apply, params = make()
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
    _, examples = conv_problem(convolutional())
    ran = calls(monkeypatch)
    found = hessian_diagonal(apply, params, examples, batch_size=2)
    assert error(found, true_diagonal(apply, params, examples)) < 1e-10
    assert ran == ["gauss_newton"]
    if make is blocks:  # with a smooth activation: the reference, as it is small
        smooth = partial(residual, activation=jnp.tanh)
        found = hessian_diagonal(smooth, params, examples)
        assert error(found, true_diagonal(smooth, params, examples)) < 1e-10
        hessian_diagonal(smooth, params, examples, "gauss_newton")  # asked for: no warning
        assert ran[1:] == ["one_hot", "gauss_newton"]


class Tripled(models.Network):
    """Its layers are not all that it does."""

    def apply(self, params, images):
        return 3 * super().apply(params, images)


UNUSUAL = {
    "an apply of its own": (Tripled, {}),
    "dot_general": (models.Network, {"dot_general": twice(jax.lax.dot_general)}),
    "promote_dtype": (models.Network, {"promote_dtype": lambda a, dtype: [2 * x for x in a]}),
    "no bias": (models.Network, {"use_bias": False}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_layers_are_trusted_only_where_they_are_all_that_is_computed(x64, name):
    build, options = UNUSUAL[name]
    first = ("dense1", partial(nnx.Linear, 5, 4, **options))
    network = build([first, jax.nn.relu, ("dense2", partial(nnx.Linear, 4, 3))])
    params, examples = problem(network)
    expected = true_diagonal(network, params, examples)
    assert error(hessian_diagonal(network, params, examples), expected) < 1e-10
    smooth = build([first, jnp.tanh, ("dense2", partial(nnx.Linear, 4, 3))])
    expected = true_diagonal(smooth, params, examples)
    assert error(hessian_diagonal(smooth, params, examples, "exact"), expected) < 1e-10


def triple(logits, labels):
    return 3 * passes.cross_entropy(logits, labels)


@pytest.mark.parametrize("loss", [squared, triple, bent])
@pytest.mark.parametrize("method", ["one_hot", "exact", "gauss_newton", "general"])
def test_another_loss(x64, method, loss):
    """Also one that is not convex, so that the factors of its Hessian have signs."""
    network, params, examples = dense()
    of = Opaque(network) if method == "general" else network
    method = "gauss_newton" if method == "general" else method
    found = hessian_diagonal(of, params, examples, method, loss=loss)
    expected = true_diagonal(network, params, examples, loss)
    assert error(found, expected) < 1e-10


# Drawn classes


@pytest.mark.parametrize("kind", ["dense", "convolution", "no layers"])
def test_drawn_classes_are_right_on_average(x64, kind):
    """Within their standard error of Gauss-Newton, which the draws' spread gives."""
    network = convolutional() if kind == "convolution" else models.mlp((16, 5, 3))
    made = conv_problem(network) if kind == "convolution" else problem(network, 0, 6, 16, 3)
    found = partial(hessian_diagonal, network.apply if kind == "no layers" else network, *made)
    expected = flat(found())
    sample = np.stack(
        [flat(found("sampled", draws=50, key=jax.random.key(seed))) for seed in range(40)]
    )
    spread = sample.std(0) / np.sqrt(39)
    assert np.abs((sample.mean(0) - expected) / np.where(spread > 1e-12, spread, 1)).max() < 4.5
    fifty = np.linalg.norm(sample - expected, axis=1).mean()
    assert np.linalg.norm(flat(found("sampled")) - expected) > 2 * fifty


def test_draws_depend_on_the_key_and_not_on_the_batches(x64):
    found = partial(hessian_diagonal, *dense((6, 5, 4, 3)), "sampled")
    one, two = (found(batch_size=size, key=jax.random.key(7)) for size in (1, 100))
    assert error(one, two) < 1e-12
    assert error(found(key=jax.random.key(8)), one) > 1e-3


# What it costs, and what it warns of


def test_one_hot_warns_of_hours():
    """Before it begins: here, and in all tests, a warning is an error."""
    network = models.mlp()
    params = network.init(jax.random.key(0))
    examples = Examples(np.zeros((60_000, 784), np.uint8), np.zeros(60_000, np.int32))
    with pytest.raises(UserWarning, match=r"one_hot .*hours"):
        hessian_diagonal(network, params, examples, "one_hot")


def test_nothing_recompiles_when_the_parameters_change():
    examples = Examples(jnp.ones((4, 5)), jnp.array([0, 1, 2, 0]))
    methods = ("gauss_newton", "exact", "hutchinson")
    for seed in range(3):
        params = models.mlp((5, 4, 3)).init(jax.random.key(seed))
        with compilations() as made:
            for method in methods:
                hessian_diagonal(models.mlp((5, 4, 3)), params, examples, method)
        assert bool(made) == (seed == 0)


def test_hvp_is_a_column_of_the_hessian(x64):
    network, params, examples = dense(activation=jnp.tanh)
    function, vector, _ = mean_loss(network, params, examples)
    whole = hessian(network, params, examples)
    for k in (0, 7, 38):
        column = curvature.hvp(function, vector, jnp.eye(len(vector))[k])
        np.testing.assert_allclose(column, whole[:, k], atol=1e-12)
