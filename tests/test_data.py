"""MNIST is MNIST, to the last bit; and whatever is missing or damaged is noticed, and said."""

import collections
import errno
import gzip
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunelib import data

ROOT = Path(data.__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "make_mnist.py"
FILES = [f"{part}-ubyte.gz" for part in (
    "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
)]  # fmt: skip

# The first load ever, in its own process: no network, every warning an error. It prepares in a
# folder that stays, so that the tests below can look at it.
FIRST_LOAD = """
import json, pathlib, resource, socket, sys
def refuse(*args, **kwargs): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from prunelib import data
prepare = data._prepare
data._prepare = lambda folder, **options: prepare(sys.argv[1], **options)
mnist = data.load_mnist()
# Linux hands ru_maxrss on from the parent process, and has the process's own peak in VmHWM.
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
facts = {"peak": peak, "modules": list(sys.modules)}
pathlib.Path(sys.argv[2]).write_text(json.dumps(facts))
"""


def run(code, cache, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env={**os.environ, "PRUNELIB_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def first_load(tmp_path_factory):
    """The folders of a first load (the only preparation of this file), and how it went."""
    home = tmp_path_factory.mktemp("mnist")
    result = run(FIRST_LOAD, home / "cache", home / "tfds", home / "facts.json")
    assert result.returncode == 0, result.stderr
    home.joinpath("output.txt").write_text(result.stdout + result.stderr)
    return home


@pytest.fixture(scope="session")
def mnist(first_load):
    kept = data._read_cache(first_load / "cache" / "mnist-3.0.1.npz")
    assert kept is not None
    return kept


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of one's own."""
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prepared(mnist, monkeypatch):
    """Preparing costs nothing; the list tells how often it was asked for."""
    calls = []
    monkeypatch.setattr(data, "_prepare", lambda *args, **options: calls.append(args) or mnist)
    monkeypatch.setattr(np, "savez_compressed", np.savez)  # the same file, sooner
    return calls


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of the shipped files that a test may damage."""
    folder = shutil.copytree(data.SHIPPED, tmp_path / "shipped")
    monkeypatch.setattr(data, "SHIPPED", folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- what is shipped -------------------------------------------------------------------------


def test_shipped_files_are_those_that_tfds_registered():
    import importlib.util

    package = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    registered = (package / "url_checksums" / "mnist.txt").read_text().splitlines()
    rows = [line.split("\t") for line in registered]
    assert sorted(name for *_, name in rows) == sorted(FILES)
    for _, size, sha256, name in rows:
        content = (data.SHIPPED / name).read_bytes()
        assert len(content) == int(size)
        assert hashlib.sha256(content).hexdigest() == sha256


def test_shipped_files_name_their_makers_and_licence():
    text = (data.SHIPPED / "README.md").read_text("utf-8")
    for word in ("LeCun", "Cortes", "Burges", "Attribution-ShareAlike 3.0", *FILES):
        assert word in text


@pytest.fixture
def raw(tmp_path):
    """The raw IDX files, unzipped from the shipped ones."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in FILES:
        content = gzip.decompress((data.SHIPPED / name).read_bytes())
        (folder / name.removesuffix(".gz")).write_bytes(content)
    return folder


def make_mnist(raw, out):
    command = [sys.executable, str(SCRIPT), str(raw), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_script_rebuilds_the_shipped_bytes(raw, tmp_path):
    version = subprocess.run(["gzip", "--version"], capture_output=True, text=True).stdout
    if not version.startswith("gzip 1."):
        pytest.skip("needs GNU gzip")
    result = make_mnist(raw, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (data.SHIPPED / name).read_bytes()


def test_script_refuses_altered_or_missing_raw_files(raw, tmp_path):
    flip(raw / "t10k-labels-idx1-ubyte", -1)
    result = make_mnist(raw, tmp_path / "out")
    assert result.returncode != 0
    assert "t10k-labels-idx1-ubyte" in result.stderr
    (raw / "train-labels-idx1-ubyte").unlink()
    result = make_mnist(raw, tmp_path / "out")
    assert result.returncode != 0
    assert "train-labels-idx1-ubyte" in result.stderr
    assert not (tmp_path / "out").exists()


# --- the first load --------------------------------------------------------------------------


def test_first_load_is_silent_small_and_without_tensorflow(first_load):
    assert (first_load / "output.txt").read_text() == ""
    facts = json.loads((first_load / "facts.json").read_text())
    assert facts["peak"] < 600e6  # bytes; JAX and all
    assert "tensorflow_datasets" in facts["modules"]
    assert "tensorflow" not in facts["modules"]
    assert [file.name for file in (first_load / "cache").iterdir()] == ["mnist-3.0.1.npz"]


def test_shapes_dtypes_and_counts(mnist):
    assert mnist.train.images.shape == (60_000, 784)
    assert mnist.test.images.shape == (10_000, 784)
    assert mnist.train.labels.shape == (60_000,)
    assert mnist.test.labels.shape == (10_000,)
    assert {x.images.dtype for x in mnist} == {np.dtype("uint8")}
    assert {x.labels.dtype for x in mnist} == {np.dtype("int32")}
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train.labels).tolist() == train
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test.labels).tolist() == test
    assert mnist.train.labels[:6].tolist() == [4, 1, 0, 7, 8, 1]  # TFDS's order, not LeCun's


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_every_image_keeps_its_label(mnist, split, prefix):
    def pairs(images, labels):
        return collections.Counter(
            (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
        )

    def idx(name, header):  # read independently of prunelib
        return gzip.decompress((data.SHIPPED / f"{prefix}-{name}-ubyte.gz").read_bytes())[header:]

    images = np.frombuffer(idx("images-idx3", 16), np.uint8).reshape(-1, 784)
    labels = np.frombuffer(idx("labels-idx1", 8), np.uint8)
    assert pairs(*getattr(mnist, split)) == pairs(images, labels)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "truncated", "altered"])
def test_damaged_shipped_file_is_named_soon(shipped, cache, name, fault):
    file = shipped / name
    if fault == "missing":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        flip(file, 1000)
    start = time.monotonic()
    with pytest.raises(data.DataError) as caught:
        data.load_mnist()
    assert time.monotonic() - start < 30  # importing TFDS, on a busy machine
    for word in (str(file), "missing" if fault == "missing" else "damaged", "make_mnist.py"):
        assert word in str(caught.value)
    assert not cache.exists()


# --- the kept copy ---------------------------------------------------------------------------


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path / "own"))
    assert data.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PRUNELIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_dir() == tmp_path / "xdg" / "prunelib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / ".cache" / "prunelib"
    assert not any(tmp_path.iterdir())


