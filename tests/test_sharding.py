"""The same pass on one device, on eight, in two processes, and chunk by chunk: one answer."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prunelib import curvature, data, models, passes, pruning, streaming, taylor, training
from prunelib.data import Examples

ROOT = Path(data.__file__).resolve().parents[1]
NETWORK = models.mlp((6, 5, 3))
PARAMS = NETWORK.init(jax.random.key(0))


def some(n, pixels=6, classes=3):
    """Any examples: uint8, as MNIST."""
    numbers = np.random.default_rng(n)
    labels = numbers.integers(0, classes, n).astype(np.int32)
    return Examples(numbers.integers(0, 256, (n, pixels), dtype=np.uint8), labels)


def spread(examples):
    """As `data.place`, but by JAX alone: the number of examples must be a multiple of eight."""
    mesh = Mesh(jax.devices(), ("examples",))
    return jax.device_put(examples, NamedSharding(mesh, PartitionSpec("examples")))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def assert_close(one, two, rtol=1e-6):
    """Equal but for the order of a sum: relative to the largest entry."""
    one, two = flat(one), flat(two)
    assert np.abs(one - two).max() <= rtol * np.abs(one).max() > 0


# Eight devices ------------------------------------------------------------------------------------


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


def test_the_network_of_the_series():
    """3,003 examples: neither eight devices nor two batches divide them."""
    examples = Examples(*(array[:3003] for array in data.load_mnist().train))
    network = models.mlp()
    params = network.init(jax.random.key(0))
    placed = data.place(examples)
    shares = [shard.data.shape for shard in placed.images.addressable_shards]
    assert shares == [(376, 784)] * 8
    assert placed.images.dtype == np.uint8
    one = curvature.hessian_diagonal(network, params, examples)
    assert_close(one, curvature.hessian_diagonal(network, params, placed))


@pytest.mark.parametrize(
    ("method", "options"),
    [("gauss_newton", {}), ("neuron", {}), ("lecun1990", {}), ("one_hot", {"chunk": 8}),
     ("hutchinson", {"probes": 3}), ("sampled", {"draws": 2})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_each_method_is_the_same(method, options):
    examples = some(37)
    one, eight = (
        curvature.hessian_diagonal(NETWORK, PARAMS, e, method, batch_size=10, **options)
        for e in (examples, data.place(examples))
    )
    assert_close(one, eight)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight))


@pytest.mark.parametrize(
    ("n", "batch"), [(1, 1), (5, 3), (8, 8), (9, 1), (37, 5), (40, 7), (64, 100)]
)
def test_any_count_is_exact(n, batch):
    """No example is dropped, none is counted twice, and padding counts for nothing."""
    examples = some(n)
    placed = data.place(examples)
    assert passes.count(placed) == passes.count(examples) == n

    @jax.jit
    def of_all(examples):
        def batch_of(images, labels, weights):
            one_hot = jax.nn.one_hot(labels, 3)
            return weights.sum(), weights @ data.scaled(images), weights @ one_hot

        return passes.mean_over_batches(batch_of, examples, batch)

    expected = (1.0, (examples.images / 255).mean(0), np.eye(3)[examples.labels].mean(0))
    for e in (examples, placed, spread(examples) if n % 8 == 0 else placed):
        for found, right in zip(of_all(e), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-7)


def test_convolutions_are_the_same():
    network = models.Network(
        [
            lambda x: x.reshape(len(x), 4, 4, 1),
            ("conv1", partial(nnx.Conv, 1, 2, kernel_size=(3, 3), padding="VALID")),
            models.max_pool,
            models.flatten,
            ("dense1", partial(nnx.Linear, 2, 3)),
        ]
    )
    params = network.init(jax.random.key(0))
    examples = some(11, 16)
    diagonals = [
        curvature.hessian_diagonal(network, params, e) for e in (examples, data.place(examples))
    ]
    assert_close(*diagonals)


def test_a_mesh_of_two_axes():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    examples = some(37)
    placed = data.place(examples, mesh)
    assert placed.images.sharding.shard_shape(placed.images.shape) == (5, 6)
    one, eight = (curvature.hessian_diagonal(NETWORK, PARAMS, e) for e in (examples, placed))
    assert_close(one, eight)


def test_curves_and_terms_are_the_same():
    examples = some(37)
    scores = pruning.magnitude(PARAMS)
    kept = pruning.mask(scores, percent=30)
    both = examples, data.place(data.place(examples))  # placed anew: the same
    one, eight = (
        pruning.accuracy_curve(NETWORK, PARAMS, scores, e, [0, 50], batch_size=9) for e in both
    )
    np.testing.assert_array_equal(one.accuracy, eight.accuracy)
    np.testing.assert_allclose(one.loss, eight.loss, rtol=1e-6)
    diagonal = jax.tree.map(jnp.ones_like, PARAMS)
    one, eight = (
        taylor.loss_change(NETWORK, PARAMS, kept, e, diagonal, batch_size=9) for e in both
    )
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)


def test_training_is_the_same_to_the_last_bit():
    recipe = training.Recipe("short", steps=2, batch=4, held_out=3)
    examples = some(37)
    one, eight = (
        training.train(NETWORK, recipe, e, [0], fresh=True)
        for e in (examples, data.place(examples))
    )
    np.testing.assert_array_equal(flat(one.params), flat(eight.params))
    key = training.run_key(NETWORK, recipe, examples, [0])
    assert training.run_key(NETWORK, recipe, data.place(examples), [0]) == key
    kept = data.collected(data.place(examples))
    np.testing.assert_array_equal(kept.images, examples.images)
    np.testing.assert_array_equal(kept.labels, examples.labels)


def traffic(compiled):
    """What a compiled program sends between devices: kind -> how many times it stands there."""
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    text = compiled.as_text()
    found = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}
    return {kind: times for kind, times in found.items() if times}


@pytest.mark.parametrize("place", [data.place, spread], ids=["place", "device_put"])
def test_the_work_is_shared_out(place):
    """Each device computes an eighth, on its own examples; only sums travel."""
    examples = some(2048)

    def compiled(examples):
        program = jax.jit(partial(curvature.hessian_diagonal, NETWORK, batch_size=128))
        return program.lower(PARAMS, examples).compile()

    one, eight = compiled(examples), compiled(place(examples))
    assert traffic(one) == {}
    assert set(traffic(eight)) == {"all-reduce"}
    assert eight.cost_analysis()["flops"] < one.cost_analysis()["flops"] / 6
    # The batch that stands in the program of a device is 16 of 128 examples: never a whole one.
    assert "u8[16,6]" in eight.as_text() or "f32[16,6]" in eight.as_text()
    assert not re.search(r"(u8|f32)\[(128|2048),6\]", eight.as_text())


def test_gathering_would_be_noticed():
    """What `test_the_work_is_shared_out` looks for is there when examples do travel."""
    mixed = jax.jit(lambda x: jax.lax.sort(x, dimension=0))
    assert traffic(mixed.lower(spread(some(64)).images).compile())


def test_what_cannot_be_placed_is_refused():
    explicit = jax.make_mesh((8,), ("examples",))
    assert explicit.axis_types == (jax.sharding.AxisType.Explicit,)
    with pytest.raises(ValueError, match=r"mesh: expected axes of the type Auto.*not by jax.make_"):
        data.place(some(8), explicit)
    examples = jax.device_put(some(8), NamedSharding(explicit, PartitionSpec("examples")))
    with pytest.raises(ValueError, match="examples: their mesh: expected axes of the type Auto"):
        curvature.hessian_diagonal(NETWORK, PARAMS, examples)
    placed = data.place(some(5))
    with pytest.raises(ValueError, match=r"examples.real: expected a boolean for each label"):
        curvature.hessian_diagonal(NETWORK, PARAMS, placed._replace(real=placed.labels))


# Two processes ------------------------------------------------------------------------------------

PROCESS = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
number, address, folder = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, num_processes=2, process_id=number)
from prunelib import curvature, data, models
with np.load(f"{folder}/problem.npz") as problem:
    examples = data.Examples(problem["images"], problem["labels"])
    params = {"dense1": {kind: problem[kind] for kind in ("kernel", "bias")}}
placed = data.place(examples)
assert len(jax.devices()) == 4 and not placed.images.is_fully_addressable
diagonal = curvature.hessian_diagonal(models.mlp((6, 3)), params, placed)["dense1"]
np.savez(f"{folder}/diagonal{number}.npz", **{k: np.asarray(v) for k, v in diagonal.items()})
"""


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # XLA's flags too: the same bits
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes(tmp_path):
    """Joined by jax.distributed on this machine's loopback, each with half of the examples."""
    network, examples = models.mlp((6, 3)), some(21)
    params = network.init(jax.random.key(0))
    np.savez(tmp_path / "problem.npz", **examples._asdict(), **params["dense1"])
    (tmp_path / "process.py").write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [python(tmp_path / "process.py", i, address, tmp_path) for i in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    one = curvature.hessian_diagonal(network, params, examples)["dense1"]
    for number in range(2):
        with np.load(tmp_path / f"diagonal{number}.npz") as found:
            assert_close(one, dict(found))


# Chunk by chunk -----------------------------------------------------------------------------------

STREAM = some(97)
WHOLE = curvature.hessian_diagonal(NETWORK, PARAMS, STREAM)


@pytest.mark.parametrize("size", [1, 10, 97, 1000])
def test_a_stream_is_the_whole(size):
    assert_close(WHOLE, streaming.hessian_diagonal(NETWORK, PARAMS, streaming.chunks(STREAM, size)))


def test_a_stream_over_eight_devices():
    mesh = Mesh(jax.devices(), ("examples",))
    parts = streaming.chunks(STREAM, 30)
    assert_close(WHOLE, streaming.hessian_diagonal(NETWORK, PARAMS, parts, mesh=mesh))


def test_a_stream_draws_the_classes_that_the_whole_draws(tmp_path):
    """Also if it was interrupted: the draws go by the example's number."""
    options = {"draws": 2, "key": jax.random.key(5)}
    whole = curvature.hessian_diagonal(NETWORK, PARAMS, STREAM, "sampled", **options)
    for size in (1, 10, 1000):
        parts = streaming.chunks(STREAM, size)
        found = streaming.hessian_diagonal(NETWORK, PARAMS, parts, "sampled", **options)
        assert_close(whole, found)

    def broken(chunks):
        yield from itertools.islice(chunks, 5)
        raise KeyboardInterrupt

    stream = partial(streaming.hessian_diagonal, NETWORK, PARAMS, method="sampled", **options)
    with pytest.raises(KeyboardInterrupt):
        stream(chunks=broken(streaming.chunks(STREAM, 10)), folder=tmp_path, every=2)
    assert_close(whole, stream(chunks=streaming.chunks(STREAM, 10), folder=tmp_path))


def test_chunks_of_one_length_compile_once():
    curvature._gauss_newton_layers.clear_cache()
    streaming.hessian_diagonal(NETWORK, PARAMS, streaming.chunks(STREAM, 20))
    assert curvature._gauss_newton_layers._cache_size() == 1


def test_accuracy_of_a_stream():
    accuracy, loss = streaming.mean(
        lambda chunk: pruning.evaluate(NETWORK, PARAMS, chunk), streaming.chunks(STREAM, 40)
    )
    np.testing.assert_allclose(
        (accuracy, loss), pruning.evaluate(NETWORK, PARAMS, STREAM), rtol=1e-6
    )


def test_a_tfds_data_source():
    class Source:
        """What TFDS gives for MNIST: pictures and labels, by index, one or several."""

        def __len__(self):
            return len(STREAM.labels)

        def __getitem__(self, i):
            image = STREAM.images[i].reshape(2, 3, 1)
            return {"image": image, "label": int(STREAM.labels[i])}

    class Several(Source):
        def __getitems__(self, places):
            return [self[i] for i in places]

    for source in (Source(), Several()):
        parts = list(streaming.chunks(source, 40))
        assert [len(part.labels) for part in parts] == [40, 40, 17]
        np.testing.assert_array_equal(np.concatenate([p.images for p in parts]), STREAM.images)
        np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), STREAM.labels)


