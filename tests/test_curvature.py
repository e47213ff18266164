"""Every method against the diagonal of jax.hessian, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from prunelib import curvature, models, passes
from prunelib.data import Examples

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
}
SHAPES = [(5, 4, 3), (6, 5, 4, 3, 2)]


def problem(network, seed, n, pixels, classes):
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    params = jax.tree.map(lambda w: w.astype(jnp.float64), network.init(k1))
    images = jax.random.normal(k2, (n, pixels), jnp.float64)
    return params, Examples(images, jax.random.randint(k3, (n,), 0, classes))


def dense_problem(widths, activation, seed=0, n=11):
    network = models.mlp(widths, activation)
    return network, *problem(network, seed, n, widths[0], widths[-1])


def pictures(x):
    return x.reshape(len(x), 8, 8, 1)


def conv_problem(seed=0, n=5, activation=jax.nn.relu, **options):
    conv = partial(nnx.Conv, 1, 3, kernel_size=(3, 3), **{"padding": "VALID"} | options)
    network = models.Network(
        [
            pictures,
            ("conv1", conv),
            activation,
            models.max_pool if "strides" not in options else jnp.tanh,
            ("conv2", partial(nnx.Conv, 3, 2, kernel_size=(2, 2), padding="SAME")),
            models.flatten,
            ("dense1", Flat()),
        ]
    )
    return network, *problem(network, seed, n, 64, 4)


class Flat:
    """A dense layer of 4 units on whatever number of inputs the layers before it give."""

    def __call__(self, rngs):
        return nnx.Linear(18, 4, rngs=rngs)


@partial(jax.jit, static_argnames=("network", "loss"))
def true_diagonal(network, params, examples, loss=passes.cross_entropy):
    flat, unravel = ravel_pytree(params)

    def mean_loss(flat):
        return loss(network.apply(unravel(flat), examples.images), examples.labels).mean()

    return unravel(jnp.diagonal(jax.hessian(mean_loss)(flat)))


def ggn_diagonal(network, params, examples):
    """The Gauss-Newton diagonal from whole Jacobians."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacrev(lambda f: network.apply(unravel(f), examples.images))(flat)
    p = jax.nn.softmax(network.apply(params, examples.images))
    inner = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
    return unravel(jnp.einsum("nck,ncd,ndk->k", jacobian, inner, jacobian) / len(p))


def error(found, expected):
    found, expected = ravel_pytree(found)[0], ravel_pytree(expected)[0]
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


# Exact methods


@pytest.mark.parametrize(
    ("widths", "name"), [*((SHAPES[0], name) for name in ACTIVATIONS), (SHAPES[1], "tanh")]
)
def test_one_hot_and_neuron_are_exact(x64, widths, name):
    for seed in range(3):
        network, params, examples = dense_problem(widths, ACTIVATIONS[name], seed)
        expected = true_diagonal(network, params, examples)
        for method in ("one_hot", "neuron"):
            found = curvature.hessian_diagonal(network, params, examples, method)
            assert error(found, expected) < 1e-10


@pytest.mark.parametrize("method", ["one_hot", "neuron", "gauss_newton", "lecun1990"])
def test_the_batch_size_does_not_matter(x64, method):
    network, params, examples = dense_problem((5, 4, 3), jax.nn.relu)
    whole = curvature.hessian_diagonal(network, params, examples, method, batch_size=11)
    for batch_size in (1, 4):
        part = curvature.hessian_diagonal(network, params, examples, method, batch_size=batch_size)
        assert error(part, whole) < 1e-12


@pytest.mark.parametrize("widths", SHAPES)
def test_gauss_newton_is_exact_for_relu(x64, widths):
    for seed in range(3):
        network, params, examples = dense_problem(widths, jax.nn.relu, seed)
        found = curvature.hessian_diagonal(network, params, examples, "gauss_newton", batch_size=4)
        assert error(found, true_diagonal(network, params, examples)) < 1e-10


def test_gauss_newton_of_a_smooth_network_is_the_ggn_and_not_the_hessian(x64):
    network, params, examples = dense_problem((5, 4, 3), jnp.tanh)
    found = curvature.hessian_diagonal(network, params, examples, "gauss_newton")
    assert error(found, ggn_diagonal(network, params, examples)) < 1e-10
    assert error(found, true_diagonal(network, params, examples)) > 1e-2


