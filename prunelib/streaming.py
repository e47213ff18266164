"""A pass over more examples than memory holds: chunk by chunk, and resumable."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from prunelib import checks, store
from prunelib.checks import require
from prunelib.data import Examples, collected, count


def chunks(examples: Examples, size: int = 10_000) -> Iterator[Examples]:
    """Cut examples (memory-mapped arrays, for instance) into chunks, the last one shorter."""
    checks.whole("size", size)
    checks.examples(examples)
    for start in range(0, len(examples.labels), size):
        yield Examples(*(None if x is None else x[start : start + size] for x in examples))


def mean(
    measure: Callable[[Examples], Any], chunks: Iterable[Examples], *,
    file: str | os.PathLike | None = None, every: int = 10, about: Any = None,
) -> Any:  # fmt: skip
    """The mean of ``measure(chunk)`` over all examples of all chunks; the sum is in float64.

    `measure` gives a pytree of real numbers, each a mean over the examples of a chunk. With a
    `file` (an ``.npz``) the partial sum is kept there after `every` chunks, and a pass that was
    interrupted goes on from it when it is called again with the stream from its start: what was
    summed is only read again, to see that it is the same. Where the file is damaged, or of another
    stream or measure (by the first chunk's value, and by `about`, a pytree of all arrays that the
    measure depends on), the pass starts over or ends, and says so. The file goes when the pass is
    done. Raises ValueError if there are no chunks, others than before, or values of another shape;
    FloatingPointError if the mean is not finite.
    """
    checks.whole("every", every)
    file = None if file is None else Path(file).expanduser()
    kept, total, seen, digest, number = _read(file), 0.0, 0, 0, 0
    about = _digest(jax.tree.leaves(about), 0)
    other = (f"chunks: the sum kept in {file} is of other chunks (or of more); pass the same "
             "stream from its start, or delete that file")  # fmt: skip
    for number, chunk in enumerate(chunks, 1):
        checks.examples(chunk)
        seen, digest = seen + count(chunk), _digest(collected(chunk)[:2], digest) if file else 0
        if kept is None or number == 1:
            value = jax.tree.map(_as_floats, measure(chunk))
            (flat, unravel), shapes = ravel_pytree(value), jax.tree.map(np.shape, value)
            if number == 1:
                first, alike = flat, shapes
            require(shapes == alike, "measure: expected values shaped alike for all chunks, got "
                    f"{shapes} after {alike}; return means over the examples")  # fmt: skip
            total = total + count(chunk) * np.asarray(flat, np.float64)
        same = kept and kept[1].get("about") == about and _alike(flat, kept[0]["first"])
        if kept and number == 1 and not same:
            store.warn(f"{file} is of another measure or other examples; the pass starts over")
            kept = None
        if kept and number == kept[1]["chunks"]:
            require((seen, digest) == (kept[1]["seen"], kept[1]["digest"]), other)
            total, kept = kept[0]["sum"], None
        elif kept is None and file and number % every == 0:
            record = {"chunks": number, "seen": seen, "digest": digest, "about": about}
            store.keep(file, {"sum": total, "first": first}, record)
    require(kept is None, other)  # the stream ended before the chunk up to which it is
    require(number, "chunks: there are none; make a new iterator, each serves only once")
    if file and file.exists():
        file.unlink()
    return checks.finite("the mean", unravel(jnp.asarray(total / seen, flat.dtype)))

def _as_floats(x):
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))

def _alike(one, two) -> bool:
    size = np.abs(one).max(initial=0)
    return one.shape == two.shape and np.allclose(one, two, rtol=1e-4, atol=1e-6 * size)

def _digest(arrays: Iterable[Any], digest: int) -> int:
    for array in arrays:
        digest = zlib.crc32(np.ascontiguousarray(array).tobytes(), digest)
    return digest

def _read(file: Path | None):
    """The kept arrays and their record; None if there are none, or (with a warning) none whole."""
    try:
        arrays, record = store.read(file) if file and file.exists() else (None, None)
        return arrays and ({k: arrays[k] for k in ("sum", "first")}, record)
    except Exception as error:  # whatever is wrong with it, it can be computed again
        store.warn(f"{file} is damaged ({type(error).__name__}); the pass starts over")