def test_only_one_chunk_is_alive():
    """The generator and the pass hold no chunk that is done with."""
    references, most = [], 0

    def parts():
        nonlocal most
        for part in streaming.chunks(STREAM, 10):
            images = np.array(part.images)
            references.append(weakref.ref(images))
            most = max(most, sum(reference() is not None for reference in references))
            yield Examples(images, part.labels)
            del images

    streaming.mean(lambda chunk: chunk.images.mean(0), parts())
    assert most <= 3


# A pass that was interrupted ----------------------------------------------------------------------


class Interrupted(Exception):
    pass


def until(chunks, number):
    """The chunks before `number`, and then a fault."""
    for place, chunk in enumerate(chunks):
        if place == number:
            raise Interrupted
        yield chunk


class Counted:
    """A measure that counts how often it is asked."""

    def __init__(self, params=PARAMS):
        self.params, self.calls = params, 0

    def __call__(self, chunk):
        self.calls += 1
        return curvature.hessian_diagonal(NETWORK, self.params, chunk, batch_size=10)


def parts():
    return streaming.chunks(STREAM, 10)  # ten of them


@pytest.fixture
def partial_sum(tmp_path):
    """The folder of a pass that got to the eighth chunk, and kept six."""
    folder = tmp_path / "sum"
    with pytest.raises(Interrupted):
        streaming.mean(Counted(), until(parts(), 7), folder=folder, key={"a": 1}, every=3)
    assert [place.name for place in folder.iterdir()] == ["000000006"]
    return folder


