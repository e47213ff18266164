"""Networks as chains of layers: the 2016 MLP, LeNet-300-100 and LeNet-5, in Flax NNX.

A `Network` holds no weights. `init` makes them, `apply` uses them; between the two they are a
plain pytree, ``{"dense1": {"kernel": ..., "bias": ...}, ...}``, that anything may map over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prunelib import checks
from prunelib.data import scaled

Params = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class Layer:
    """One link of a chain: an NNX module with parameters, or a plain function.

    Attributes
    ----------
    name : str or None
        The layer's key in the params pytree; None for a function, which has no parameters.
    function : callable
        A function of a batch, ``[n, ...] -> [n, ...]``, or for a named layer the builder of its
        module, ``function(rngs=...) -> nnx.Module``.
    graph : nnx.GraphDef or None
        The module without its parameters.
    kind : type or None
        The module's class.
    shapes : dict or None
        The shape and dtype of each of its parameters.
    """

    name: str | None
    function: Callable
    graph: nnx.GraphDef | None = None
    kind: type | None = None
    shapes: dict | None = None

    def __call__(self, params: Params, x: jax.Array) -> jax.Array:
        return self.module(params)(x) if self.name else self.function(x)

    def module(self, params: Params) -> nnx.Module:
        """The layer's NNX module, holding its share of `params`."""
        return nnx.merge(self.graph, params[self.name])

    # Two layers are the same if they compute the same thing; a builder is only a recipe.
    def __eq__(self, other):
        return isinstance(other, Layer) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    @property
    def _key(self):
        return (self.name, self.graph) if self.name else (self.function,)


def dropout_here(x: jax.Array) -> jax.Array:
    """Mark the place of dropout in a chain. By itself it is the identity."""
    return x


