"""One pass over the data: a compiled scan over batches, every example counted exactly once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from prunelib import checks
from prunelib.data import Examples


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each example, ``[n, classes], [n] -> [n]``, in nats, from logits.

    Never ``log(softmax(z))``: where a probability underflows to 0, that is minus infinity, and
    times a label of 0 it is NaN.

    Raises
    ------
    ValueError
        If the shapes do not match, or (outside `jit`) a label is not a class.
    FloatingPointError
        If a logit is NaN or infinite (not seen inside `jit`).
    """
    if np.ndim(logits) != 2 or np.shape(labels) != np.shape(logits)[:1]:
        raise ValueError(
            f"logits, labels: expected shapes [n, classes] and [n], got {np.shape(logits)} and "
            f"{np.shape(labels)}; give one integer label for each row of logits"
        )
    checks.labels(labels, logits.shape[1])
    checks.finite("logits", logits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def mean_over_batches(
    function: Callable[[jax.Array, jax.Array, jax.Array], Any], examples: Examples, batch_size: int
) -> Any:
    """The sum over batches of ``function(images, labels, weights)``, as one `lax.scan`.

    The weights are 1/n for each of the n examples, and 0 for the copies of the last example that
    fill the last batch (no blank ones, for which some networks give NaN); so a function that sums
    ``weights * (something per example)`` gets the exact mean over the data, whatever the batch
    size. What rounding adds to the sum of one batch is taken off the next (Kahan's compensated
    summation), so thousands of small batches are as exact as one. To be called inside `jit`.

    Examples that are spread over the devices of a mesh (`data.place`, or `jax.device_put` with a
    `NamedSharding` of the first axis) stay where they are: each batch takes as many from each
    device, so that all devices work on every batch, and only sums travel between them.

    Raises
    ------
    TypeError, ValueError
        If the examples are not what `Examples` says, or `batch_size` is less than 1.
    """
    checks.examples(examples)
    checks.whole("batch_size", batch_size)
    n, mesh = len(examples.labels), jax.typeof(examples.images).sharding.mesh
    devices = 1 if mesh.empty or n % mesh.size else mesh.size
    share = n // devices
    batches = min(share, -(-n // batch_size))
    size = -(-share // batches)  # equal batches: the least padding

    def cut(x, mode="edge"):
        """``[n, ...]`` -> ``[batches, devices * size, ...]``, and no device gives anything away."""
        x = x.reshape(devices, share, *x.shape[1:])
        x = jnp.pad(x, [(0, 0), (0, batches * size - share)] + [(0, 0)] * (x.ndim - 2), mode)
        x = x.reshape(devices, batches, size, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(batches, devices * size, *x.shape[3:])

    dtype = jnp.float32  # at least: in half precision the weights of 70,000 examples vanish
    if jnp.issubdtype(examples.images.dtype, jnp.floating):
        dtype = jnp.promote_types(examples.images.dtype, dtype)
    real = getattr(examples, "real", None)
    weights = jnp.full(n, 1 / n, dtype)
    if real is not None:
        weights = real / real.sum(dtype=weights.dtype)
    batched = (cut(examples.images), cut(examples.labels), cut(weights, "constant"))

    def step(sums, batch):
        total, excess = sums
        value = jax.tree.map(jnp.subtract, function(*batch), excess)
        more = jax.tree.map(jnp.add, total, value)
        return (more, jax.tree.map(lambda m, t, v: (m - t) - v, more, total, value)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], batched))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (total, _), _ = jax.lax.scan(step, (zeros, zeros), batched)
    if devices == 1:
        return total
    return jax.lax.with_sharding_constraint(total, NamedSharding(mesh, PartitionSpec()))


def count(examples: Examples) -> int:
    """How many examples there are, without the padding of `data.place`."""
    checks.examples(examples)
    real = getattr(examples, "real", None)
    return len(examples.labels) if real is None else int(jnp.sum(real))