def test_it_goes_on_from_the_last_sum(partial_sum):
    uninterrupted = streaming.mean(Counted(), parts())
    measure = Counted()
    resumed = streaming.mean(measure, parts(), folder=partial_sum, key={"a": 1}, every=3)
    np.testing.assert_array_equal(flat(resumed), flat(uninterrupted))
    assert measure.calls == 1 + 4  # the first chunk, to compare; then the last four
    assert not partial_sum.exists()


KILLED = """
import os, signal, sys
from test_sharding import NETWORK, PARAMS, parts
from prunelib import streaming
def killed():
    for number, chunk in enumerate(parts()):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
streaming.hessian_diagonal(NETWORK, PARAMS, killed(), folder=sys.argv[1], every=2)
"""


def test_kill_9_and_go_on(tmp_path, monkeypatch):
    program, folder = tmp_path / "killed.py", tmp_path / "sum"
    path = [str(ROOT), str(Path(__file__).parent)]
    program.write_text(f"import sys\nsys.path[:0] = {path}\n" + KILLED)
    process = python(program, folder)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == -signal.SIGKILL, said
    assert (folder / "000000004").is_dir()
    asked = []
    monkeypatch.setattr(
        curvature,
        "hessian_diagonal",
        lambda *args, original=curvature.hessian_diagonal: asked.append(1) or original(*args),
    )
    found = streaming.hessian_diagonal(NETWORK, PARAMS, parts(), folder=folder)
    assert len(asked) == 1 + 6
    assert_close(WHOLE, found)


