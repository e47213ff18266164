"""One pass over the data, and what it is given: networks and losses, known by what they compute."""

import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import dtypes, random
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import PartitionSpec

from prunelib import checks
from prunelib.checks import require
from prunelib.data import Examples, scaled


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each example, ``[n, classes], [n] -> [n]``, in nats, from logits.

    Never ``log(softmax(z))``: where a probability underflows to 0, that is minus infinity, and
    times a label of 0 it is NaN. Raises ValueError if shapes do not match, or (outside `jit`) a
    label is no class; FloatingPointError if a logit is not finite.
    """
    good = np.ndim(logits) == 2 and np.shape(labels) == np.shape(logits)[:1]
    require(good, f"logits, labels: expected shapes [n, classes] and [n], got {np.shape(logits)} "
            f"and {np.shape(labels)}; give one integer label for each row of logits")  # fmt: skip
    checks.labels(labels, logits.shape[1])
    checks.finite("logits", logits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


class Function:
    """A function that is told from others by what it computes now, not by which object it is.

    `jit` keeps one compiled program for each static argument. A reader's function stays the same
    object when a global or an attribute that it reads changes, and `jit` would run the old program.
    This stands for it, and is another one when it computes something else. `program` is the
    function as JAX traces it, for two examples; `origin` what the reader passed.
    """

    def __init__(self, function: Callable, program: ClosedJaxpr, key: Hashable, origin: Any):
        self.function, self.program, self.origin, self._key = function, program, origin, key

    def __call__(self, *inputs):
        return self.function(*inputs)

    def __eq__(self, other):
        return isinstance(other, Function) and self._key == other._key

    def __hash__(self):
        return hash(self._key)


def forward(network: Any, params: Any, examples: Examples) -> Function:
    """A network's ``(params, images) -> logits`` for images as they are kept; checks all three.

    `network` is any object with such an `apply`, or the function itself. Grey values are scaled,
    and logits are at least float32 (their losses need it). Raises ValueError, TypeError or
    FloatingPointError for params, images or labels that make no sense, alone or together.
    """
    apply = checks.network(network)
    checks.params(params)
    checks.examples(examples)
    pixel = jax.dtypes.canonicalize_dtype(examples.images.dtype)
    two = jax.ShapeDtypeStruct((2, *examples.images.shape[1:]), pixel)
    types = jax.tree.map(lambda w: jax.dtypes.canonicalize_dtype(w.dtype), params)
    avals = jax.tree.map(lambda w, dtype: jax.ShapeDtypeStruct(w.shape, dtype), params, types)

    def from_pixels(params, images):
        params = jax.tree.map(lambda w, dtype: w.astype(dtype), params, types)
        logits = apply(params, scaled(images))
        if not jnp.issubdtype(getattr(logits, "dtype", bool), jnp.floating):
            return logits  # refused below
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    fixed = getattr(network, "fixed", None)  # a models.Network of nothing that could change
    leaves, structure = jax.tree.flatten((avals, two))
    known = fixed and (fixed, structure, *((x.shape, str(x.dtype)) for x in leaves))
    try:
        traced = _TRACED.get(known) or jax.make_jaxpr(from_pixels, return_shape=True)(avals, two)
    except Exception as error:
        raise ValueError(
            f"network, params, examples: the network cannot take images of shape {two.shape[1:]} "
            f"with these params ({error}); use params and images that it was made for"
        ) from error
    program, shape = traced
    checks.logits(shape, examples)
    if known:
        _TRACED[known] = traced
    return Function(from_pixels, program, known or _content(from_pixels, avals, two), network)


_TRACED: dict[Hashable, tuple] = {}  # of fixed networks


def known_loss(loss: Callable, forward: Function) -> Callable:
    """A loss as jit should know it; raises ValueError if it gives no loss for each example."""
    if loss is cross_entropy:
        return loss
    (logits,) = forward.program.out_avals
    two = jax.ShapeDtypeStruct(logits.shape, logits.dtype), jax.ShapeDtypeStruct((2,), jnp.int32)
    program, shape = jax.make_jaxpr(loss, return_shape=True)(*two)
    good = getattr(shape, "shape", None) == (2,)
    require(good, f"loss: expected two losses for logits {logits.shape} and labels (2,), got "
            f"{shape}; leave the mean to this package")  # fmt: skip
    return Function(loss, program, _content(loss, *two), loss)

def _content(function: Callable, first: Any, second: Any) -> Hashable:
    """What a function and its derivative compute: their program's text, and its constants."""
    try:  # with the derivative along the first argument, which custom rules may change
        along = jax.make_jaxpr(lambda x, y: jax.jvp(lambda x: function(x, y), (x,), (x,)))
        program = along(first, second)
    except ValueError:  # it has none (a callback): then nothing asks for it
        program = jax.make_jaxpr(function)(first, second)
    values = list(program.consts)
    for equation in equations(program):
        values += [np.asarray(x.val) for x in equation.invars if isinstance(x, Literal)]
        for value in jax.tree.leaves(equation.params):
            array = hasattr(value, "__array__") and not isinstance(value, type)
            values += value.consts if isinstance(value, ClosedJaxpr) else [value] * array
    if checks.is_traced(values):
        return object()  # not known yet: like nothing else
    keys = [dtypes.issubdtype(v.dtype, dtypes.prng_key) for v in values]
    plain = [random.key_data(v) if key else v for v, key in zip(values, keys, strict=True)]
    constants = tuple((str(v.dtype), v.shape, np.asarray(v).tobytes()) for v in plain)
    return re.sub(" at 0x[0-9a-f]+", "", str(program)), constants


