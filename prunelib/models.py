"""Networks as chains of layers: the 2016 MLP, LeNet-300-100 and LeNet-5, in Flax NNX.

A `Network` holds no weights. `init` makes them, `apply` uses them; between the two they are a
plain pytree, ``{"dense1": {"kernel": ..., "bias": ...}, ...}``, that anything may map over.
"""

import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prunelib import checks
from prunelib.checks import require
from prunelib.data import scaled

Params = dict[str, dict[str, jax.Array]]


class Layer(NamedTuple):
    """One link of a chain: an NNX module with parameters, or a plain function of a batch.

    `name` is its key in the params, None for a function. `function` is the function, or builds the
    module, ``function(rngs=...)``; `graph` is the module without its parameters, `shapes` what they
    are, and `kind` `nnx.Linear` or `nnx.Conv` if it is one with nothing special about it.
    """

    name: str | None
    function: Callable
    graph: Any = None
    shapes: dict | None = None
    kind: type | None = None

    def __call__(self, params: Params, x: jax.Array) -> jax.Array:
        return self.module(params)(x) if self.name else self.function(x)

    def module(self, params: Params) -> nnx.Module:
        """The layer's NNX module, holding its share of `params`."""
        return nnx.merge(self.graph, params[self.name])

    @property
    def fixed(self) -> Hashable | None:
        """What the layer computes, if that cannot change: a plain module, a library's function."""
        if self.name:
            return (self.name, self.graph) if self.kind else None
        home, name = (getattr(self.function, x, None) or "" for x in ("__module__", "__name__"))
        theirs = home.split(".")[0] in ("jax", "prunelib")
        known = theirs and getattr(sys.modules.get(home), name, None) is self.function
        return self.function if known else None


def dropout_here(x: jax.Array) -> jax.Array:
    """Mark the place of dropout in a chain. By itself it is the identity."""
    return x