def test_a_foreign_sum_is_not_used(partial_sum, tmp_path):
    """Another key, other parameters, other first examples: a warning, and the right answer."""
    other = jax.tree.map(lambda w: 1.1 * w, PARAMS)
    shuffled = Examples(STREAM.images[::-1], STREAM.labels[::-1])
    for params, key, examples, says in (
        (PARAMS, {"a": 2}, STREAM, "another key"),
        (other, {"a": 1}, STREAM, "another measure"),
        (PARAMS, {"a": 1}, shuffled, "other examples"),
    ):
        folder = shutil.copytree(partial_sum, tmp_path / says)
        chunks = streaming.chunks(examples, 10)
        with pytest.warns(UserWarning, match=f"is not used.*{says}.*starts over"):
            found = streaming.mean(Counted(params), chunks, folder=folder, key=key)
        expected = curvature.hessian_diagonal(NETWORK, params, examples)
        assert_close(expected, found)


def test_a_key_with_a_tuple_is_found_again(tmp_path):
    """JSON reads it back as a list."""
    counted, key = Counted(), {"a": (1, 2)}
    with pytest.raises(Interrupted):
        streaming.mean(counted, until(parts(), 3), folder=tmp_path / "sum", key=key, every=1)
    before = counted.calls
    found = streaming.mean(counted, parts(), folder=tmp_path / "sum", key=key)
    assert_close(WHOLE, found)
    assert counted.calls < before + len(list(parts()))


