"""MNIST through TensorFlow Datasets (TFDS), without TensorFlow; examples placed on devices.

The four files of MNIST are shipped in ``prunelib/mnist``. The first `load_mnist` lets TFDS verify
and prepare them (some 20 s) and keeps the arrays in `store.cache_dir()`; later ones read those.
"""

import contextlib
import gzip
import hashlib
import io
import logging
import os
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prunelib import checks, store

SHIPPED = {"mnist": Path(__file__).with_name("mnist")}
# In TFDS's order: the SHA-256 of the images and labels of each split.
SHA256 = {
    "mnist": {
        "train/images": "59edd5ea35c0062957306cacba8ae47e71e2c56261f4ca10230aacc14943dd3b",
        "train/labels": "062bf4d1a71dfc825d91f86658f9e3f8d6f35b8805a2457550c5000b0b1ff96c",
        "test/images": "a85d8dffc6063fb89dcbc2122651701e7bbc18837f940fc9d76df48c224558ca",
        "test/labels": "58b236bac2b9f39e838e65b8a6942832a40044c1da3df14e20f2f8291c6af177",
    },
    "fashion_mnist": {},
}


class DataError(RuntimeError):
    """The data is missing, damaged or out of reach; the message says which file, and the remedy."""


class Examples(NamedTuple):
    """Images and their labels.

    Attributes
    ----------
    images : array [n, 784], or [n, ...]
        uint8 grey values 0 (black) to 255, row by row; or floats in [0, 1].
    labels : integer array [n]
    real : bool array [n], optional
        False for copies that only fill up a batch or a device, and count nowhere; see `place`.
    """

    images: Any
    labels: Any
    real: Any = None

    def first(self, n: int) -> "Examples":
        """The first `n` examples."""
        return Examples(*(None if x is None else x[:n] for x in self))


class Splits(NamedTuple):
    """A data set: 60,000 training examples and 10,000 test examples."""

    train: Examples
    test: Examples


def load_mnist() -> Splits:
    """All of MNIST, in TFDS's (shuffled, reproducible) order; see `load`.

    References
    ----------
    LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998.
    """
    return load("mnist")


def load(name: str, folder: str | os.PathLike | None = None) -> Splits:
    """A data set of 28 x 28 pictures in ten classes, every array verified.

    Parameters
    ----------
    name : {"mnist", "fashion_mnist"}
    folder : path, optional
        Where the four original ``.gz`` files are. Without it, what was loaded before is read from
        `store.cache_dir()`; MNIST is shipped; Fashion-MNIST is downloaded by TFDS.

    Returns
    -------
    Splits
        `train` and `test`: images uint8 ``[n, 784]``, labels int32 ``[n]``, as NumPy arrays.

    Raises
    ------
    ValueError
        For an unknown name.
    DataError
        If a file is missing, altered, or cannot be downloaded.
    """
    checks.one_of("name", name, SHA256)
    file = store.cache_dir() / f"{name}-3.npz"
    if folder is None:
        try:
            return _verified(name, store.read(file)[0])
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # whatever is wrong with a kept copy, the remedy is a new one
            _warn(f"{file} is damaged ({type(error).__name__}: {error}); it will be made anew")
    splits = _prepare(name, Path(folder).expanduser() if folder else SHIPPED.get(name))
    try:
        store.write(file, _flat(splits), {"name": name})
    except OSError as error:
        _warn(f"{name} cannot be kept in {file.parent} ({error}); set PRUNELIB_CACHE to another")
    return splits


def scaled(images: jax.Array | np.ndarray) -> jax.Array:
    """Grey values as floats: uint8 0…255 becomes float32 in [0, 1]; floats stay as they are.

    Called inside `jit`, a batch at a time, so that the whole data set stays uint8.
    """
    if images.dtype == jnp.uint8:
        return jnp.asarray(images).astype(jnp.float32) / 255
    if jnp.issubdtype(images.dtype, jnp.floating):
        return jnp.asarray(images)
    raise TypeError(
        "images: expected a uint8 array (0 to 255) or a floating-point one (0 to 1), "
        f"got {images.dtype}; convert it with .astype"
    )


