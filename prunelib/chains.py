"""A chain of layers, one by one: what each is given, what it gives, and least squares between."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prunelib.data import scaled
from prunelib.passes import batch_of, mean_over_batches


def is_chain(network, kinds, params) -> bool:
    """Whether a network is a chain of plain layers of these kinds, and functions."""
    known = getattr(network, "is_chain", False) and isinstance(params, dict)
    return known and all(layer.kind in kinds for layer in network.layers if layer.name)


def shifted(network, params, images, shifts):
    """The logits with ``shifts[name]`` added to each layer's output; all inputs and outputs."""
    x, inputs, outputs = scaled(images), {}, {}
    for layer in network.layers:
        y = layer(params, x)
        if layer.name:
            inputs[layer.name], outputs[layer.name] = x, y
            y = y + shifts.get(layer.name, 0)
        x = y
    return x, (inputs, outputs)


def patches(layer, params, a):
    """What meets a layer's kernel, ``[n, places, inputs]``; a dense layer has one place."""
    if layer.kind is nnx.Linear:
        return a[:, None]
    module = layer.module(params)
    found = jax.lax.conv_general_dilated_patches(
        a, module.kernel_size, np.broadcast_to(module.strides or 1, 2), module.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    found = found.reshape(len(a), -1, a.shape[-1], np.prod(module.kernel_size))
    return found.swapaxes(2, 3).reshape(*found.shape[:2], -1)  # kernels list the place first


@partial(jax.jit, static_argnums=(0, 4))
def moments(logits, params, dense, examples, name):
    """Of a layer's inputs a under `params` and its dense outputs z: Cov(a), Cov(a, z), E a, E z.

    `logits` is the network as `passes.forward` gives it. A convolution has a row of inputs, and one
    of outputs, for each place. Without a bias to take up the means, they are taken as zero.
    """
    layer = next(layer for layer in logits.origin.layers if layer.name == name)

    def rows(images):
        a = patches(layer, params, shifted(logits.origin, params, images, {})[1][0][name])
        z = shifted(logits.origin, dense, images, {})[1][1][name]
        return a.reshape(-1, a.shape[-1]), z.reshape(-1, z.shape[-1])

    # Products are about a mean nearby: in float32 a small variance would vanish beside it.
    centre = float("bias" in dense[name])
    near = [centre * x.mean(0, keepdims=True) for x in rows(examples.images[:100])]

    def batch(images, labels, weights):
        a, z = (x - mean for x, mean in zip(rows(images), near, strict=True))
        w = jnp.repeat(weights, len(a) // len(images)) * (len(images) / len(a))
        of_a = (w[:, None] * a).T
        return of_a @ a, of_a @ z, w @ a, w @ z

    aa, az, a, z = mean_over_batches(batch, examples, batch_of(None, logits, 4))
    a, z = centre * a, centre * z
    return aa - jnp.outer(a, a), az - jnp.outer(a, z), a + near[0][0], z + near[1][0]


def damped(covariance, mean, damping):
    """With `damping` on the diagonal, or what covers rounding where all inputs are constants."""
    variance = jnp.diagonal(covariance)
    least = 10 * jnp.finfo(mean.dtype).eps * (variance + mean**2).sum() + 1e-12
    added = jnp.maximum(damping * variance.mean(), least)
    return covariance + jnp.diag(jnp.full_like(mean, added))


def regress(hessian, target, kept):
    """The x of zeros where `kept` is False with ``(H x)_R = target_R``."""
    both = kept[:, None] & kept[None, :]
    matrix = jnp.where(both, hessian, jnp.eye(len(kept), dtype=hessian.dtype))
    return jax.scipy.linalg.solve(matrix, jnp.where(kept, target, 0), assume_a="pos")


def room(kept) -> int:
    """What no unit (column) of `kept` has more True than: 32, 128, 512, ...: few programs."""
    return min(len(kept), max(32, 2 ** ((int(kept.sum(0).max()) - 1).bit_length() | 1)))


@partial(jax.jit, static_argnums=4)
def fit(layer, kept, moments, damping, size=None):
    """A layer's ridge regression of its dense outputs on the kept inputs, towards the old weights.

    `kept` is a mask of its kernel, of which no unit keeps more than `size` weights; or of its
    inputs, ``[inputs]``, which is one matrix for all.
    """
    covariance, cross, a, z = moments
    matrix = damped(covariance, a, damping)
    kernel = layer["kernel"].reshape(len(a), -1)
    target = cross + (matrix - covariance) @ kernel
    if kept.ndim == 1:
        kernel = jax.vmap(partial(regress, matrix, kept=kept), 1, 1)(target)
    else:
        def one(unit):
            target, kept = unit
            chosen = jnp.argsort(~kept)[:size]
            found = regress(matrix[chosen][:, chosen], target[chosen], kept[chosen])
            return jnp.zeros_like(target).at[chosen].set(found * kept[chosen])

        kernel = jax.lax.map(one, (target.T, kept.reshape(kernel.shape).T), batch_size=16).T
    new = {"kernel": kernel.reshape(layer["kernel"].shape), "bias": z - a @ kernel}
    return {name: new[name] for name in layer}