def test_later_loads_are_fast_silent_and_light(first_load):
    code = (
        "import sys, time; from prunelib import data; start = time.monotonic()\n"
        "data.load_mnist(); assert time.monotonic() - start < 5\n"
        "assert not {'tensorflow_datasets', 'PIL', 'requests'} & set(sys.modules)"
    )
    result = run(code, first_load / "cache")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_prepared_once_then_read(cache, prepared, mnist):
    assert same(data.load_mnist(), mnist)
    assert same(data.load_mnist(), mnist)
    assert len(prepared) == 1
    assert [file.name for file in cache.iterdir()] == ["mnist-3.0.1.npz"]


def altered(mnist):
    labels = mnist.test.labels.copy()
    labels[0] ^= 1
    return mnist._replace(test=mnist.test._replace(labels=labels))


DAMAGE = {
    "truncated": lambda file, mnist: file.write_bytes(file.read_bytes()[:-1000]),
    "half": lambda file, mnist: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": lambda file, mnist: flip(file, file.stat().st_size // 2),
    "empty": lambda file, mnist: file.write_bytes(b""),
    "garbage": lambda file, mnist: file.write_bytes(b"not an npz" * 100),
    "array": lambda file, mnist: np.save(file.open("wb"), mnist.test.labels),
    "other values": lambda file, mnist: np.savez(file, **data._flat(altered(mnist))),
    "other shape": lambda file, mnist: np.savez(
        file, **data._flat(mnist) | {"test_labels": mnist.test.labels[:-1]}
    ),
    "other dtype": lambda file, mnist: np.savez(
        file, **data._flat(mnist) | {"test_labels": mnist.test.labels.astype(np.int64)}
    ),
    "pickle": lambda file, mnist: np.savez(
        file, **data._flat(mnist) | {"test_labels": np.array([{}] * 10_000)}
    ),
    "no test": lambda file, mnist: np.savez(file, train_images=mnist.train.images),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # np.save above leaves closing to Python
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_copy_is_made_anew_with_a_warning(cache, prepared, mnist, damage):
    data.load_mnist()
    file = cache / "mnist-3.0.1.npz"
    DAMAGE[damage](file, mnist)
    with pytest.warns(UserWarning, match="mnist-3.0.1.npz is damaged and will be made anew"):
        assert same(data.load_mnist(), mnist)
    assert len(prepared) == 2
    assert same(data.load_mnist(), mnist)
    assert len(prepared) == 2


def test_unwritable_cache_is_no_error(tmp_path, monkeypatch, prepared, mnist):
    tmp_path.joinpath("file").write_text("a file, not a folder")
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path / "file" / "cache"))
    for n in (1, 2):
        with pytest.warns(UserWarning, match="cannot be kept .* set PRUNELIB_CACHE"):
            assert same(data.load_mnist(), mnist)
        assert len(prepared) == n
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_cache_is_no_error(cache, prepared, mnist):
    cache.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert same(data.load_mnist(), mnist)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_interrupted_write_leaves_nothing_behind(cache, prepared, mnist, monkeypatch, kind):
    def half(file, **arrays):
        Path(file).write_bytes(b"PK\x03\x04 the first half")
        raise kind("stopped in the middle")

    monkeypatch.setattr(np, "savez_compressed", half)
    if kind is OSError:  # say, a full disk
        with pytest.warns(UserWarning, match="cannot be kept .*stopped in the middle"):
            assert same(data.load_mnist(), mnist)
    else:
        with pytest.raises(KeyboardInterrupt):
            data.load_mnist()
    assert list(cache.iterdir()) == []