def test_the_parameters_are_in_the_key(tmp_path):
    """Also those that the first chunk does not show: the weights of a pixel that is black there."""
    images = np.array(STREAM.images)
    images[:10, 0] = 0
    stream = Examples(images, STREAM.labels)
    kernel = PARAMS["dense1"]["kernel"]
    pruned = PARAMS | {"dense1": PARAMS["dense1"] | {"kernel": kernel.at[0].set(0)}}
    chunks = until(streaming.chunks(stream, 10), 3)
    with pytest.raises(Interrupted):
        streaming.hessian_diagonal(NETWORK, PARAMS, chunks, folder=tmp_path / "sum", every=2)
    with pytest.warns(UserWarning, match="other parameters"):
        found = streaming.hessian_diagonal(
            NETWORK, pruned, streaming.chunks(stream, 10), folder=tmp_path / "sum"
        )
    assert_close(curvature.hessian_diagonal(NETWORK, pruned, stream), found)


def per_class(weight):
    """A loss that agrees with others where there is no example of class 1."""
    return lambda z, y: passes.cross_entropy(z, y) * jnp.where(y == 1, weight, 1.0)


def test_the_options_are_in_the_key(tmp_path):
    """Those that words tell; others are refused, for the first chunk may not show them."""
    images = STREAM.images[np.argsort(STREAM.labels)]
    stream = Examples(images, np.sort(STREAM.labels))
    several = partial(streaming.hessian_diagonal, NETWORK, PARAMS, folder=tmp_path / "sum")
    options = dict(method="sampled", key=jax.random.key(0), draws=1)
    with pytest.raises(Interrupted):
        several(until(streaming.chunks(stream, 10), 3), **options, every=1)
    for other in ({"key": jax.random.key(1)}, {"draws": 2}):
        copied = shutil.copytree(tmp_path / "sum", tmp_path / "copied", dirs_exist_ok=True)
        with pytest.warns(UserWarning, match="another method, or other options"):
            several(streaming.chunks(stream, 10), **options | other, folder=copied)
    with pytest.raises(
        ValueError, match=r"loss: .*words do not tell this function.*pass no folder"
    ):
        several(streaming.chunks(stream, 10), loss=per_class(5.0))
    found = several(streaming.chunks(stream, 50), loss=per_class(5.0), folder=None)
    assert_close(curvature.hessian_diagonal(NETWORK, PARAMS, stream, loss=per_class(5.0)), found)


@pytest.mark.parametrize("fault", ["truncated", "no arrays", "altered", "an empty folder"])
def test_a_damaged_sum_is_not_used(partial_sum, fault):
    (newest,) = partial_sum.iterdir()
    record = newest / "run.json"
    if fault == "truncated":
        record.write_text(record.read_text()[:40])
    elif fault == "no arrays":
        shutil.rmtree(newest / "arrays")
    elif fault == "altered":
        record.write_text(record.read_text().replace('"content": "', '"content": "0'))
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    with pytest.warns(UserWarning, match="is not used: it is damaged.*starts over"):
        found = streaming.mean(Counted(), parts(), folder=partial_sum, key={"a": 1})
    assert_close(WHOLE, found)


def test_another_stream_is_refused(partial_sum):
    """The first chunk is the same, a later one is not; or there are too few."""
    images = np.array(STREAM.images)
    images[35] += 1
    for examples in (Examples(images, STREAM.labels), Examples(*(x[:50] for x in STREAM))):
        chunks = streaming.chunks(examples, 10)
        with pytest.raises(ValueError, match="60 examples in 6 chunks, and these are others"):
            streaming.mean(Counted(), chunks, folder=partial_sum, key={"a": 1})


