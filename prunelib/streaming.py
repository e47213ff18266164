"""A pass over more examples than memory holds: chunk by chunk, and resumable.

All that `passes` computes is a mean over examples, so the mean of chunks, each weighted by its
number of examples, is the mean of all: the same functions, called once for each chunk.
"""

import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prunelib import checks, curvature, store
from prunelib.data import Examples, collected, count, filled, place


def chunks(examples: Examples, size: int = 10_000) -> Iterator[Examples]:
    """Cut examples (memory-mapped arrays, for instance) into chunks, the last one shorter."""
    checks.whole("size", size)
    checks.examples(examples)
    for start in range(0, len(examples.labels), size):
        yield Examples(*(None if x is None else x[start : start + size] for x in examples))


def hessian_diagonal(
    network,
    params: Any,
    chunks: Iterable[Examples],
    method: str | None = None,
    *,
    mesh: Mesh | None = None,
    file: str | os.PathLike | None = None,
    every: int = 10,
    **options,
) -> Any:
    """`curvature.hessian_diagonal` of a stream of examples, of any length.

    Parameters
    ----------
    chunks : iterable of Examples
        For instance from `chunks`. Each is one call of `curvature.hessian_diagonal`; chunks of
        one length are compiled once, and a shorter one is filled up.
    mesh : jax.sharding.Mesh, optional
        Place each chunk on these devices (see `data.place`).
    file, every
        Where, and how often, to keep the partial sum: see `mean`.
    **options
        As for `curvature.hessian_diagonal`: ``loss``, ``batch_size``, ``probes``, ...

    Returns
    -------
    pytree
        Shaped like `params`; in nats per squared weight. Errors are those of `mean` and of
        `curvature.hessian_diagonal`.
    """
    length = read = 0

    def counted():
        nonlocal read
        for chunk in chunks:
            yield chunk
            read += count(chunk)  # also of chunks that a resumed pass does not measure again

    def measure(chunk):
        nonlocal length
        length = max(length, len(chunk.labels))
        chunk = filled(chunk, length) if mesh is None else place(chunk, mesh)
        numbered = {"first": read} if method == "sampled" else {}
        return curvature.hessian_diagonal(network, params, chunk, method, **options, **numbered)

    return mean(measure, counted(), file=file, every=every)


def mean(
    measure: Callable[[Examples], Any],
    chunks: Iterable[Examples],
    *,
    file: str | os.PathLike | None = None,
    every: int = 10,
) -> Any:
    """The mean of ``measure(chunk)`` over all examples of all chunks; the sum is in float64.

    With a `file`, the partial sum is kept there, and a pass that was interrupted goes on from it
    when it is called again with the stream from its start. What was summed is read again, to see
    that it is the same, and not computed again. A kept sum is used only if it is whole, and what
    `measure` gives for the first chunk is what it gave; otherwise the pass starts over, with a
    warning.

    Parameters
    ----------
    measure : callable
        A pytree of arrays or real numbers, each a mean over the examples of a chunk; shaped alike
        for all chunks.
    chunks : iterable of Examples
    file : path of an ``.npz`` file, optional
        For one pass only; removed when the pass is done.
    every : int
        Keep the sum after so many chunks.

    Raises
    ------
    ValueError
        If there are no chunks, or they are not those of the kept sum, or `measure` gives another
        shape.
    FloatingPointError
        If the mean is NaN or infinite.
    """
    checks.whole("every", every)
    file = None if file is None else Path(file).expanduser()
    kept, record = _read(file)
    total, value, seen, number, digest = None, None, 0, 0, 0
    for number, chunk in enumerate(chunks, 1):
        checks.examples(chunk)
        seen += count(chunk)
        if file is not None:
            digest = _digest(chunk, digest)
        if kept is None or number == 1:
            value = measure(chunk)
            share = [count(chunk) * np.asarray(x, np.float64) for x in jax.tree.leaves(value)]
            if total is not None and [x.shape for x in share] != [x.shape for x in total]:
                raise ValueError(
                    f"measure: for chunk {number} it gives other shapes than before; return a "
                    "mean over the examples, shaped alike for all chunks"
                )
            total = share if total is None else [t + s for t, s in zip(total, share, strict=True)]
        if number == 1:
            first = share
            if kept is not None and not _alike(first, kept["first"]):
                _warn(file, "it is of another measure, or of other examples")
                kept = None
        if kept is not None and number == record["chunks"]:
            if (seen, digest) != (record["seen"], record["digest"]):
                raise _other_stream(file, record)
            total, kept = kept["sum"], None
        elif kept is None and file is not None and number % every == 0:
            _keep(file, total, first, {"chunks": number, "seen": seen, "digest": digest})
    if kept is not None:  # the stream ended before the chunk up to which it is
        raise _other_stream(file, record)
    if total is None:
        raise ValueError("chunks: there are none; make a new iterator, each serves only once")
    if file is not None:
        file.unlink(missing_ok=True)
    structure = jax.tree.structure(value)
    dtypes = [jnp.promote_types(jnp.result_type(x), jnp.float32) for x in jax.tree.leaves(value)]
    leaves = [jnp.asarray(t / seen, d) for t, d in zip(total, dtypes, strict=True)]
    return checks.finite("the mean", structure.unflatten(leaves))


def _digest(chunk: Examples, digest: int) -> int:
    images, labels, _ = collected(chunk)
    for array in (images, labels.astype(np.int64)):
        digest = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), digest)
    return digest


def _alike(one, two):
    return len(one) == len(two) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max(initial=0))
        for a, b in zip(one, two, strict=True)
    )


def _read(file: Path | None):
    """The kept sum and its record; None and None if there is none, or (with a warning) none whole."""
    if file is None or not file.exists():
        return None, None
    try:
        arrays, record = store.read(file)
        count = len(arrays) // 2
        kept = {name: [arrays[f"{name}/{i}"] for i in range(count)] for name in ("sum", "first")}
        return kept, {key: record[key] for key in ("chunks", "seen", "digest")}
    except Exception as error:  # whatever is wrong with it, it can be computed again
        _warn(file, f"it is damaged ({type(error).__name__})")
        return None, None


def _keep(file: Path, total, first, record) -> None:
    arrays = {f"sum/{i}": x for i, x in enumerate(total)}
    arrays |= {f"first/{i}": x for i, x in enumerate(first)}
    try:
        store.write(file, arrays, record)
    except Exception as error:  # a full disk is not always an OSError of Python's
        warnings.warn(f"the partial sum cannot be kept in {file} ({error})", stacklevel=3)


def _warn(file, reason):
    warnings.warn(
        f"the partial sum in {file} is not used: {reason}; the pass starts over. "
        "Delete that file to be rid of this warning",
        stacklevel=4,
    )


def _other_stream(file, record) -> ValueError:
    return ValueError(
        f"chunks: the sum kept in {file} is of {record['seen']} examples in {record['chunks']} "
        "chunks, and these are others (or fewer); pass the same stream from its start, or delete "
        "that file"
    )
