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
@pytest.mark.parametrize("widths", [(5, 4, 3), (6, 5, 4, 3, 2)])
def test_methods_that_are_exact(x64, widths, name):
    """At any depth; the default is one of them; Gauss-Newton is for ReLU only."""
    methods = ["one_hot", "neuron", None, *["gauss_newton"] * (name == "relu")]
    for seed in range(3):
        network, params, examples = dense(widths, ACTIVATIONS[name], seed)
        expected = true_diagonal(network, params, examples)
        for method in methods:
            assert error(hessian_diagonal(network, params, examples, method), expected) < 1e-10


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
    with pytest.raises(ValueError, match=r'"neuron".*"gauss_newton".*"one_hot"'):
        hessian_diagonal(network, params, examples, "neuron")


# Any network, any loss


def test_a_network_without_layers_takes_the_general_path(x64):
    network = convolutional()
    params, examples = conv_problem(network)
    fast = hessian_diagonal(network, params, examples)
    for general in (Opaque(network), network.apply):
        assert error(hessian_diagonal(general, params, examples), fast) < 1e-12
    with pytest.raises(ValueError, match=r"models\.Network of plain"):
        hessian_diagonal(Opaque(network), params, examples, "neuron")


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
    if name == "no bias":
        assert error(hessian_diagonal(network, params, examples, "neuron"), expected) < 1e-10
    else:
        with pytest.raises(ValueError, match=r"plain nnx\.Linear"):
            hessian_diagonal(network, params, examples, "neuron")


def triple(logits, labels):
    return 3 * passes.cross_entropy(logits, labels)


@pytest.mark.parametrize("loss", [squared, triple, bent])
@pytest.mark.parametrize("method", ["one_hot", "neuron", "gauss_newton", "general"])
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
    methods = ("gauss_newton", "neuron", "hutchinson")
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