def equations(program: ClosedJaxpr | Jaxpr) -> Iterator[Any]:
    """All equations of a program and of those that it calls."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for value in jax.tree.leaves(equation.params):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from equations(value)


def batch_of(chosen: int | None, forward: Function, parts: int, each: int = 0) -> int:
    """The reader's `batch_size`, if one was `chosen`; else so many examples that `parts` forward
    passes of each, and `each` floats more, are 64 MB in float32.
    """
    if chosen is not None:
        return chosen  # even 0, which is refused below
    sizes = (np.prod(out.aval.shape) for e in equations(forward.program) for out in e.outvars)
    floats = parts * sum(sizes) / 2 + each  # the program is that of two examples
    return int(np.clip(2**24 // max(1, floats), 1, 2500))


def mean_over_batches(
    function: Callable[[jax.Array, jax.Array, jax.Array], Any], examples: Examples, batch_size: int
) -> Any:
    """The sum over batches of ``function(images, labels, weights)``, as one `lax.scan`.

    The weights are 1/n for each of the n examples, and 0 for the copies of the last example that
    fill the last batch; so a function that sums ``weights * (something per example)`` gets the
    exact mean over the data, whatever the batch size. What rounding adds to one sum is taken off
    the next (Kahan), so thousands of small batches are as exact as one. To be called inside `jit`.
    Examples that are spread over a mesh (`data.place`) stay where they are: each device goes over
    its own, a share of `batch_size` at a time, and at the end the sums are added up.
    """
    checks.whole("batch_size", batch_size)
    (images, labels), mesh = examples[:2], jax.typeof(examples.images).sharding.mesh
    devices = 1 if mesh.empty or len(labels) % mesh.size else mesh.size
    dtype = jnp.float32  # at least: in half precision the weights of 70,000 examples vanish
    if jnp.issubdtype(images.dtype, jnp.floating):
        dtype = jnp.promote_types(images.dtype, dtype)
    real = getattr(examples, "real", None)
    real = jnp.ones(len(labels), bool) if real is None else real
    weights = real.astype(dtype) / real.sum(dtype=dtype)

    def on_one_device(*arrays):
        n = len(arrays[0])
        batches = min(n, -(-n * devices // batch_size))
        size = -(-n // batches)  # equal batches: the least padding

        def cut(x, mode="edge"):
            x = jnp.pad(x, [(0, batches * size - n)] + [(0, 0)] * (x.ndim - 1), mode)
            return x.reshape(batches, size, *x.shape[1:])

        batched = *map(cut, arrays[:2]), cut(arrays[2], "constant")

        def step(sums, batch):
            total, excess = sums
            value = jax.tree.map(jnp.subtract, function(*batch), excess)
            more = jax.tree.map(jnp.add, total, value)
            return (more, jax.tree.map(lambda m, t, v: (m - t) - v, more, total, value)), None

        shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], batched))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(step, (zeros, zeros), batched)[0][0]

    if devices == 1:
        return on_one_device(images, labels, weights)
    axes, everywhere = mesh.axis_names, PartitionSpec()
    return jax.shard_map(  # unchecked: gradients within are each device's own, as is meant
        lambda *share: jax.lax.psum(on_one_device(*share), axes), mesh=mesh,
        in_specs=PartitionSpec(axes), out_specs=everywhere, check_vma=False,
    )(images, labels, weights)  # fmt: skip