def test_what_is_not_ours_stays(partial_sum):
    (partial_sum / "thesis.txt").write_text("years of work")
    streaming.mean(Counted(), parts(), folder=partial_sum, key={"a": 1}, every=2)
    assert [file.name for file in partial_sum.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept"):
        found = streaming.mean(Counted(), parts(), folder=tmp_path / "file" / "sum", every=9)
    assert_close(WHOLE, found)


def test_bad_streams_are_refused():
    with pytest.raises(ValueError, match=r"chunks: there are none"):
        streaming.mean(Counted(), [])
    with pytest.raises(TypeError, match=r"examples: expected Examples.*got int"):
        streaming.mean(Counted(), [3])
    with pytest.raises(ValueError, match="method: 'newton' is unknown"):
        streaming.hessian_diagonal(NETWORK, PARAMS, parts(), "newton")
    with pytest.raises(FloatingPointError, match="NaN"):
        streaming.hessian_diagonal(NETWORK, jax.tree.map(lambda w: w * jnp.nan, PARAMS), parts())


@pytest.mark.parametrize(
    ("labels", "says"),
    [([0.9, 1.7], "got float64"), ([True, False], "got bool"), (["1", "0"], "got <U1"),
     ([2**32 + 1, 1], "found 1 to 4294967297")],
)  # fmt: skip
def test_labels_of_a_source_are_not_cast(labels, says):
    source = [{"image": np.zeros(3), "label": label} for label in labels]
    with pytest.raises((TypeError, ValueError), match=f"labels: .*{says}"):
        list(streaming.chunks(source, 2))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda n: np.ones(n), r"chunk 3: expected the shapes .*\(40,\), got \(17,\)"),
        (lambda n: {str(n): 1.0}, "chunk 3: expected the shapes .*'40'.*got {'17'"),
        (lambda n: 1.0 if n == 40 else np.ones(1), r"chunk 3: .*\(\), got \(1,\)"),
        (lambda n: None, "chunk 1: expected arrays or numbers, got None"),
        (lambda n: {"a": "word"}, r"chunk 1\['a'\]: expected real numbers"),
        (lambda n: 1j, "chunk 1: expected real numbers, got complex"),
        (lambda n: jnp.ones(2) * 1j, "chunk 1: expected real numbers, got complex64"),
    ],
)
def test_measures_that_have_no_mean_are_refused(value, says):
    with pytest.raises((TypeError, ValueError), match=f"measure: its value for {says}"):
        streaming.mean(lambda chunk: value(len(chunk.labels)), streaming.chunks(STREAM, 40))


def test_a_stream_leaves_out_what_fills_up():
    some = Examples(*(array[:50] for array in STREAM))
    found = streaming.hessian_diagonal(NETWORK, PARAMS, streaming.chunks(data.filled(some, 80), 20))
    assert_close(curvature.hessian_diagonal(NETWORK, PARAMS, some), found)


def test_the_mean_of_whole_numbers_is_none_and_nan_is_refused():
    chunks = [Examples(STREAM.images[i : i + 1], STREAM.labels[i : i + 1]) for i in range(10)]
    found = streaming.mean(lambda chunk: int(chunk.labels[0]), chunks)
    assert float(found) == pytest.approx(np.mean(STREAM.labels[:10]))
    with pytest.raises(FloatingPointError, match="the mean"):
        streaming.mean(lambda chunk: np.float32("nan"), chunks)


def test_a_number_goes_on_too(tmp_path):
    def measure(chunk):
        return chunk.labels.mean()

    with pytest.raises(Interrupted):
        streaming.mean(measure, until(parts(), 5), folder=tmp_path / "sum", every=2)
    found = streaming.mean(measure, parts(), folder=tmp_path / "sum")
    assert float(found) == pytest.approx(np.mean(STREAM.labels))


def test_a_stream_in_fewer_chunks_is_refused(tmp_path):
    """The same examples and the same first share, but the chunk the sum goes up to never comes."""
    labels = np.where(np.arange(len(STREAM.labels)) < 30, 0, 1)
    same, folder = Examples(STREAM.images, labels), tmp_path / "sum"

    def measure(chunk):
        return {"x": np.array([chunk.labels.mean()])}

    chunks = until(streaming.chunks(same, 10), 9)
    with pytest.raises(Interrupted):
        streaming.mean(measure, chunks, folder=folder, every=8)
    with pytest.raises(ValueError, match="and these are others"):
        streaming.mean(measure, streaming.chunks(same, 20), folder=folder)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_images_count_alike(dtype):
    images = np.tile(np.asarray(STREAM.images[:10] / 255, dtype), (7000, 1))
    labels = np.tile(STREAM.labels[:10], 7000)
    half, single = (Examples(jnp.asarray(images, d), labels) for d in (dtype, jnp.float32))
    losses = [pruning.evaluate(NETWORK, PARAMS, e)[1] for e in (half, data.filled(half, 70_001))]
    assert losses == pytest.approx([pruning.evaluate(NETWORK, PARAMS, single)[1]] * 2, rel=2e-2)