class Network:
    """A chain of layers with pure `init` and `apply`.

    Each of `layers` is a function of a batch (an activation, a pooling, `dropout_here`), or a pair
    ``(name, builder)`` where ``builder(rngs=...)`` makes an NNX module such as `nnx.Linear`. Names
    are in alphabetical order, so that the leaves of the params stand in the order of the layers.
    Raises ValueError if names are not, TypeError if a layer holds state besides its parameters
    (batch normalization, `nnx.Dropout`).
    """

    def __init__(self, layers: Sequence[Callable | tuple[str, Callable]]):
        self.layers = tuple(_layer(entry) for entry in layers)
        names = [layer.name for layer in self.layers if layer.name]
        require(names == sorted(set(names)), "layers: names must be distinct and in alphabetical "
                f"order, got {names}; rename them (dense01, dense02, ...)")  # fmt: skip

    @property
    def shapes(self) -> Params:
        """The shape and dtype of each parameter: what `init` returns, without numbers."""
        return {layer.name: layer.shapes for layer in self.layers if layer.name}

    @property
    def is_chain(self) -> bool:
        """Whether `apply` is what the layers say: not a subclass's, nor a changed object's."""
        return type(self).apply is Network.apply and "apply" not in vars(self)

    @property
    def fixed(self) -> Hashable | None:
        """What tells the network from others, if what it computes cannot change."""
        layers = tuple(layer.fixed for layer in self.layers)
        return layers if self.is_chain and None not in layers else None

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters from a random key, as a nested dict of arrays."""
        rngs = nnx.Rngs(key)
        modules = {layer.name: layer.function(rngs=rngs) for layer in self.layers if layer.name}
        return {n: nnx.to_pure_dict(nnx.state(module, nnx.Param)) for n, module in modules.items()}

    def apply(
        self, params: Params, images: jax.Array, *, keep: float = 1.0, key: jax.Array | None = None
    ) -> jax.Array:
        """The logits ``[n, classes]`` of a batch of images ``[n, pixels]``.

        Grey values (uint8) are scaled to [0, 1]. Dropout is off unless a random `key` is given:
        then each activation at `dropout_here` is kept with probability `keep`, and divided by
        `keep`. Raises ValueError if the params are another network's.
        """
        require(0 < keep <= 1, f"keep: expected a probability in (0, 1], got {keep!r}")
        found = sorted(params) if hasattr(params, "keys") else type(params).__name__
        require(found == list(self.shapes), f"params: expected those of {list(self.shapes)}, got "
                f"{found}; pass what this network's init returned")  # fmt: skip
        x = scaled(images)
        for number, layer in enumerate(self.layers):
            x = layer(params, x)
            if key is not None and layer.function is dropout_here:
                rngs = nnx.Rngs(dropout=jax.random.fold_in(key, number))
                x = nnx.Dropout(1 - keep, deterministic=False, rngs=rngs)(x)
        return x

def _layer(entry) -> Layer:
    if callable(entry):
        return Layer(None, entry)
    name, builder = entry
    module = nnx.eval_shape(lambda: builder(rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    require(not jax.tree.leaves(rest), f"layers: {name!r} holds state besides its parameters, and "
            "a layer is a pure function of those; write a function instead", TypeError)  # fmt: skip
    kind = type(module) if _is_plain(module) else None
    return Layer(name, builder, graph, nnx.to_pure_dict(params), kind)

def _is_plain(module) -> bool:
    """Whether a layer computes what its class is known for, in the precision of its inputs."""
    if type(module) not in (nnx.Linear, nnx.Conv):
        return False
    usual = module.promote_dtype is nnx.nn.dtypes.promote_dtype
    if not usual or module.dtype not in (None, jnp.float32, jnp.float64):
        return False
    if type(module) is nnx.Linear:
        return module.dot_general is jax.lax.dot_general
    return (
        len(module.kernel_size) == 2
        and module.conv_general_dilated in (jax.lax.conv_general_dilated, convolve)
        and all(d in (1, None, (1, 1)) for d in (module.kernel_dilation, module.input_dilation))
        and module.feature_group_count == 1
        and module.padding in ("SAME", "VALID")
    )


def mlp(
    widths: Sequence[int] = (784, 50, 50, 50, 50, 10), activation: Callable = jax.nn.relu
) -> Network:
    """A fully connected network; by default that of the 2016 study (47,410 variables).

    He initialisation, biases at zero. Dropout, if training asks for it, follows each hidden layer.
    """
    widths = tuple(widths)
    require(len(widths) > 1, f"widths: expected inputs, ..., classes, got {widths}")
    for width in widths:
        checks.whole("widths", width)
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


def little() -> Network:
    """49-10-10, ReLU, for `data.coarse`: 610 variables."""
    return mlp((49, 10, 10))


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


def convolve(x, kernel, window_strides, padding, *, precision=None, **options) -> jax.Array:
    """A convolution as one matrix product, ``[n, h, w, in] -> [n, h - kh + 1, w - kw + 1, out]``.

    `jax.lax.conv_general_dilated` for steps of 1, no padding, no dilation and one group, else
    ValueError. On a CPU its gradient, in a compiled loop, is some thirty times faster than XLA's.
    """
    steps = (*window_strides, *options.get("lhs_dilation", ()), *options.get("rhs_dilation", ()))
    simple = {*steps, options.get("feature_group_count", 1)} == {1} and padding == "VALID"
    require(simple, f"convolve: not for {window_strides}, {padding!r}, {options}; use lax's own")
    kh, kw, _, out = kernel.shape
    height, width = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    patches = [x[:, i : i + height, j : j + width] for i in range(kh) for j in range(kw)]
    patches = jnp.concatenate(patches, axis=-1)
    return jnp.matmul(patches, kernel.reshape(-1, out), precision=precision)


def lenet5() -> Network:
    """LeNet-5 as Han et al. (2015) prune it: the Caffe one, with one ReLU; 431,080 variables."""
    he = {"kernel_init": jax.nn.initializers.he_normal()}
    conv = partial(nnx.Conv, kernel_size=(5, 5), padding="VALID", conv_general_dilated=convolve)
    dense1, dense2 = partial(nnx.Linear, 800, 500, **he), partial(nnx.Linear, 500, 10, **he)
    conv1, conv2 = partial(conv, 1, 20, **he), partial(conv, 20, 50, **he)
    return Network(
        [as_picture, ("conv1", conv1), max_pool, ("conv2", conv2), max_pool, flatten,
         ("dense1", dense1), jax.nn.relu, dropout_here, ("dense2", dense2)]
    )  # fmt: skip


def params_from_flat(flat: np.ndarray, network: Network | None = None) -> Params:
    """A params pytree from one vector ``[p]`` in the order of the 2016 checkpoints.

    All weights, layer by layer (``W_1, W_2, W_3, W_4, W_final``), then all biases in the same
    order; each matrix row by row, ``[inputs, outputs]``. By default of the study's network.
    """
    shapes = (mlp() if network is None else network).shapes
    order = _flat_order(shapes)
    sizes = [shapes[name][kind].size for name, kind in order]
    checks.params(flat, "flat")
    right = np.shape(flat) == (sum(sizes),)
    require(right, f"flat: expected {sum(sizes)} numbers, got shape {np.shape(flat)}")
    parts = jnp.split(jnp.asarray(flat), np.cumsum(sizes)[:-1])
    params = {name: {} for name in shapes}
    for (name, kind), part in zip(order, parts, strict=True):
        params[name][kind] = part.reshape(shapes[name][kind].shape)
    return params


def flat_from_params(params: Params) -> jax.Array:
    """The inverse of `params_from_flat`: one vector, all weights and then all biases."""
    checks.params(params)
    return jnp.concatenate([params[name][kind].ravel() for name, kind in _flat_order(params)])

def _flat_order(layers: Params) -> list[tuple[str, str]]:
    return [(name, kind) for kind in ("kernel", "bias") for name in layers if kind in layers[name]]
