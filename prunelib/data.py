"""MNIST through TensorFlow Datasets (TFDS), without TensorFlow; examples placed on devices.

The four files of MNIST are shipped in ``prunelib/mnist``. The first `load_mnist` lets TFDS verify
and prepare them (some 20 s) and keeps the arrays in `store.cache_dir()`; later ones read those.
Without TFDS or array_record, which Windows has not, the same arrays are read from the files.
"""

import contextlib
import gzip
import hashlib
import importlib
import io
import logging
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prunelib import checks, store
from prunelib.checks import require

SHIPPED = {"mnist": Path(__file__).with_name("mnist")}
# In TFDS's order: the SHA-256 of the images and labels of each split.
SHA256 = {
    "mnist": {
        "train/images": "59edd5ea35c0062957306cacba8ae47e71e2c56261f4ca10230aacc14943dd3b",
        "train/labels": "062bf4d1a71dfc825d91f86658f9e3f8d6f35b8805a2457550c5000b0b1ff96c",
        "test/images": "a85d8dffc6063fb89dcbc2122651701e7bbc18837f940fc9d76df48c224558ca",
        "test/labels": "58b236bac2b9f39e838e65b8a6942832a40044c1da3df14e20f2f8291c6af177",
    },
    "fashion_mnist": {
        "train/images": "d6f7acb83157a75006f04dbae6822f88b1bb1651cef953707c39831d938776a3",
        "train/labels": "0f719277c94fd64b784df233338874360483009b12c9952b1be69bc7d463ae04",
        "test/images": "a84f70bc4eaa1b2c5e671e99525a60f9dbe89328fa62013e4aa30ba11800c4df",
        "test/labels": "85e2be1b62985fe36ef293a029e9559c3f6822643be932622c5042b8a1654a94",
    },
}


class DataError(RuntimeError):
    """The data is missing, damaged or out of reach; the message says which, and the remedy."""


class Examples(NamedTuple):
    """Images and their labels.

    images : array [n, 784], or [n, ...]; uint8 grey values 0 (black) to 255, or floats in [0, 1]
    labels : integer array [n]
    real : bool array [n], or None; False for copies that only fill up, and count nowhere
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
    """All of MNIST (LeCun, Bottou, Bengio, Haffner, 1998), in TFDS's reproducible order: `load`."""
    return load("mnist")


def load(name: str, folder: str | os.PathLike | None = None) -> Splits:
    """A data set of 28 x 28 pictures in ten classes, its files verified by TFDS's checksums.

    What was loaded before is kept in `store.cache_dir()`. Else "mnist" is made from the shipped
    files, "fashion_mnist" from the four original ``.gz`` files in `folder`, or from the network.
    Images are uint8 ``[n, 784]``, labels int32 ``[n]``. Raises ValueError for an unknown name,
    DataError if a file is missing, altered, or out of reach.
    """
    checks.one_of("name", name, SHA256)
    file = store.cache_dir() / f"{name}-3.npz"
    if folder is None and file.exists():
        try:
            return _verified(name, store.read(file)[0])
        except Exception as error:  # whatever is wrong with a kept copy, the remedy is a new one
            store.warn(f"{file} is damaged ({type(error).__name__}: {error}); making it anew")
    arrays = _prepared(name, Path(folder).expanduser() if folder else SHIPPED.get(name))
    splits = _verified(name, arrays)
    store.keep(file, arrays, {"name": name})
    return splits


def scaled(images: jax.Array | np.ndarray) -> jax.Array:
    """Grey values as floats: uint8 0…255 becomes float32 in [0, 1]; floats stay as they are.

    Called inside `jit`, a batch at a time, so that the whole data set stays uint8.
    """
    if images.dtype == jnp.uint8:
        return jnp.asarray(images).astype(jnp.float32) / 255
    require(jnp.issubdtype(images.dtype, jnp.floating), "images: expected uint8 (0 to 255) or "
            f"floats (0 to 1), got {images.dtype}; convert them", TypeError)  # fmt: skip
    return jnp.asarray(images)


def standardised(examples: Examples) -> Examples:
    """Pixels with mean 0 and standard deviation 1 over MNIST, as is usual: black is -0.42."""
    return examples._replace(images=(scaled(examples.images) - 0.1307) / 0.3081)


def blanked(examples: Examples) -> Examples:
    """MNIST without the 291 pixels that have ink in less than 1 % of the training images."""
    seldom = (load_mnist().train.images > 0).mean(0) < 0.01
    return examples._replace(images=np.where(seldom, 0, examples.images).astype(np.uint8))


def coarse(examples: Examples) -> Examples:
    """MNIST at 7x7 pixels, each the mean of 4x4: for networks whose whole Hessian fits."""
    images = examples.images.reshape(-1, 7, 4, 7, 4).mean((2, 4)).round().astype(np.uint8)
    return examples._replace(images=images.reshape(-1, 49))