def test_many_writers_never_show_a_reader_half_a_file(cache, prepared, mnist):
    file = cache / "mnist-3.0.1.npz"
    data._write_cache(file, mnist)
    writers = [threading.Thread(target=data._write_cache, args=(file, mnist)) for _ in range(6)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert data._read_cache(file) is not None  # a warning would be an error, too
    assert same(data.load_mnist(), mnist)
    assert [kept.name for kept in cache.iterdir()] == ["mnist-3.0.1.npz"]


# --- a TFDS folder of one's own --------------------------------------------------------------


def test_data_dir_already_prepared_is_read_offline(first_load, cache, offline, mnist, capfd):
    assert same(data.load_mnist(first_load / "tfds"), mnist)
    assert capfd.readouterr() == ("", "")
    assert not cache.exists()


def test_empty_data_dir_offline_fails_soon(tmp_path, offline):
    start = time.monotonic()
    with pytest.raises(data.DataError, match=r"cannot be downloaded .*connect to the network"):
        data.load_mnist(tmp_path / "tfds")
    assert time.monotonic() - start < 30  # TFDS alone: 205 s


@pytest.mark.parametrize("fault", ["altered", "tfrecord"])
def test_data_dir_with_a_fault_is_an_error(first_load, tmp_path, offline, fault):
    folder = shutil.copytree(first_load / "tfds", tmp_path / "tfds")
    version = folder / "mnist" / "3.0.1"
    if fault == "altered":
        flip(version / "mnist-train.array_record-00000-of-00001", 100_000)
    else:  # as TFDS with TensorFlow writes it by default
        info = version / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        for file in version.glob("*array_record*"):
            file.rename(str(file).replace("array_record", "tfrecord"))
    with pytest.raises(data.DataError, match="data_dir: MNIST cannot be had from"):
        data.load_mnist(folder)


def test_altered_download_is_an_error(shipped, tmp_path, offline):
    manual = tmp_path / "tfds" / "downloads" / "manual"
    shutil.copytree(shipped, manual)
    flip(manual / FILES[0], 1000)
    with pytest.raises(data.DataError, match="wrong checksum"):
        data.load_mnist(tmp_path / "tfds")


# --- scaled, published -----------------------------------------------------------------------


def test_scaled_maps_bytes_to_unit_floats():
    grey = np.arange(256, dtype=np.uint8)
    for function in (data.scaled, jax.jit(data.scaled)):
        result = function(grey)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, np.arange(256) / 255, rtol=1e-7)
        assert result[0] == 0
        assert result[255] == 1
    assert jax.jit(data.scaled)(jnp.zeros((3, 784), jnp.uint8)).shape == (3, 784)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scaled_leaves_floats_alone(dtype):
    images = jnp.array([[0.0, 0.5, 2.0]], dtype)
    assert data.scaled(images) is images
    result = jax.jit(data.scaled)(images)
    assert result.dtype == images.dtype
    assert jnp.array_equal(result, images)


@pytest.mark.parametrize(
    "images", [np.zeros(3, np.int32), np.zeros(3, bool), np.zeros(3, complex), [0.5], None]
)
def test_scaled_refuses_anything_else(images):
    with pytest.raises(TypeError, match="images: expected a uint8 array"):
        data.scaled(images)


def test_published_2016():
    published = data.published_2016()
    assert {name: len(percent) for name, (percent, _) in published.items()} == {
        "magnitude_all_layers": 20,
        "magnitude_layerwise": 20,
        "obd_all_layers": 26,
        "obd_layerwise": 20,
        "obd_all_layers_dropout": 26,
    }
    for percent, accuracy in published.values():
        assert percent.shape == accuracy.shape
        assert percent[:20].tolist() == list(range(20))
        assert (np.diff(percent) > 0).all()
        assert ((accuracy > 0) & (accuracy < 1)).all()
    percent, accuracy = published["obd_all_layers"]
    assert percent[20:].tolist() == [20, 30, 40, 50, 60, 70]
    assert accuracy[0] == 0.9656
    assert accuracy[-1] == 0.0892
    assert published["obd_all_layers_dropout"][1][0] == 0.9113
