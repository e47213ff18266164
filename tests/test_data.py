"""MNIST is MNIST, to the last bit; and whatever is missing or damaged is noticed, and said."""

import collections
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunelib import data, store

ROOT = Path(data.__file__).resolve().parent.parent
MNIST = data.SHIPPED["mnist"]
FILES = [f"{part}-ubyte.gz" for part in (
    "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
)]  # fmt: skip

# A load in its own process: no network, every warning an error.
LOAD = """
import json, pathlib, socket, sys, time
def refuse(*args, **kwargs): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
start = time.monotonic()
import prunelib.data
imported = time.monotonic()
prunelib.data.load_mnist()
facts = {"import": imported - start, "load": time.monotonic() - imported}
status = pathlib.Path("/proc/self/status")
if status.exists():
    facts["peak"] = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps(facts | {"modules": list(sys.modules)}))
"""


def run(code, cache):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PRUNELIB_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)  # nothing else is printed


@pytest.fixture(scope="session")
def first_load(tmp_path_factory):
    """The cache of a first load (the only preparation of this file), and how it went."""
    cache = tmp_path_factory.mktemp("mnist")
    return cache, run(LOAD, cache)


@pytest.fixture(scope="session")
def mnist(first_load):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELIB_CACHE", str(first_load[0]))
        return data.load_mnist()


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


# What is shipped ---------------------------------------------------------------------------------


def test_shipped_files_are_those_that_tfds_registered():
    package = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    registered = (package / "url_checksums" / "mnist.txt").read_text().splitlines()
    rows = [line.split("\t") for line in registered]
    assert sorted(name for *_, name in rows) == sorted(FILES)
    for _, size, sha256, name in rows:
        content = (MNIST / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size), sha256)


