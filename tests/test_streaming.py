"""Chunk by chunk is the whole; and a pass that was interrupted goes on."""

import itertools
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from reference import flat

from prunelib import curvature, data, models, streaming
from prunelib.data import Examples

NETWORK = models.mlp((6, 5, 3))
PARAMS = NETWORK.init(jax.random.key(0))
NUMBERS = np.random.default_rng(97)
STREAM = Examples(
    NUMBERS.integers(0, 256, (97, 6), dtype=np.uint8), NUMBERS.integers(0, 3, 97).astype(np.int32)
)


def parts(size=10, stream=STREAM):
    return streaming.chunks(stream, size)  # ten of them


def diagonal(chunks, mesh=None, **options):
    def measure(chunk):
        chunk = chunk if mesh is None else data.place(chunk, mesh)
        return curvature.hessian_diagonal(NETWORK, PARAMS, chunk)

    return streaming.mean(measure, chunks, **options)


@pytest.fixture(scope="module")
def whole():
    return curvature.hessian_diagonal(NETWORK, PARAMS, STREAM)


def assert_close(one, two, rtol=1e-6):
    one, two = flat(one), flat(two)
    assert np.abs(one - two).max() <= rtol * np.abs(one).max() > 0


@pytest.mark.parametrize("size", [1, 10, 97, 1000])
def test_a_stream_is_the_whole(whole, size):
    assert_close(whole, diagonal(parts(size)))


@pytest.mark.parametrize("size", [10, 30])
def test_a_stream_over_eight_devices(whole, size):
    mesh = Mesh(jax.devices(), ("examples",))
    assert_close(whole, diagonal(parts(size), mesh=mesh))


def test_a_stream_draws_the_classes_that_the_whole_draws():
    """The draws go by the example's number, of which `first` is the first."""
    options = {"draws": 2, "key": jax.random.key(5), "method": "sampled"}
    found = partial(curvature.hessian_diagonal, NETWORK, PARAMS, **options)
    starts = itertools.count(0, 10)
    assert_close(found(STREAM), streaming.mean(lambda c: found(c, first=next(starts)), parts()))


def test_only_one_chunk_is_alive():
    """The generator and the pass hold no chunk that is done with."""
    references, most = [], 0

    def watched():
        nonlocal most
        for part in parts():
            images = np.array(part.images)
            references.append(weakref.ref(images))
            most = max(most, sum(reference() is not None for reference in references))
            yield Examples(images, part.labels)
            del images

    streaming.mean(lambda chunk: chunk.images.mean(0), watched())
    assert most <= 3


@pytest.mark.parametrize(
    "value",
    [
        lambda n: np.ones(n),
        lambda n: {str(n): 1.0},
        lambda n: np.ones((2, 3) if n == 40 else (3, 2)),
        lambda n: 1.0 if n == 40 else np.ones(1),
    ],
    ids=["lengths", "names", "shapes", "axes"],
)
def test_measures_of_another_shape_are_refused(value):
    with pytest.raises(ValueError, match="measure: "):
        streaming.mean(lambda chunk: value(len(chunk.labels)), parts(40))


# A pass that was interrupted ----------------------------------------------------------------------


class Interrupted(Exception):
    pass


def until(chunks, number):
    """The chunks before `number`, and then a fault."""
    yield from itertools.islice(chunks, number)
    raise Interrupted


class Counted:
    """A measure that counts how often it is asked."""

    def __init__(self, params=PARAMS):
        self.params, self.calls = params, 0

    def __call__(self, chunk):
        self.calls += 1
        return curvature.hessian_diagonal(NETWORK, self.params, chunk, batch_size=10)


@pytest.fixture
def file(tmp_path):
    """The file of a pass that got to the eighth chunk, and kept six."""
    with pytest.raises(Interrupted):
        streaming.mean(Counted(), until(parts(), 7), file=tmp_path / "sum.npz", every=3)
    return tmp_path / "sum.npz"


def test_it_goes_on_from_the_last_sum(file):
    uninterrupted, measure = streaming.mean(Counted(), parts()), Counted()
    resumed = streaming.mean(measure, parts(), file=file, every=3)
    np.testing.assert_array_equal(flat(resumed), flat(uninterrupted))
    assert measure.calls == 1 + 4  # the first chunk, to compare; then the last four
    assert not file.exists()


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_streaming import diagonal, parts
def killed():
    for number, chunk in enumerate(parts()):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
diagonal(killed(), file=sys.argv[1], every=2)
"""


def test_kill_9_and_go_on(tmp_path, whole, monkeypatch):
    file, here = tmp_path / "sum.npz", Path(__file__).parent
    command = [sys.executable, "-c", KILLED, *map(str, (file, here, here.parent))]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    asked = []
    monkeypatch.setattr(
        curvature, "hessian_diagonal",
        lambda *a, original=curvature.hessian_diagonal, **o: asked.append(1) or original(*a, **o),
    )  # fmt: skip
    found = diagonal(parts(), file=file)
    assert len(asked) == 1 + 6
    assert_close(whole, found)


FOREIGN = {
    "other parameters": (jax.tree.map(lambda w: 1.1 * w, PARAMS), STREAM),
    "other examples": (PARAMS, Examples(STREAM.images[::-1], STREAM.labels[::-1])),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_sum_is_not_used(file, what):
    """A warning, and the right answer."""
    params, stream = FOREIGN[what]
    with pytest.warns(UserWarning, match=r"sum\.npz .*starts over"):
        found = streaming.mean(Counted(params), parts(stream=stream), file=file)
    assert_close(curvature.hessian_diagonal(NETWORK, params, stream), found)


def test_a_sum_about_others_is_not_used(tmp_path):
    """Even where the first chunk cannot tell: its pixels that matter are black."""
    images, file = np.array(STREAM.images), tmp_path / "sum.npz"
    images[: len(STREAM.labels) // 2, 0] = 0
    dark, means = Examples(images, STREAM.labels), []
    for weight in (1.0, 2.0):
        measure = lambda chunk, w=weight: w * chunk.images[:, 0].mean()  # noqa: E731
        stream, options = parts(stream=dark), {"file": file, "about": {"w": np.array(weight)}}
        if weight == 1.0:
            with pytest.raises(Interrupted):
                streaming.mean(measure, until(stream, 7), every=3, **options)
        else:
            with pytest.warns(UserWarning, match="starts over"):
                means.append(streaming.mean(measure, stream, **options))
    np.testing.assert_allclose(means[0], 2 * images[:, 0].mean(), rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_sum_is_not_used(file, whole, content):
    file.write_bytes(file.read_bytes()[:-300] if content is None else content)
    with pytest.warns(UserWarning, match=r"damaged .*starts over"):
        found = streaming.mean(Counted(), parts(), file=file)
    assert_close(whole, found)


def test_another_stream_is_refused(file):
    """The first chunk is the same, a later one is not; or there are too few."""
    images = np.array(STREAM.images)
    images[35] += 1
    for stream in (Examples(images, STREAM.labels), STREAM.first(50)):
        with pytest.raises(ValueError, match=r"chunks: .*pass the same stream"):
            streaming.mean(Counted(), parts(stream=stream), file=file)


def test_a_file_that_cannot_be_written_warns(tmp_path, whole):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept"):
        found = streaming.mean(Counted(), parts(), file=tmp_path / "file" / "sum.npz", every=9)
    assert_close(whole, found)
