"""What the tests compare with: small problems, and their answers from `jax.hessian` as a whole."""

from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from prunelib import models, passes
from prunelib.data import Examples

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
}


def problem(network, seed=0, n=7, pixels=5, classes=3):
    """Params (no bias is zero) and random examples, in the precision of the session."""
    k1, k2, k3, k4 = jax.random.split(jax.random.key(seed), 4)
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(k4, w.shape), network.init(k1))
    images = jax.random.normal(k2, (n, pixels))
    return params, Examples(images, jax.random.randint(k3, (n,), 0, classes))


def dense(widths=(5, 4, 3), activation=jax.nn.relu, seed=0, n=7):
    network = models.mlp(widths, activation)
    return network, *problem(network, seed, n, widths[0], widths[-1])


def pictures(x):
    return x.reshape(len(x), 8, 8, 1)


def convolutional(activation=jax.nn.relu, pool=models.max_pool, inputs=18, **options):
    """Two convolutions and a dense layer, for pictures of 64 pixels and four classes."""
    first = partial(nnx.Conv, 1, 3, kernel_size=(3, 3), **{"padding": "VALID"} | options)
    second = partial(nnx.Conv, 3, 2, kernel_size=(2, 2), padding="SAME")
    layers = [pictures, ("conv1", first), activation, pool, ("conv2", second), models.flatten]
    return models.Network([*layers, ("dense1", partial(nnx.Linear, inputs, 4))])


def conv_problem(network, seed=0, n=5):
    return problem(network, seed, n, 64, 4)


class Opaque:
    """A network of which only `apply` is known."""

    def __init__(self, network):
        self.apply = lambda params, images: network.apply(params, images)


def squared(logits, labels):
    """A loss for which the whole Taylor series of a linear network has three terms."""
    return ((logits - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)) ** 2).sum(1)


def bent(logits, labels):
    """A loss that is not convex: its Hessian has eigenvalues of both signs."""
    return jnp.sin(2 * logits).sum(1) + passes.cross_entropy(logits, labels) * logits[:, 0]


def mean_loss(network, params, examples, loss=passes.cross_entropy):
    """The mean loss as a function of one flat vector; that vector; and the way back to params."""
    vector, unravel = ravel_pytree(params)
    apply = getattr(network, "apply", network)

    def function(vector):
        return loss(apply(unravel(vector), examples.images), examples.labels).mean()

    return function, vector, unravel


def hessian(network, params, examples, loss=passes.cross_entropy):
    function, vector, _ = mean_loss(network, params, examples, loss)
    return np.asarray(jax.jit(jax.hessian(function))(vector))


def true_diagonal(network, params, examples, loss=passes.cross_entropy):
    return np.diagonal(hessian(network, params, examples, loss))


def ggn_diagonal(network, params, examples):
    """The Gauss-Newton diagonal from whole Jacobians."""
    vector, unravel = ravel_pytree(params)
    jacobian = jax.jacrev(lambda v: network.apply(unravel(v), examples.images))(vector)
    p = jax.nn.softmax(network.apply(params, examples.images))
    inner = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
    return np.einsum("nck,ncd,ndk->k", jacobian, inner, jacobian) / len(p)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def error(found, expected):
    """The largest difference, as a share of the largest entry expected."""
    found, expected = flat(found), flat(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


LISTS = []  # one for each `compilations` that is going on


@contextmanager
def compilations():
    """A list that grows by one for each program that JAX compiles meanwhile."""
    LISTS.append([])
    yield LISTS[-1]
    LISTS.pop()


def _compiled(event, seconds, **options):
    if event.endswith("jaxpr_to_mlir_module_duration"):
        for made in LISTS:
            made.append(options.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(_compiled)