def test_one_example(x64):
    network, params, examples = dense_problem((5, 4, 3), jax.nn.relu, n=1)
    expected = true_diagonal(network, params, examples)
    for method in ("one_hot", "neuron", "gauss_newton"):
        assert (
            error(curvature.hessian_diagonal(network, params, examples, method), expected) < 1e-10
        )


# Convolutions: shared weights


def test_gauss_newton_is_exact_for_convolutions_with_max_pool(x64):
    for seed in range(3):
        network, params, examples = conv_problem(seed)
        expected = true_diagonal(network, params, examples)
        for method in ("gauss_newton", "one_hot"):
            found = curvature.hessian_diagonal(network, params, examples, method, batch_size=2)
            assert error(found, expected) < 1e-10


def test_strided_padded_convolution_of_a_smooth_network_is_the_ggn(x64):
    network, params, examples = conv_problem(strides=(3, 3), padding="SAME")
    found = curvature.hessian_diagonal(network, params, examples, "gauss_newton")
    assert error(found, ggn_diagonal(network, params, examples)) < 1e-10


def test_the_recursion_of_1990_is_wrong_for_shared_weights(x64):
    network, params, examples = conv_problem()
    found = curvature.hessian_diagonal(network, params, examples, "lecun1990")
    expected = true_diagonal(network, params, examples)
    assert error(found["conv1"], expected["conv1"]) > 1e-2
    assert error(found["dense1"], expected["dense1"]) < 1e-10  # the last layer is exact


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
def test_other_paddings_take_the_general_path(x64, padding):
    """nnx.Conv pads the images itself then, and convolves what is padded."""
    conv = partial(nnx.Conv, 1, 2, (3, 3), padding=padding)
    layers = [lambda x: x.reshape(len(x), 4, 4, 1), ("conv1", conv), jax.nn.relu, models.flatten]
    network = models.Network([*layers, ("dense1", partial(nnx.Linear, 32, 3))])
    params, examples = problem(network, 0, 4, 16, 3)
    found = curvature.gauss_newton(network, params, examples)
    expected = curvature.one_hot(network, params, examples)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)


def test_hutchinson_has_the_same_defaults_as_the_others():
    network = models.mlp((3, 4, 2))
    params = network.init(jax.random.key(0))
    examples = Examples(np.ones((2, 3), np.float32), np.array([0, 1]))
    one = curvature.hutchinson(network, params, examples)
    other = curvature.hessian_diagonal(network, params, examples, "hutchinson")
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_neuron_refuses_shared_weights_and_names_a_method_that_can(x64):
    network, params, examples = conv_problem()
    with pytest.raises(ValueError, match=r'"neuron".*"gauss_newton" or "one_hot"'):
        curvature.hessian_diagonal(network, params, examples, "neuron")


# Any network, any loss


class Opaque:
    """A network of which only `apply` is known."""

    def __init__(self, network):
        self.apply = lambda params, images: network.apply(params, images)


def test_a_network_without_layers_takes_the_general_path(x64):
    network, params, examples = conv_problem()
    fast = curvature.hessian_diagonal(network, params, examples)
    general = curvature.hessian_diagonal(Opaque(network), params, examples)
    assert error(general, fast) < 1e-12
    for method in ("neuron", "lecun1990"):
        with pytest.raises(ValueError, match="chain"):
            curvature.hessian_diagonal(Opaque(network), params, examples, method)


class Tripled(models.Network):
    """Its layers are not all that it does."""

    def apply(self, params, images):
        return 3 * super().apply(params, images)


def twice(product):
    return lambda *arguments, **options: 2 * product(*arguments, **options)


