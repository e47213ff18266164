"""One pass over the data: a compiled scan over batches, every example counted exactly once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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

    The weights are 1/n for each of the n examples, and 0 for the padding that fills the last
    batch; so a function that sums ``weights * (something per example)`` gets the exact mean over
    the data, whatever the batch size. To be called inside `jit`.

    Raises
    ------
    TypeError, ValueError
        If the examples are not what `Examples` says, or `batch_size` is less than 1.
    """
    checks.examples(examples)
    checks.batch_size(batch_size)
    n = len(examples.labels)
    batches = -(-n // batch_size)
    size = -(-n // batches)  # equal batches: the least padding
    padding = batches * size - n

    def cut(x):
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(batches, size, *x.shape[1:])

    dtype = examples.images.dtype if jnp.issubdtype(examples.images.dtype, jnp.floating) else None
    weights = cut(jnp.full(n, 1 / n, dtype or jnp.float32))
    batched = (cut(examples.images), cut(examples.labels), weights)

    def step(total, batch):
        return jax.tree.map(jnp.add, total, function(*batch)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], batched))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, zeros, batched)[0]
