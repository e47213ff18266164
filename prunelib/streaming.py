"""A pass over more examples than memory holds: chunk by chunk, and resumable.

All that `passes` computes is a mean over examples, so the mean of chunks, each weighted by its
number of examples, is the mean of all: the same functions, called once for each chunk.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prunelib import checks, curvature, training
from prunelib.data import Examples, collected, filled, place
from prunelib.passes import count


def chunks(source: Any, size: int = 10_000) -> Iterator[Examples]:
    """Cut a source into chunks of `size` examples, the last one shorter; only one is in memory.

    Parameters
    ----------
    source : Examples, or a TFDS data source
        `Examples` may hold memory-mapped arrays. A data source is anything with a length that
        gives ``{"image": [...], "label": int}`` by index; its images become rows of pixels.

    Raises
    ------
    TypeError, ValueError
        If the source is neither, or `size` is less than 1; while reading, if a label is no integer.
    """
    checks.whole("size", size)
    if hasattr(source, "images"):
        source = collected(source)  # without what fills it up
        return (
            Examples(*(x[i : i + size] for x in (source.images, source.labels)))
            for i in range(0, len(source.labels), size)
        )
    indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if isinstance(source, str) or not indexed:
        raise TypeError(
            f"source: expected Examples or a TFDS data source, got {type(source).__name__}; "
            "for another kind, write a generator of Examples"
        )
    return (_read(source, range(len(source))[i : i + size]) for i in range(0, len(source), size))


def _read(source, places) -> Examples:
    several = getattr(source, "__getitems__", lambda places: [source[i] for i in places])
    records = several(places)
    images = np.stack([np.ravel(record["image"]) for record in records])
    labels = np.array([record["label"] for record in records])
    checks.labels(labels)
    if (labels != labels.astype(np.int32)).any():
        raise ValueError(
            f"labels: found {labels.min()} to {labels.max()}, which 32 bits do not hold; "
            "number the classes from 0"
        )
    return Examples(images, labels.astype(np.int32))


def hessian_diagonal(
    network,
    params: Any,
    chunks: Iterable[Examples],
    method: str = "gauss_newton",
    *,
    mesh: Mesh | None = None,
    folder: str | os.PathLike | None = None,
    every: int = 10,
    **options,
) -> Any:
    """`curvature.hessian_diagonal` of a stream of examples, of any length.

    Parameters
    ----------
    chunks : iterable of Examples
        For instance from `chunks`. Each is one call of `curvature.hessian_diagonal`; chunks of
        one length are compiled once.
    mesh : jax.sharding.Mesh, optional
        Place each chunk on these devices (see `data.place`).
    folder, every
        Where, and how often, to keep the partial sum: see `mean`.
    **options
        As for `curvature.hessian_diagonal`: ``loss``, ``batch_size``, ``probes``, ...

    Returns
    -------
    pytree
        Shaped like `params`; in nats per squared weight.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        As `mean` and `curvature.hessian_diagonal`; and if there is a `folder`, and an option such
        as ``loss`` that no key can tell from others: a function that is in no library.
    """
    checks.one_of("method", method, curvature.METHODS)
    checks.params(params)
    length = read = 0

    def counted():
        nonlocal read
        for chunk in chunks:
            yield chunk
            read += count(chunk)  # also of chunks that a resumed pass does not measure again

    def measure(chunk):
        nonlocal length
        length = max(length, len(chunk.labels))  # a shorter one is filled up: it compiles nothing
        chunk = filled(chunk, length) if mesh is None else place(chunk, mesh)
        place_in_stream = {"first": read} if method == "sampled" else {}
        return curvature.hessian_diagonal(
            network, params, chunk, method, **options, **place_in_stream
        )

    key = {"method": method, "params": training.content(params)}
    for name, value in options.items():
        key[name] = training.in_words(value)
        if folder is not None and key[name] is None:
            raise ValueError(
                f"{name}: a sum that is kept is known by the names and numbers of all options, and "
                f"words do not tell this {type(value).__name__} from others; pass no folder, or "
                "use streaming.mean with a key of your own"
            )
    return mean(measure, counted(), folder=folder, key=key, every=every)


def mean(
    measure: Callable[[Examples], Any],
    chunks: Iterable[Examples],
    *,
    folder: str | os.PathLike | None = None,
    key: dict | None = None,
    every: int = 10,
) -> Any:
    """The mean of ``measure(chunk)`` over all examples of all chunks; the sum is in float64.

    With a `folder`, the partial sum is kept there by Orbax, and a pass that was interrupted goes on
    from it when it is called again with the same arguments and the stream from its start. What was
    summed is read again, to see that it is the same, and not computed again. A kept sum is used
    only if it is whole, its `key` is the same, and so is what `measure` gives for the first chunk;
    otherwise the pass starts over, with a warning.

    Parameters
    ----------
    measure : callable
        A pytree of arrays or real numbers, each a mean over the examples of a chunk; shaped alike
        for all chunks.
    chunks : iterable of Examples
    folder : path, optional
        For one pass only. What is kept is removed when the pass is done.
    key : dict, optional
        What the measure depends on and its value for the first chunk might not show; JSON-able.
    every : int
        Keep the sum after so many chunks.

    Raises
    ------
    ValueError
        If there are no chunks; or they are not those of the kept sum; or `folder` is used in one of
        several processes.
    TypeError, ValueError
        If a chunk is no `Examples`, or what `measure` gives is not as said above.
    FloatingPointError
        If the mean is NaN or infinite.
    """
    checks.whole("every", every)
    if folder is not None and jax.process_count() > 1:
        raise ValueError(
            f"folder: partial sums are kept by a single process, but this is one of "
            f"{jax.process_count()}; pass none"
        )
    folder = None if folder is None else Path(folder)
    key = json.loads(json.dumps(key))  # as it is read back: a list for a tuple
    kept = None if folder is None else _newest(folder, key)
    total, seen, number, read = None, 0, 0, (hashlib.sha256(), hashlib.sha256())
    for number, chunk in enumerate(chunks, 1):
        checks.examples(chunk)
        if folder is not None:
            _update(read, chunk)
        seen += count(chunk)
        if kept is None or number == 1:
            value = measure(chunk)
            _check_value(value, number, value if total is None else total)
            weight = count(chunk)
            share = jax.tree.map(lambda x, n=weight: n * np.asarray(x, np.float64), value)
            total = share if total is None else jax.tree.map(np.add, total, share)
        if number == 1:
            first = jax.tree.leaves(share)
            if kept is not None and not _alike(first, kept[0]["first"]):
                _start_over(folder, "it is of another measure, or of other examples")
                kept = None
        if kept is not None and number == kept[1]["chunks"]:
            _same_stream(folder, kept[1], seen, read)
            leaves = map(np.asarray, kept[0]["sum"])  # a number comes back as a plain float
            total, kept = jax.tree.structure(value).unflatten(leaves), None
        elif kept is None and folder is not None and number % every == 0:
            record = {"key": key, "chunks": number, "seen": seen, "read": _hex(read)}
            _keep(folder, {"sum": jax.tree.leaves(total), "first": first}, record)
    if kept is not None:  # the stream ended before the chunk up to which it is of
        _another_stream(folder, kept[1])
    if total is None:
        raise ValueError("chunks: there are none; make a new iterator, each serves only once")
    if folder is not None:
        _remove(_sums(folder))
        with contextlib.suppress(OSError):
            folder.rmdir()
    # A mean of whole numbers is none.
    dtypes = jax.tree.map(lambda x: jnp.promote_types(jnp.result_type(x), jnp.float32), value)
    found = jax.tree.map(lambda x, dtype: jnp.asarray(x / seen, dtype), total, dtypes)
    return checks.finite("the mean", found)


# Partial sums: each in a folder named by its number of chunks ------------------------------------


def _update(read, chunk):
    images, labels = collected(chunk)
    for digest, array in zip(read, (images, labels.astype(np.int64)), strict=True):
        digest.update(np.ascontiguousarray(array))


def _hex(read):
    return [digest.hexdigest() for digest in read]


def _same_stream(folder, record, seen, read):
    if (seen, _hex(read)) != (record["seen"], record["read"]):
        _another_stream(folder, record)


def _another_stream(folder, record):
    raise ValueError(
        f"chunks: the sum kept in {folder} is of {record['seen']} examples in "
        f"{record['chunks']} chunks, and these are others (or fewer); pass the same stream "
        "from its start, or delete that folder"
    )


def _check_value(value, number, sums):
    name = f"measure: its value for chunk {number}"
    if not jax.tree.leaves(value):
        raise TypeError(f"{name}: expected arrays or numbers, got {value!r}; return some")
    for path, leaf in jax.tree.leaves_with_path(value):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.dtype(type(leaf))
        real = jnp.floating, jnp.integer, jnp.bool
        if not any(jnp.issubdtype(dtype, kind) for kind in real):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)}: expected real numbers, got {dtype}; "
                "return for instance the real and the imaginary part"
            )
    found, expected = (jax.tree.map(np.shape, tree) for tree in (value, sums))
    if found != expected:
        raise ValueError(
            f"{name}: expected the shapes of the chunks before, {expected}, got {found}; "
            "return a mean over the examples, shaped alike for all chunks"
        )


def _alike(one, two):
    return len(one) == len(two) and all(
        np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())
        for a, b in zip(one, two, strict=True)
    )


def _start_over(folder, reason):
    warnings.warn(
        f"the partial sum in {folder} is not used: {reason}; the pass starts over. "
        "Delete that folder to be rid of this warning",
        stacklevel=4,
    )


def _sums(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*") if re.fullmatch(r"\d{9}|\.unfinished-.*", file.name)]


def _remove(folders):
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _newest(folder: Path, key):
    """The arrays and record of the longest partial sum that is whole; None if there is none."""
    for kept in sorted(folder.glob("[0-9]" * 9), reverse=True):
        try:
            arrays, record = training.read_arrays(kept)
        except Exception as error:  # whatever is wrong with it, it can be computed again
            _start_over(kept, f"it is damaged ({type(error).__name__})")
            continue
        if record["key"] == key:
            return arrays, record
        _start_over(
            kept,
            "it was kept under another key (other parameters, another method, or other options)",
        )
    return None


def _keep(folder: Path, arrays, record):
    """Write a partial sum; only then remove the older ones, so that there is always a whole one."""
    new = folder / f"{record['chunks']:09}"
    try:
        training.write_arrays(new, arrays, record)
    except Exception as error:  # a full disk is not always an OSError of Python's
        warnings.warn(
            f"the partial sum cannot be kept in {folder} ({type(error).__name__}: {error}), so an "
            "interrupted pass would start over; pass a folder that can be written",
            stacklevel=3,
        )
        return
    _remove(other for other in _sums(folder) if other != new)