UNUSUAL = {
    "an apply of its own": (Tripled, {}),
    "dot_general": (models.Network, {"dot_general": twice(jax.lax.dot_general)}),
    "promote_dtype": (models.Network, {"promote_dtype": lambda a, dtype: [2 * x for x in a]}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_layers_are_trusted_only_where_they_are_all_that_is_computed(x64, name):
    build, options = UNUSUAL[name]
    first = ("dense1", partial(nnx.Linear, 5, 4, **options))
    network = build([first, jax.nn.relu, ("dense2", partial(nnx.Linear, 4, 3))])
    params, examples = problem(network, 0, 7, 5, 3)
    found = curvature.gauss_newton(network, params, examples)
    assert error(found, true_diagonal(network, params, examples)) < 1e-10
    for method in ("neuron", "lecun1990"):
        with pytest.raises(ValueError, match=r"plain nnx\.Linear"):
            curvature.hessian_diagonal(network, params, examples, method)


def test_another_convolution_takes_the_general_path(x64):
    for other in (twice(jax.lax.conv_general_dilated), models.convolve):
        network, params, examples = conv_problem(conv_general_dilated=other)
        found = curvature.gauss_newton(network, params, examples)
        assert error(found, true_diagonal(network, params, examples)) < 1e-10


def test_layers_without_a_bias(x64):
    layers = [("dense1", partial(nnx.Linear, 5, 4, use_bias=False)), jax.nn.relu]
    network = models.Network([*layers, ("dense2", partial(nnx.Linear, 4, 3))])
    params, examples = problem(network, 0, 7, 5, 3)
    expected = true_diagonal(network, params, examples)
    for method in ("one_hot", "neuron", "gauss_newton"):
        assert (
            error(curvature.hessian_diagonal(network, params, examples, method), expected) < 1e-10
        )


def squared_error(logits, labels):
    return ((logits - jax.nn.one_hot(labels, logits.shape[1])) ** 2).sum(1)


def triple(logits, labels):
    return 3 * passes.cross_entropy(logits, labels)


@pytest.mark.parametrize("loss", [squared_error, triple])
@pytest.mark.parametrize("method", ["one_hot", "neuron", "gauss_newton"])
def test_another_loss(x64, method, loss):
    network, params, examples = dense_problem((5, 4, 3), jax.nn.relu)
    found = curvature.hessian_diagonal(network, params, examples, method, loss=loss)
    assert error(found, true_diagonal(network, params, examples, loss)) < 1e-10


# The recursion of 1990


def recursion_of_1990(params, images, labels, activation, slope, bend):
    """Equations 6 to 8 of the paper, weight by weight, in plain NumPy."""
    layers = [jax.tree.map(np.asarray, params[name]) for name in sorted(params)]
    total = [
        {"kernel": np.zeros(p["kernel"].shape), "bias": np.zeros(p["bias"].shape)} for p in layers
    ]
    for image, label in zip(np.asarray(images), np.asarray(labels), strict=True):
        a, z = [image], []
        for p in layers:
            z.append(a[-1] @ p["kernel"] + p["bias"])
            a.append(activation(z[-1]))
        e = np.exp(z[-1] - z[-1].max())
        probability = e / e.sum()
        first = probability - np.eye(len(e))[label]  # ∂E/∂z of the last layer
        second = probability * (1 - probability)
        for level in reversed(range(len(layers))):
            kernel = layers[level]["kernel"]
            for j in range(kernel.shape[1]):
                total[level]["bias"][j] += second[j]
                for i in range(kernel.shape[0]):
                    total[level]["kernel"][i, j] += second[j] * a[level][i] ** 2
            if level:
                x = z[level - 1]
                second_a = kernel**2 @ second
                first_a = kernel @ first
                second = slope(x) ** 2 * second_a + bend(x) * first_a
                first = slope(x) * first_a
    means = [{n: t / len(images) for n, t in sums.items()} for sums in total]
    return {f"dense{k}": sums for k, sums in enumerate(means, 1)}


MIXING = {
    "softmax": jax.nn.softmax,
    "minus the mean": lambda x: x - x.mean(-1, keepdims=True),
    "reversed": lambda x: x[:, ::-1],
    "the mean of pairs": lambda x: x.reshape(len(x), 2, 2).mean(2),
    "doubled and cut": lambda x: 2 * x[:, :2],
    "sharp softmax": lambda x: jax.nn.softmax(300 * x),
    "small softmax": lambda x: 1e-5 * jax.nn.softmax(x),
}
UNIT_BY_UNIT = {
    **ACTIVATIONS,
    "the maximum of pairs": lambda x: x.reshape(len(x), 2, 2).max(2),
    "cut": lambda x: x[:, :2],
    "padded": lambda x: jnp.pad(x, [(0, 0), (0, 1)]),
    "logarithm": lambda x: jnp.log(x),  # NaN at some points
}


@pytest.mark.parametrize("name", [*MIXING, *UNIT_BY_UNIT])
def test_lecun1990_refuses_functions_that_mix_units(x64, name):
    """It would follow each unit by itself, and be wrong even in the last layer's inputs."""
    function = (MIXING | UNIT_BY_UNIT)[name]
    width = jax.eval_shape(function, jnp.ones((1, 4))).shape[1]
    first, second = partial(nnx.Linear, 3, 4), partial(nnx.Linear, width, 2)
    chain = [("dense1", first), jnp.exp, ("dense2", partial(nnx.Linear, 4, 4))]
    network = models.Network([*chain, lambda x: 2 + jnp.tanh(x), function, ("dense3", second)])
    params, examples = problem(network, 0, 5, 3, 2)
    if name in MIXING:
        with pytest.raises(ValueError, match=r'mixes units.*use "neuron"'):
            curvature.lecun1990(network, params, examples)
    else:
        curvature.lecun1990(network, params, examples)


def test_lecun1990_is_the_recursion_of_the_paper(x64):
    cases = {
        jnp.tanh: (
            np.tanh,
            lambda x: 1 - np.tanh(x) ** 2,
            lambda x: -2 * np.tanh(x) * (1 - np.tanh(x) ** 2),
        ),
        jax.nn.relu: (lambda x: np.maximum(x, 0), lambda x: x > 0, lambda x: 0 * x),
    }
    for activation, plain in cases.items():
        network, params, examples = dense_problem((6, 5, 4, 3), activation)
        found = curvature.hessian_diagonal(network, params, examples, "lecun1990", batch_size=11)
        assert error(found, recursion_of_1990(params, *examples, *plain)) < 1e-12
        last, truth = found["dense3"], true_diagonal(network, params, examples)["dense3"]
        assert error(last, truth) < 1e-10
        assert error(found, true_diagonal(network, params, examples)) > 1e-3


# Hutchinson


def test_hutchinson_is_unbiased_within_its_own_standard_error(x64):
    network, params, examples = dense_problem((6, 5, 4, 3), jnp.tanh)
    truth = ravel_pytree(true_diagonal(network, params, examples))[0]
    scores = []
    for seed in range(10):
        estimate = curvature.hutchinson_estimate(
            network, params, examples, probes=400, key=jax.random.key(seed)
        )
        mean, standard_error = (ravel_pytree(tree)[0] for tree in estimate)
        scores.append((mean - truth) / standard_error)
    scores = jnp.concatenate(scores)  # 740 nearly standard normal numbers
    assert abs(float(scores.mean())) < 0.25
    assert 0.85 < float(scores.std()) < 1.15
    assert float(jnp.abs(scores).max()) < 6


def test_hutchinsons_error_falls_with_the_root_of_the_probes(x64):
    network, params, examples = dense_problem((6, 5, 4, 3), jnp.tanh)
    few, many = (
        curvature.hutchinson_estimate(network, params, examples, probes=probes)
        for probes in (100, 1600)
    )
    ratio = ravel_pytree(few.standard_error)[0].mean() / ravel_pytree(many.standard_error)[0].mean()
    assert 3 < float(ratio) < 5


def test_hutchinson_as_a_method_gives_the_mean_and_repeats_itself(x64):
    network, params, examples = dense_problem((5, 4, 3), jnp.tanh)
    key = jax.random.key(3)
    one, two = (
        curvature.hessian_diagonal(network, params, examples, "hutchinson", probes=8, key=key)
        for _ in range(2)
    )
    estimate = curvature.hutchinson_estimate(network, params, examples, probes=8, key=key)
    assert error(one, two) == 0
    assert error(one, estimate.mean) == 0
    with pytest.raises(ValueError, match="probes"):
        curvature.hutchinson_estimate(network, params, examples, probes=1)


# Drawn classes


@pytest.mark.parametrize("kind", ["dense", "convolution", "no layers"])
def test_drawn_classes_are_right_on_average(x64, kind):
    """Within their standard error of Gauss-Newton, which the draws' spread gives."""
    convolution = kind == "convolution"
    network, params, examples = (
        conv_problem() if convolution else dense_problem((16, 5, 3), jax.nn.relu, n=6)
    )
    if kind == "no layers":
        network = type("Bare", (), {"apply": staticmethod(network.apply)})()
    expected = ravel_pytree(curvature.hessian_diagonal(network, params, examples))[0]
    sample = jnp.stack(
        [
            ravel_pytree(
                curvature.hessian_diagonal(
                    network, params, examples, "sampled", draws=50, key=jax.random.key(seed)
                )
            )[0]
            for seed in range(40)
        ]
    )
    spread = sample.std(0) / jnp.sqrt(39)
    deviations = (sample.mean(0) - expected) / jnp.where(spread > 1e-12, spread, 1)
    assert float(jnp.abs(deviations).max()) < 4.5
    one = curvature.hessian_diagonal(network, params, examples, "sampled")
    fifty = jnp.linalg.norm(sample - expected[None], axis=1).mean()
    assert float(jnp.linalg.norm(ravel_pytree(one)[0] - expected)) > 2 * float(fifty)


def test_draws_depend_on_the_key_and_not_on_the_batches(x64):
    network, params, examples = dense_problem((6, 5, 4, 3), jax.nn.relu)
    one, two = (
        curvature.hessian_diagonal(
            network, params, examples, "sampled", batch_size=size, key=jax.random.key(7)
        )
        for size in (1, 100)
    )
    assert error(one, two) < 1e-12
    other = curvature.hessian_diagonal(network, params, examples, "sampled", key=jax.random.key(8))
    assert error(one, other) > 1e-3


def test_draws_know_the_cross_entropy_only(x64):
    network, params, examples = dense_problem((6, 5, 4, 3), jax.nn.relu)
    with pytest.raises(ValueError, match='loss: method "sampled" draws classes from the softmax'):
        curvature.hessian_diagonal(
            network, params, examples, "sampled", loss=lambda z, y: (z**2).sum(1)
        )


def test_many_classes_are_not_in_memory_together():
    """What is computed for one batch of n examples and c classes has no array of n·c·c."""
    network = models.mlp((5, 4, 200))
    params = network.init(jax.random.key(0))
    examples = Examples(jnp.ones((100, 5)), jnp.arange(100))
    for method in ("gauss_newton", "lecun1990"):
        program = jax.jit(lambda p, e, m=method: curvature.hessian_diagonal(network, p, e, m))
        compiled = program.lower(params, examples).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 100 * 200 * 200


# What it refuses, warns of, and does not do twice


def test_refusals():
    network = models.mlp((5, 4, 3))
    params = network.init(jax.random.key(0))
    examples = Examples(jnp.ones((4, 5)), jnp.array([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="'diagonal' is unknown; choose one of"):
        curvature.hessian_diagonal(network, params, examples, "diagonal")
    broken = jax.tree.map(lambda w: w.at[0].set(jnp.nan), params)
    with pytest.raises(FloatingPointError, match="params"):
        curvature.hessian_diagonal(network, broken, examples)


def test_one_hot_warns_of_hours(monkeypatch):
    monkeypatch.setattr(curvature, "_one_hot", lambda *arguments: arguments[4])
    network = models.mlp()
    params = network.init(jax.random.key(0))
    examples = Examples(np.zeros((60_000, 784), np.uint8), np.zeros(60_000, np.int32))
    with pytest.warns(UserWarning, match="47,410 Hessian-vector products"):
        curvature.one_hot(network, params, examples, passes.cross_entropy)


def test_nothing_recompiles_when_the_parameters_change():
    network = models.mlp((5, 4, 3))
    examples = Examples(jnp.ones((4, 5)), jnp.array([0, 1, 2, 0]))
    before = None
    for seed in range(3):
        params = network.init(jax.random.key(seed))
        for method in ("gauss_newton", "neuron"):
            curvature.hessian_diagonal(models.mlp((5, 4, 3)), params, examples, method)
        compiled = curvature._gauss_newton_layers._cache_size(), curvature._neuron._cache_size()
        assert before in (None, compiled)
        before = compiled


def test_hvp_is_a_column_of_the_hessian(x64):
    def function(w):
        return jnp.sum(jnp.sin(w) * w[::-1] ** 2)

    w = jnp.arange(4.0)
    hessian = jax.hessian(function)(w)
    for k in range(4):
        assert jnp.allclose(curvature.hvp(function, w, jnp.eye(4)[k]), hessian[:, k])
    with pytest.raises(FloatingPointError, match="the Hessian-vector product"):
        curvature.hvp(lambda w: jnp.sqrt(w).sum(), w, w)