class Network:
    """A chain of layers with pure `init` and `apply`.

    Parameters
    ----------
    layers : sequence
        Each entry is a function of a batch (an activation, a pooling, `dropout_here`), or a pair
        ``(name, builder)`` where ``builder(rngs=...)`` makes an NNX module such as `nnx.Linear`.
        Names must be in alphabetical order, so that the leaves of the params pytree stand in the
        order of the layers.

    Raises
    ------
    ValueError
        If names repeat or are not in alphabetical order.
    TypeError
        If a layer holds state besides its parameters (batch normalization, `nnx.Dropout`).

    Examples
    --------
    >>> from functools import partial
    >>> import jax
    >>> from flax import nnx
    >>> net = Network([("dense1", partial(nnx.Linear, 3, 4)), jax.nn.tanh,
    ...                ("dense2", partial(nnx.Linear, 4, 2))])
    >>> params = net.init(jax.random.key(0))
    >>> net.apply(params, jax.numpy.ones((5, 3))).shape
    (5, 2)
    """

    def __init__(self, layers: Sequence[Callable | tuple[str, Callable]]):
        self.layers = tuple(_layer(entry) for entry in layers)
        names = [layer.name for layer in self.layers if layer.name]
        if names != sorted(set(names)):
            raise ValueError(
                f"layers: names must be distinct and in alphabetical order, got {names}; "
                "rename them (dense01, dense02, ...)"
            )

    @property
    def shapes(self) -> Params:
        """The shape and dtype of each parameter: what `init` returns, without numbers."""
        return {layer.name: layer.shapes for layer in self.layers if layer.name}

    def __eq__(self, other):
        return isinstance(other, Network) and self.layers == other.layers

    def __hash__(self):
        return hash(self.layers)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters from a random key, as a nested dict of arrays."""
        rngs = nnx.Rngs(key)
        return {
            layer.name: nnx.to_pure_dict(nnx.state(layer.function(rngs=rngs), nnx.Param))
            for layer in self.layers
            if layer.name
        }

    def apply(
        self, params: Params, images: jax.Array, *, keep: float = 1.0, key: jax.Array | None = None
    ) -> jax.Array:
        """The logits ``[n, classes]`` of a batch of images ``[n, pixels]``.

        Dropout is off unless a random `key` is given: then each activation at `dropout_here` is
        kept with probability `keep`, and divided by `keep` (as in training).

        Raises
        ------
        ValueError
            If network, params and images do not fit together, or `keep` is not in (0, 1].
        TypeError
            If the params are no floating-point arrays, or the images neither that nor uint8.
        FloatingPointError
            If a parameter or an image is NaN or infinite (not seen inside `jit`).
        """
        checks.params(params)
        if not 0 < keep <= 1:
            raise ValueError(
                f"keep: expected a probability in (0, 1], got {keep!r}; 1 is no dropout"
            )
        names = [layer.name for layer in self.layers if layer.name]
        if not isinstance(params, dict) or sorted(params) != names:
            found = list(params) if isinstance(params, dict) else type(params).__name__
            raise ValueError(
                f"params: the network's layers are {names}, got {found}; "
                "pass what this network's init returned"
            )
        x = scaled(images)
        if x.ndim < 2:
            raise ValueError(f"images: expected a batch [n, ...], got shape {x.shape}; use x[None]")
        for number, layer in enumerate(self.layers):
            try:
                x = layer(params, x)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"images, params: layer {number}, {layer.name or layer.function}, cannot take "
                    f"an input of shape {x.shape} with its params ({error}); "
                    "pass images and params of the shapes that the network was made for"
                ) from error
            if key is not None and layer.function is dropout_here:
                rngs = nnx.Rngs(dropout=jax.random.fold_in(key, number))
                x = nnx.Dropout(1 - keep, deterministic=False, rngs=rngs)(x)
        return x


def _layer(entry) -> Layer:
    if callable(entry):
        return Layer(None, entry)
    if not (isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1])):
        raise TypeError(
            f"layers: expected a function of a batch, or (name, builder), got {entry!r}; "
            "for instance ('dense1', partial(nnx.Linear, 784, 50))"
        )
    name, builder = entry
    module = nnx.eval_shape(lambda: builder(rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    try:
        hash(graph)
        held = list(nnx.to_pure_dict(rest))
    except TypeError:
        held = [key for key, value in vars(module).items() if isinstance(value, jax.Array)]
    if held:
        raise TypeError(
            f"layers: {name!r}, {type(module).__name__}, holds {held} besides its parameters, and "
            "a layer here is a pure function of those; leave it out, or write a function instead"
        )
    return Layer(name, builder, graph, type(module), nnx.to_pure_dict(params))


def mlp(
    widths: Sequence[int] = (784, 50, 50, 50, 50, 10),
    activation: Callable = jax.nn.relu,
) -> Network:
    """A fully connected network; by default that of the 2016 study (47,410 variables).

    Weights start as He's normals, biases at zero (a recipe may ask for another start). Dropout,
    when training asks for it, follows each hidden layer.

    Raises
    ------
    ValueError
        If `widths` are not at least two positive integers.
    """
    widths = tuple(widths)
    if len(widths) < 2 or not all(isinstance(w, int | np.integer) and w > 0 for w in widths):
        raise ValueError(
            f"widths: expected at least two positive integers, got {widths}; "
            "the inputs come first, the classes last"
        )
    linear = partial(nnx.Linear, kernel_init=jax.nn.initializers.he_normal())
    digits = len(str(len(widths) - 1))  # dense01 where there are ten: names are in order
    layers = []
    for number, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
        name = f"dense{number:0{digits}}"
        layers += [(name, partial(linear, fan_in, fan_out)), activation, dropout_here]
    return Network(layers[:-2])


def lenet300() -> Network:
    """LeNet-300-100, as Han et al. (2015) prune it: 784-300-100-10, ReLU, 266,610 variables."""
    return mlp((784, 300, 100, 10))


def as_picture(x: jax.Array) -> jax.Array:
    """Reshape pixels ``[n, 784]`` to pictures ``[n, 28, 28, 1]``."""
    return x.reshape(len(x), 28, 28, 1)


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2x2 block, ``[n, h, w, c] -> [n, h/2, w/2, c]``."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def flatten(x: jax.Array) -> jax.Array:
    """Reshape ``[n, ...]`` to ``[n, m]``."""
    return x.reshape(len(x), -1)


def convolve(
    x,
    kernel,
    window_strides,
    padding,
    *,
    lhs_dilation=(1, 1),
    rhs_dilation=(1, 1),
    feature_group_count=1,
    dimension_numbers=None,
    precision=None,
    out_sharding=None,
) -> jax.Array:
    """A convolution as one matrix product: `jax.lax.conv_general_dilated` for the simplest case.

    On a CPU its gradient, inside a compiled loop, is some thirty times faster than that of XLA's
    own convolution.

    Parameters
    ----------
    x : array ``[n, h, w, in]``
    kernel : array ``[kh, kw, in, out]``
    window_strides, padding, lhs_dilation, rhs_dilation, feature_group_count
        Steps of 1, no padding, no dilation, one group, or ValueError is raised.
    dimension_numbers, out_sharding
        Given by nnx.Conv, and always those of the shapes above.
    precision
        As in `jax.lax.dot_general`.

    Returns
    -------
    array ``[n, h - kh + 1, w - kw + 1, out]``
    """
    ones = {*window_strides, *lhs_dilation, *rhs_dilation, feature_group_count}
    if ones != {1} or padding != "VALID":
        raise ValueError(
            "window_strides, padding, lhs_dilation, rhs_dilation, feature_group_count: only steps "
            f"of 1, no padding, no dilation and one group, got {window_strides}, {padding!r}, "
            f"{lhs_dilation}, {rhs_dilation}, {feature_group_count}; "
            "leave nnx.Conv its own conv_general_dilated"
        )
    kh, kw, _, out = kernel.shape
    height, width = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    patches = [x[:, i : i + height, j : j + width] for i in range(kh) for j in range(kw)]
    return jnp.matmul(
        jnp.concatenate(patches, axis=-1), kernel.reshape(-1, out), precision=precision
    )


def lenet5() -> Network:
    """LeNet-5 in the form that Han et al. (2015) prune: the Caffe one, 431,080 variables.

    Two 5x5 convolutions (20 and 50 filters, no padding), each followed by 2x2 max-pooling, then
    dense layers of 500 and 10 units; one ReLU, after the first dense layer.
    """
    he = jax.nn.initializers.he_normal()
    options = dict(kernel_init=he, conv_general_dilated=convolve)
    conv = partial(nnx.Conv, kernel_size=(5, 5), padding="VALID", **options)
    return Network(
        [
            as_picture,
            ("conv1", partial(conv, 1, 20)),
            max_pool,
            ("conv2", partial(conv, 20, 50)),
            max_pool,
            flatten,
            ("dense1", partial(nnx.Linear, 800, 500, kernel_init=he)),
            jax.nn.relu,
            dropout_here,
            ("dense2", partial(nnx.Linear, 500, 10, kernel_init=he)),
        ]
    )


def _flat_order(network: Network) -> list[tuple[str, str]]:
    shapes = network.shapes
    others = {kind for layer in shapes.values() for kind in layer} - {"kernel", "bias"}
    if others:
        raise ValueError(
            f"network: the order of the 2016 checkpoints knows kernels and biases only, found "
            f"{sorted(others)}; use jax.flatten_util.ravel_pytree"
        )
    return [(name, kind) for kind in ("kernel", "bias") for name in shapes if kind in shapes[name]]


def params_from_flat(flat: np.ndarray, network: Network | None = None) -> Params:
    """A params pytree from one flat vector in the order of the 2016 checkpoints.

    Parameters
    ----------
    flat : array ``[p]``
        All weights, layer by layer (``W_1, W_2, W_3, W_4, W_final``), then all biases in the same
        order; each matrix row by row, ``[inputs, outputs]``.
    network : Network, optional
        The network the vector belongs to; by default that of the 2016 study.

    Raises
    ------
    ValueError
        If `flat` is not a vector of the network's size, or a layer has more than a kernel and a
        bias.
    TypeError, FloatingPointError
        If its numbers are not floating-point, or not finite.
    """
    network = mlp() if network is None else network
    shapes, order = network.shapes, _flat_order(network)
    sizes = [shapes[name][kind].size for name, kind in order]
    checks.params(flat, "flat")
    flat = jnp.asarray(flat)
    if flat.shape != (sum(sizes),):
        raise ValueError(
            f"flat: expected a vector of {sum(sizes)} numbers, got shape {flat.shape}; "
            "concatenate all weights, then all biases"
        )
    parts = jnp.split(flat, np.cumsum(sizes)[:-1])
    params = {name: {} for name, _ in order}
    for (name, kind), part in zip(order, parts, strict=True):
        params[name][kind] = part.reshape(shapes[name][kind].shape)
    return params


def flat_from_params(params: Params, network: Network | None = None) -> jax.Array:
    """The inverse of `params_from_flat`: one vector, all weights and then all biases."""
    network = mlp() if network is None else network
    checks.params(params)
    checks.same_tree("params", params, "the network's params", network.shapes)
    order = _flat_order(network)
    return jnp.concatenate([params[name][kind].ravel() for name, kind in order])