def make_mnist(raw, out):
    script = ROOT / "scripts" / "make_mnist.py"
    command = [sys.executable, script, raw, "--out", out]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_script_rebuilds_the_shipped_bytes_and_refuses_others(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in FILES:
        (raw / name.removesuffix(".gz")).write_bytes(gzip.decompress((MNIST / name).read_bytes()))
    result = make_mnist(raw, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (MNIST / name).read_bytes()
    flip(raw / "t10k-labels-idx1-ubyte", -1)
    result = make_mnist(raw, tmp_path / "other")
    assert result.returncode != 0
    assert "t10k-labels-idx1-ubyte" in result.stderr
    assert not (tmp_path / "other").exists()


# Loading -----------------------------------------------------------------------------------------


def test_first_load_is_silent_small_and_without_tensorflow(first_load):
    cache, facts = first_load
    assert facts.get("peak", 0) < 700e6  # bytes; JAX and all
    assert "tensorflow_datasets" in facts["modules"]
    assert "tensorflow" not in facts["modules"]
    assert len(list(cache.iterdir())) == 1


def test_later_loads_are_silent_and_light(first_load):
    facts = run(LOAD, first_load[0])
    assert not {"tensorflow_datasets", "PIL", "requests"} & set(facts["modules"])
    print(f"import {facts['import']:.1f} s, load {facts['load']:.1f} s")


def test_shapes_dtypes_and_counts(mnist):
    assert mnist.train.images.shape == (60_000, 784)
    assert mnist.test.images.shape == (10_000, 784)
    assert {x.images.dtype for x in mnist} == {np.dtype("uint8")}
    assert {x.labels.dtype for x in mnist} == {np.dtype("int32")}
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train.labels).tolist() == train
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test.labels).tolist() == test
    assert mnist.train.labels[:6].tolist() == [4, 1, 0, 7, 8, 1]  # TFDS's order, not LeCun's
    assert mnist.train.first(3).labels.tolist() == [4, 1, 0]


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_every_image_keeps_its_label(mnist, split, prefix):
    def pairs(images, labels):
        return collections.Counter(
            (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
        )

    def idx(name, header):  # read independently of prunelib
        return gzip.decompress((MNIST / f"{prefix}-{name}-ubyte.gz").read_bytes())[header:]

    images = np.frombuffer(idx("images-idx3", 16), np.uint8).reshape(-1, 784)
    labels = np.frombuffer(idx("labels-idx1", 8), np.uint8)
    assert pairs(*getattr(mnist, split)[:2]) == pairs(images, labels)


@pytest.mark.parametrize("module", ["array_record", "tensorflow_datasets"])
def test_the_same_is_loaded_where_tfds_does_not_work(tmp_path, mnist, monkeypatch, module):
    """As on Windows, for which array_record has no wheel."""
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # importing it is an ImportError
    monkeypatch.setattr(data, "_builder", None)
    for new, old in zip(data.load_mnist(), mnist, strict=True):
        np.testing.assert_array_equal(new.images, old.images)
        np.testing.assert_array_equal(new.labels, old.labels)
    with pytest.raises(data.DataError, match=r"fashion_mnist: .*pass a folder"):
        data.load("fashion_mnist")


@pytest.mark.parametrize("tfds", [True, False])
@pytest.mark.parametrize("fault", ["missing", "altered", "truncated"])
def test_a_damaged_file_is_no_data(tmp_path, monkeypatch, fault, tfds):
    """Whether it is shipped or in a folder of one's own; and nothing is kept."""
    if not tfds:
        monkeypatch.setitem(sys.modules, "array_record", None)
        monkeypatch.delitem(sys.modules, "array_record.python.array_record_module", raising=False)
    folder, cache = shutil.copytree(MNIST, tmp_path / "files"), tmp_path / "cache"
    monkeypatch.setenv("PRUNELIB_CACHE", str(cache))
    file = folder / "t10k-labels-idx1-ubyte.gz"
    if fault == "missing":
        file.unlink()
    elif fault == "altered":
        flip(file, 1000)
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(data.DataError, match=r"pass a folder with|its SHA-256 differs"):
        data.load("mnist", folder)
    monkeypatch.setitem(data.SHIPPED, "mnist", folder)
    with pytest.raises(data.DataError):
        data.load_mnist()
    assert not cache.exists()


def test_a_download_that_cannot_be_is_said_soon(tmp_path, monkeypatch):
    """TFDS alone tries for 205 seconds."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    start = time.monotonic()
    with pytest.raises(data.DataError, match=r"fashion_mnist: .*pass a folder"):
        data.load("fashion_mnist")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("damage", ["truncated", "altered", "other values"])
def test_a_damaged_copy_is_made_anew_with_a_warning(tmp_path, first_load, monkeypatch, damage):
    monkeypatch.setenv("PRUNELIB_CACHE", str(tmp_path))
    (kept,) = first_load[0].iterdir()
    file = Path(shutil.copy(kept, tmp_path))
    whole = store.read(file)[0]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "altered":
        flip(file, file.stat().st_size // 2)
    else:
        labels = whole["test/labels"].copy()
        labels[0] ^= 1
        np.savez(file, **{f"array/{k}": v for k, v in (whole | {"test/labels": labels}).items()},
                 settings=np.array("{}"))  # fmt: skip
    monkeypatch.setattr(data, "_prepared", lambda *args: whole)  # 20 s
    with pytest.warns(UserWarning, match="is damaged .* anew"):
        found = data.load_mnist()
    np.testing.assert_array_equal(found.test.labels, whole["test/labels"])
    data.load_mnist()  # no warning


# Scaling, and leaving out what fills up ----------------------------------------------------------


def test_scaled():
    grey = np.arange(256, dtype=np.uint8)
    for function in (data.scaled, jax.jit(data.scaled)):
        result = function(grey)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, np.arange(256) / 255, rtol=1e-7)
    for dtype in ("float16", "bfloat16", "float32"):
        images = jnp.array([[0.0, 0.5, 2.0]], dtype)
        for function in (data.scaled, jax.jit(data.scaled)):
            assert function(images).dtype == images.dtype
            assert jnp.array_equal(function(images), images)
    for bad in (np.zeros(3, np.int32), np.zeros(3, bool), np.zeros(3, complex)):
        with pytest.raises(TypeError, match="images: expected uint8"):
            data.scaled(bad)