def place(examples: Examples, mesh: Mesh | None = None) -> Examples:
    """Spread examples over a mesh (by default all devices of all processes) in equal shares.

    What is then computed from them is computed where they are. Copies of the last example fill up
    the devices, with ``real`` False. Each process passes the same arrays.
    """
    mesh = Mesh(np.array(jax.devices()), ("examples",)) if mesh is None else mesh
    auto = set(getattr(mesh, "axis_types", ())) == {AxisType.Auto}
    require(auto, f"mesh: expected a Mesh with axes of the type Auto, got {mesh!r}; make it as "
            'Mesh(jax.devices(), ("examples",))')  # fmt: skip
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    examples = collected(examples)
    whole = filled(examples, -(-len(examples.labels) // mesh.size) * mesh.size)
    share = partial(jax.make_array_from_callback, sharding=sharding)
    return jax.tree.map(lambda x: share(x.shape, data_callback=x.__getitem__), whole)


def filled(examples: Examples, length: int) -> Examples:
    """Examples as NumPy arrays, filled up to `length` with copies of the last; those are not real.

    Copies rather than zeros, for which some networks give NaN.
    """
    images, labels, _ = collected(examples)
    n = len(labels)
    require(length >= n, f"length: expected at least {n}, the number of examples, got {length}")
    places = np.minimum(np.arange(length), n - 1)
    return Examples(images[places], labels[places], np.arange(length) < n)


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

def _verified(name: str, arrays: store.Arrays) -> Splits:
    for key, sha256 in SHA256[name].items():
        same = hashlib.sha256(np.ascontiguousarray(arrays[key])).hexdigest() == sha256
        require(same, f"{name}: {key} is not what it should be (its SHA-256 differs)", DataError)
    parts = ("train", "test")
    return Splits(*(Examples(arrays[f"{p}/images"], arrays[f"{p}/labels"]) for p in parts))

def _prepared(name: str, folder: Path | None) -> store.Arrays:
    """What TFDS prepares, and verifies by its checksums, read back: images and labels by split."""
    with tempfile.TemporaryDirectory() as prepared, _quiet():
        try:
            try:
                importlib.import_module("array_record.python.array_record_module")
                import requests
                import tensorflow_datasets as tfds
            except Exception:  # not there, or it does not work here
                return _read(folder or Path())
            tfds.disable_progress_bar()
            builder = _builder(name, prepared)
            options = {"force_checksums_validation": True, "try_download_gcs": False}
            config = tfds.download.DownloadConfig(manual_dir=folder, **options)
            for url, info in builder.url_infos.items():  # TFDS itself would try for minutes
                file = folder and (folder / info.filename).stat()
                file or requests.head(url, timeout=5).raise_for_status()
            # parquet loses rows; tfrecord needs TensorFlow
            builder.download_and_prepare(file_format="array_record", download_config=config)
            return _split(builder, "train") | _split(builder, "test")
        except Exception as error:
            fault = f"a file is missing, damaged or out of reach ({type(error).__name__}: {error})"
            remedy = "pass a folder with the four original .gz files, or reinstall prunelib"
            raise DataError(f"{name}: {fault}; {remedy}") from error

@contextlib.contextmanager
def _quiet():
    """Silence what TFDS prints, logs and warns of: it names temporary folders and helps nobody."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
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
            name, url_infos = stock.name, stock.url_infos

            def _split_generators(self, dl_manager):
                urls = {info.filename: url for url, info in self.url_infos.items()}
                pairs = _pairs(dl_manager.download(urls).get)
                return {split: self._generate_examples(*pair) for split, *pair in pairs}

            def _generate_examples(self, images, labels):
                for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield key, {"image": PIL.Image.fromarray(image), "label": int(label)}

    return Builder(data_dir=folder)

def _pairs(find: Callable[[str], os.PathLike]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each split's name, images and labels, from the files that `find` gives for their names."""
    for split, part in (("train", "train"), ("test", "t10k")):
        yield split, *(_idx(find(f"{part}-{k}-ubyte.gz")) for k in ("images-idx3", "labels-idx1"))

def _read(folder: Path) -> store.Arrays:
    """The same without TFDS, which orders examples by the MD5 of their split's name and number."""
    arrays = {}
    for split, images, labels in _pairs(folder.joinpath):
        keys = [hashlib.md5(f"{split}{i}".encode()).digest() for i in range(len(labels))]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        arrays[f"{split}/images"] = images.reshape(len(images), -1)[order]
        arrays[f"{split}/labels"] = labels[order].astype(np.int32)
    return arrays

def _idx(file: os.PathLike) -> np.ndarray:
    """The bytes in a gzipped IDX file (big-endian header: 0, 0, 8, the rank, then the shape)."""
    raw = gzip.decompress(Path(file).read_bytes())
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

def _split(builder: Any, split: str) -> store.Arrays:
    """One prepared split as arrays."""
    source = builder.as_data_source(split)
    records = source.__getitems__(range(len(source)))
    labels = np.array([r["label"] for r in records], np.int32)
    return {f"{split}/images": np.stack([r["image"].ravel() for r in records]),
            f"{split}/labels": labels}
