"""MNIST through TensorFlow Datasets (TFDS), without TensorFlow; and the accuracies of 2016.

The four files of MNIST are shipped in `prunelib/mnist`. The first `load_mnist` lets TFDS verify
and prepare them (some 20 s), then keeps the arrays in `cache_dir()`; every later one reads those.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import logging
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prunelib import checks

SHIPPED = Path(__file__).with_name("mnist")
PUBLISHED = Path(__file__).with_name("published_2016.csv")

# What MNIST 3.0.1 is, in TFDS's order: dtype, shape and SHA-256 of each array.
_CONTENT = {
    "train_images": (
        "uint8",
        (60_000, 784),
        "59edd5ea35c0062957306cacba8ae47e71e2c56261f4ca10230aacc14943dd3b",
    ),
    "train_labels": (
        "int32",
        (60_000,),
        "062bf4d1a71dfc825d91f86658f9e3f8d6f35b8805a2457550c5000b0b1ff96c",
    ),
    "test_images": (
        "uint8",
        (10_000, 784),
        "a85d8dffc6063fb89dcbc2122651701e7bbc18837f940fc9d76df48c224558ca",
    ),
    "test_labels": (
        "int32",
        (10_000,),
        "58b236bac2b9f39e838e65b8a6942832a40044c1da3df14e20f2f8291c6af177",
    ),
}


class DataError(RuntimeError):
    """The data is missing, damaged or out of reach; the message says which file, and the remedy."""


class Examples(NamedTuple):
    """Images and their labels.

    Attributes
    ----------
    images : array [n, 784]
        uint8 grey values 0 (black) to 255, row by row; or floats in [0, 1].
    labels : int32 array [n]
        The digits, 0 to 9.
    """

    images: Any
    labels: Any


class Placed(NamedTuple):
    """Examples spread over devices by `place`. All that takes `Examples` takes them too.

    Attributes
    ----------
    images, labels : arrays [m, ...] and [m]
        As in `Examples`; the first axis is filled up with copies of the last example until
        the devices divide it.
    real : bool array [m]
        False for what only fills up, and counts nowhere.
    """

    images: Any
    labels: Any
    real: Any


class Mnist(NamedTuple):
    """The two splits of MNIST: 60,000 training examples, 10,000 test examples."""

    train: Examples
    test: Examples


def cache_dir() -> Path:
    """Folder for what is worth keeping between runs; it may not exist yet.

    `$PRUNELIB_CACHE`, else `$XDG_CACHE_HOME/prunelib`, else `~/.cache/prunelib`.
    """
    own = os.environ.get("PRUNELIB_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or Path(shared, "prunelib")).expanduser()


def load_mnist(data_dir: str | os.PathLike | None = None) -> Mnist:
    """All of MNIST, in TFDS's (shuffled, reproducible) order.

    Parameters
    ----------
    data_dir
        None: the shipped files, no network. Otherwise a TFDS data folder: what is prepared or
        downloaded there is used, and what is missing TFDS downloads (11.6 MB).

    Returns
    -------
    Mnist
        `train` and `test`: images uint8 `[n, 784]`, labels int32 `[n]`, as NumPy arrays.

    Raises
    ------
    DataError
        If a shipped file is missing or altered; or `data_dir` cannot be filled or read. Every
        array is checked against a known SHA-256 before it is returned.

    Notes
    -----
    A damaged or unwritable cache is no error: the data is prepared anew, with a warning.

    References
    ----------
    LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998.
    """
    if data_dir is not None:
        return _from_data_dir(Path(data_dir).expanduser())
    file = cache_dir() / "mnist-3.0.1.npz"
    mnist = _read_cache(file)
    if mnist is None:
        with tempfile.TemporaryDirectory() as folder:
            mnist = _prepare(folder, manual_dir=SHIPPED, before_download=_check_shipped)
        _write_cache(file, mnist)
    return mnist


def scaled(images: jax.Array | np.ndarray) -> jax.Array:
    """Grey values as floats: uint8 0…255 becomes float32 in [0, 1].

    Floating-point images are returned as they are. May be called inside `jit`, and should be:
    a batch at a time, so that the whole data set stays uint8, a quarter of the size.

    Raises
    ------
    TypeError
        If `images` is neither uint8 nor floating-point.
    FloatingPointError
        If one is NaN or infinite (not seen inside `jit`).
    """
    checks.native("images", images)
    dtype = getattr(images, "dtype", None)
    if dtype == jnp.uint8:
        return jnp.asarray(images).astype(jnp.float32) / 255
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return checks.finite("images", images)
    raise TypeError(
        "images: expected a uint8 array (0 to 255) or a floating-point one (0 to 1), "
        f"got {type(images).__name__ if dtype is None else dtype}; convert it with .astype"
    )


def place(examples: Examples, mesh: Mesh | None = None) -> Placed:
    """Spread examples over the devices of a mesh: each device holds an equal share, and only that.

    What is then computed from them is computed where they are (see `passes.mean_over_batches`).

    Parameters
    ----------
    examples : Examples
        Any number. In several processes each passes the same NumPy arrays, and only its share goes
        to its devices.
    mesh : jax.sharding.Mesh, optional
        The examples go over all its axes, which must be of the type `Auto`; by default over all
        devices of all processes.

    Raises
    ------
    TypeError, ValueError
        If the examples are not what `Examples` says, or the mesh is none, or has explicit axes.
    """
    mesh = Mesh(np.array(jax.devices()), ("examples",)) if mesh is None else mesh
    checks.mesh(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    examples = collected(examples)
    whole = filled(examples, -(-len(examples.labels) // mesh.size) * mesh.size)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), whole
    )


def filled(examples: Examples, length: int) -> Placed:
    """Examples as NumPy arrays, filled up to `length` with copies of the last; those are not real.

    Raises
    ------
    TypeError, ValueError
        If the examples are not what `Examples` says, or more than `length`.
    """
    images, labels = collected(examples)
    more = length - len(labels)
    if more < 0:
        raise ValueError(
            f"length: expected at least {len(labels)}, the number of examples, got {length}; "
            "nothing is dropped here"
        )
    real = np.arange(length) < len(labels)
    if more:
        images, labels = (
            np.concatenate([x, np.broadcast_to(x[-1:], (more, *x.shape[1:]))])
            for x in (images, labels)
        )
    return Placed(images, labels, real)


def collected(examples: Examples | Placed) -> Examples:
    """Examples as NumPy arrays in this process, from wherever they are, without what fills up.

    Raises TypeError or ValueError if the examples are not what `Examples` says.
    """
    checks.examples(examples)
    arrays = examples.images, examples.labels, getattr(examples, "real", None)
    sharding = getattr(examples.images, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:  # in several processes
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        arrays = jax.jit(lambda *x: x, out_shardings=everywhere)(*arrays)
    images, labels, real = (None if x is None else np.asarray(x) for x in arrays)
    return Examples(images, labels) if real is None else Examples(images[real], labels[real])


def published_2016() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The test accuracies that the 2016 study published, without retraining.

    Returns
    -------
    dict
        experiment -> (percent_pruned, test_accuracy): two float arrays of the same length, the
        first in percent (the source counts what remains: 100 minus this), the second in [0, 1].
        Experiments: `magnitude_all_layers`, `magnitude_layerwise`, `obd_all_layers`,
        `obd_layerwise`, `obd_all_layers_dropout`.
    """
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(lines):
        point = 100 - float(row["percent_remaining"]), float(row["test_accuracy"])
        points.setdefault(row["experiment"], []).append(point)
    return {name: tuple(np.array(table).T) for name, table in points.items()}