def place(examples: Examples, mesh: Mesh | None = None) -> Examples:
    """Spread examples over the devices of a mesh: each device holds an equal share, and only that.

    What is then computed from them is computed where they are (see `passes.mean_over_batches`).

    Parameters
    ----------
    examples : Examples
        Any number; copies of the last fill up the devices, with ``real`` False. In several
        processes each passes the same arrays, and only its share goes to its devices.
    mesh : jax.sharding.Mesh, optional
        With axes of the type `Auto`; by default all devices of all processes.

    Raises
    ------
    TypeError, ValueError
        If the examples are not what `Examples` says, or the mesh is none, or has explicit axes.
    """
    mesh = Mesh(np.array(jax.devices()), ("examples",)) if mesh is None else mesh
    if set(getattr(mesh, "axis_types", ())) != {AxisType.Auto}:
        raise ValueError(
            f"mesh: expected a Mesh with axes of the type Auto, got {mesh!r}; "
            'make it as Mesh(jax.devices(), ("examples",))'
        )
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    examples = collected(examples)
    whole = filled(examples, -(-len(examples.labels) // mesh.size) * mesh.size)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), whole
    )


def filled(examples: Examples, length: int) -> Examples:
    """Examples as NumPy arrays, filled up to `length` with copies of the last; those are not real.

    Copies rather than zeros, for which some networks give NaN.
    """
    images, labels, _ = collected(examples)
    more = length - len(labels)
    if more < 0:
        raise ValueError(
            f"length: expected at least {len(labels)}, the number of examples, got {length}; "
            "nothing is dropped here"
        )
    images, labels = (
        np.concatenate([x, np.broadcast_to(x[-1:], (more, *x.shape[1:]))]) for x in (images, labels)
    )
    return Examples(images, labels, np.arange(length) < length - more)


def collected(examples: Examples) -> Examples:
    """Examples as NumPy arrays in this process, from wherever they are, without what fills up."""
    checks.examples(examples)
    sharding = getattr(examples.images, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:  # in several processes
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        examples = jax.jit(lambda x: x, out_shardings=everywhere)(examples)
    real = getattr(examples, "real", None)
    chosen = slice(None) if real is None else np.asarray(real)
    return Examples(np.asarray(examples.images)[chosen], np.asarray(examples.labels)[chosen])


def count(examples: Examples) -> int:
    """How many examples there are, without what only fills up."""
    real = getattr(examples, "real", None)
    return len(examples.labels) if real is None else int(jnp.sum(real))


def _flat(splits: Splits) -> store.Arrays:
    return {
        f"{split}/{field}": getattr(getattr(splits, split), field)
        for split in ("train", "test")
        for field in ("images", "labels")
    }


def _verified(name: str, arrays: store.Arrays) -> Splits:
    for key, sha256 in SHA256[name].items():
        if hashlib.sha256(np.ascontiguousarray(arrays[key])).hexdigest() != sha256:
            raise DataError(f"{name}: {key} is not what it should be (its SHA-256 differs)")
    return Splits(
        *(Examples(arrays[f"{s}/images"], arrays[f"{s}/labels"]) for s in ("train", "test"))
    )


def _prepare(name: str, folder: Path | None) -> Splits:
    """Prepare a data set with TFDS, which verifies its files' checksums, and read it back."""
    with tempfile.TemporaryDirectory() as prepared, _quiet():
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        builder = _builder(name, prepared)
        _check_files(name, builder.url_infos, folder)
        try:
            builder.download_and_prepare(
                file_format="array_record",  # parquet loses rows; tfrecord needs TensorFlow
                download_config=tfds.download.DownloadConfig(
                    manual_dir=folder, force_checksums_validation=True, try_download_gcs=False
                ),
            )
        except Exception as error:
            raise DataError(
                f"{name}: TFDS cannot prepare it ({type(error).__name__}: {error}); pass a folder "
                "with the four original .gz files"
            ) from error
        splits = Splits(_read_split(builder, "train"), _read_split(builder, "test"))
    return _verified(name, _flat(splits))


def _check_files(name: str, infos: dict[str, Any], folder: Path | None) -> None:
    """Raise DataError at once where TFDS would try for minutes before it says so."""
    import requests

    for url, info in infos.items():
        if folder is None:
            try:
                requests.head(url, timeout=5).raise_for_status()
                continue
            except requests.RequestException as error:
                raise DataError(
                    f"{name}: {info.filename} cannot be downloaded ({type(error).__name__}); "
                    "connect to the network, or pass a folder with the four original .gz files"
                ) from error
        file = folder / info.filename
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != info.checksum:
            state = "is damaged (its SHA-256 differs)" if file.is_file() else "is missing"
            raise DataError(
                f"{name}: {file} {state}; take the original, or reinstall prunelib "
                "(scripts/make_mnist.py makes the shipped files anew)"
            )


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


def _builder(name: str, folder: str) -> Any:
    """TFDS's own builder, with its two steps that need TensorFlow done by NumPy instead."""
    import PIL.Image
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import mnist

    stock = {"mnist": mnist.MNIST, "fashion_mnist": mnist.FashionMNIST}[name]
    with tfds.core.registered.skip_registration():

        class Builder(stock):
            name = stock.name
            url_infos = stock.url_infos

            def _split_generators(self, dl_manager):
                urls = {info.filename: url for url, info in self.url_infos.items()}
                files = dl_manager.download(urls)
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

    return Builder(data_dir=folder)


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


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