def _verified(mnist: Mnist) -> Mnist:
    """Return `mnist` if it is MNIST to the last bit, else raise DataError."""
    arrays = _flat(mnist)
    for name, (dtype, shape, sha256) in _CONTENT.items():
        found = str(arrays[name].dtype), arrays[name].shape
        if found != (dtype, shape):
            raise DataError(f"{name}: expected {dtype} {shape}, found {found[0]} {found[1]}")
        if hashlib.sha256(np.ascontiguousarray(arrays[name])).hexdigest() != sha256:
            raise DataError(f"{name}: the values are not MNIST's (their SHA-256 differs)")
    return mnist


def _flat(mnist: Mnist) -> dict[str, np.ndarray]:
    return {
        f"{split}_{field}": array
        for split, examples in mnist._asdict().items()
        for field, array in examples._asdict().items()
    }


def _read_cache(file: Path) -> Mnist | None:
    """The arrays kept in `file`; None if there are none, or (with a warning) none intact."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            return _verified(
                Mnist(
                    Examples(kept["train_images"], kept["train_labels"]),
                    Examples(kept["test_images"], kept["test_labels"]),
                )
            )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever is wrong with a kept copy, the remedy is a new one
        warnings.warn(f"{file} is damaged and will be made anew ({error})", stacklevel=3)
        return None


def _write_cache(file: Path, mnist: Mnist) -> None:
    """Keep the arrays in `file`: all or nothing, whoever else is writing it; warn if impossible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".mnist-") as folder:
            complete = Path(folder, file.name)
            np.savez_compressed(complete, **_flat(mnist))
            os.replace(complete, file)
    except OSError as error:
        warnings.warn(
            f"MNIST cannot be kept in {file.parent} ({error}), so each load prepares it anew; "
            "set PRUNELIB_CACHE to a folder that can be written",
            stacklevel=3,
        )


def _from_data_dir(data_dir: Path) -> Mnist:
    try:
        return _prepare(data_dir, before_download=lambda infos: _check_reachable(infos, data_dir))
    except Exception as error:
        if isinstance(error, DataError) and str(data_dir) in str(error):
            raise
        raise DataError(
            f"data_dir: MNIST cannot be had from {data_dir} ({type(error).__name__}: {error}); "
            "try an empty folder, or load_mnist() without data_dir, which uses the shipped files"
        ) from error


def _check_shipped(url_infos: dict[str, Any]) -> None:
    """Raise DataError unless the four shipped files are the ones that TFDS has registered."""
    for info in url_infos.values():
        file = SHIPPED / info.filename
        content = file.read_bytes() if file.is_file() else None
        if content is None or hashlib.sha256(content).hexdigest() != info.checksum:
            state = "is missing" if content is None else "is damaged (its SHA-256 differs)"
            raise DataError(
                f"{file} {state}; reinstall prunelib, or run scripts/make_mnist.py to make it anew"
            )


def _check_reachable(url_infos: dict[str, Any], data_dir: Path) -> None:
    """Raise DataError soon if a file is not in `data_dir` and the network cannot give it.

    TFDS alone would try again for more than three minutes before it says so.
    """
    import requests

    for url, info in url_infos.items():
        if any(data_dir.rglob(f"*{Path(info.filename).stem}*.gz")):
            continue
        try:
            requests.head(url, timeout=5).raise_for_status()
        except requests.RequestException as error:
            raise DataError(
                f"data_dir: {info.filename} is not in {data_dir} and cannot be downloaded "
                f"({type(error).__name__}); connect to the network, or use load_mnist() without "
                "data_dir, which needs none"
            ) from error


@contextlib.contextmanager
def _quiet():
    """Silence what TFDS prints, logs and warns of: it names temporary folders and helps nobody."""
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(disabled)


def _prepare(
    data_dir: str | os.PathLike,
    before_download: Callable[[dict[str, Any]], None],
    manual_dir: Path | None = None,
) -> Mnist:
    """Prepare MNIST with TFDS in `data_dir`, unless it is there, and read it back.

    `before_download` is given TFDS's registered file infos by URL, and may raise. Files in
    `manual_dir` are not downloaded. TFDS verifies the registered SHA-256 of all.
    """
    with _quiet():
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        builder = _builder_class()(data_dir=data_dir)
        if not builder.data_path.exists():
            before_download(builder.url_infos)
        builder.download_and_prepare(
            file_format="array_record",  # parquet loses rows; tfrecord needs TensorFlow
            download_config=tfds.download.DownloadConfig(
                manual_dir=manual_dir, force_checksums_validation=True, try_download_gcs=False
            ),
        )
        return _verified(Mnist(_read_split(builder, "train"), _read_split(builder, "test")))


def _builder_class() -> type:
    """TFDS's own MNIST builder, with its two steps that need TensorFlow done by NumPy instead."""
    import PIL.Image
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import mnist as stock

    with tfds.core.registered.skip_registration():

        class Builder(stock.MNIST):
            name = stock.MNIST.name
            url_infos = stock.MNIST.url_infos

            def _split_generators(self, dl_manager):
                by_name = {info.filename: url for url, info in self.url_infos.items()}
                files = dl_manager.download(by_name)
                return {
                    split: self._generate_examples(
                        _idx(files[f"{prefix}-images-idx3-ubyte.gz"]),
                        _idx(files[f"{prefix}-labels-idx1-ubyte.gz"]),
                    )
                    for split, prefix in (("train", "train"), ("test", "t10k"))
                }

            def _generate_examples(self, images, labels):
                for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield key, {"image": PIL.Image.fromarray(image), "label": int(label)}

    return Builder


def _idx(file: os.PathLike) -> np.ndarray:
    """The bytes in a gzipped IDX file (big-endian header: 0, 0, 8, the rank, then the shape)."""
    raw = gzip.decompress(Path(file).read_bytes())
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _read_split(builder: Any, split: str) -> Examples:
    """One prepared split as arrays; the PNGs are decoded here, a thousand at a time."""
    import PIL.Image
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(source), 784), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), 1000):
        chunk = source.__getitems__(range(start, min(start + 1000, len(source))))
        for i, record in enumerate(chunk, start):
            images[i] = np.asarray(PIL.Image.open(io.BytesIO(record["image"]))).ravel()
            labels[i] = record["label"]
    return Examples(images, labels)
