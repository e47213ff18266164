"""The same pass on one device, on eight, and in two processes: one answer."""

import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import flat

from prunelib import curvature, data, models, passes, pruning, retraining, taylor, training
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


def assert_close(one, two, rtol=1e-6):
    """Equal but for the order of a sum: relative to the largest entry."""
    one, two = flat(one), flat(two)
    assert np.abs(one - two).max() <= rtol * np.abs(one).max() > 0


def test_the_network_of_the_series():
    """3,003 examples: neither eight devices nor two batches divide them."""
    assert len(jax.devices()) == 8
    examples = data.load_mnist().train.first(3003)
    network = models.mlp()
    params = network.init(jax.random.key(0))
    placed = data.place(examples)
    shares = [shard.data.shape for shard in placed.images.addressable_shards]
    assert shares == [(376, 784)] * 8
    assert placed.images.dtype == np.uint8
    one, eight = (curvature.hessian_diagonal(network, params, e) for e in (examples, placed))
    assert_close(one, eight)


@pytest.mark.parametrize("method", curvature.METHODS)
def test_each_method_is_the_same(method):
    options = {"one_hot": {"chunk": 8}, "hutchinson": {"probes": 3}, "sampled": {"draws": 2}}
    examples = some(37)
    found = partial(curvature.hessian_diagonal, NETWORK, PARAMS, method=method, batch_size=10)
    one, eight = (found(e, **options.get(method, {})) for e in (examples, data.place(examples)))
    assert_close(one, eight)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight))


def test_without_layers_and_with_convolutions_it_is_the_same():
    conv = partial(nnx.Conv, 1, 2, kernel_size=(3, 3), padding="VALID")
    layers = [lambda x: x.reshape(len(x), 4, 4, 1), ("conv1", conv), models.max_pool]
    network = models.Network([*layers, models.flatten, ("dense1", partial(nnx.Linear, 2, 3))])
    params = network.init(jax.random.key(0))
    one = curvature.hessian_diagonal(network, params, some(11, 16))
    for of in (network, network.apply):
        for method in ("gauss_newton", "one_hot"):
            placed = data.place(some(11, 16))
            assert_close(one, curvature.hessian_diagonal(of, params, placed, method))


@pytest.mark.parametrize(
    ("n", "batch"), [(1, 1), (5, 3), (8, 8), (9, 1), (37, 5), (40, 7), (64, 100)]
)
def test_any_count_is_exact(n, batch):
    """No example is dropped, none is counted twice, and padding counts for nothing."""
    examples = some(n)
    placed = data.place(examples)
    assert data.count(placed) == data.count(examples) == n

    @jax.jit
    def of_all(examples):
        def batch_of(images, labels, weights):
            one_hot = jax.nn.one_hot(labels, 3)
            return weights.sum(), weights @ data.scaled(images), weights @ one_hot

        return passes.mean_over_batches(batch_of, examples, batch)

    expected = (1.0, (examples.images / 255).mean(0), np.eye(3)[examples.labels].mean(0))
    for e in (examples, placed, *([spread(examples)] if n % 8 == 0 else [])):
        for found, right in zip(of_all(e), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-7)


def test_curves_terms_and_training_are_the_same():
    examples = some(37)
    both = examples, data.place(data.place(examples))  # placed anew: the same
    scores = pruning.magnitude(PARAMS)
    kept, ones = pruning.mask(scores, percent=30), jax.tree.map(jnp.ones_like, PARAMS)
    recipe = training.Recipe(steps=2, batch=4, held_out=3)
    curves, changes, runs, rounds = [], [], [], []
    for e in both:
        curves.append(pruning.accuracy_curve(NETWORK, PARAMS, scores, e, [0, 50], batch_size=9))
        changes.append(taylor.loss_change(NETWORK, PARAMS, kept, e, ones, batch_size=9))
        runs.append(training.train(NETWORK, recipe, e, [0]))
        rounds.append(
            retraining.prune_and_retrain(NETWORK, runs[0].params, e, e, [50], recipe, seeds=[0])
        )
    np.testing.assert_array_equal(curves[0].accuracy, curves[1].accuracy)
    np.testing.assert_allclose(curves[0].loss, curves[1].loss, rtol=1e-6)
    np.testing.assert_allclose(*changes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*(flat(run.params) for run in runs), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(*(flat(found.params) for found in rounds))


def test_training_spreads_its_batches(monkeypatch):
    """A batch travels, and the sum of the gradients; the data stays where it is."""
    recipe = training.Recipe(steps=3, batch=16)
    start = jax.tree.map(lambda w: w[None], PARAMS)
    placed, keys = data.place(some(2048)), jax.random.split(jax.random.key(0), 1)
    original, lowered = jax.jit, []

    def spy(function, **options):
        compiled = original(function, **options)
        return lambda *inputs: lowered.append(compiled.lower(*inputs)) or compiled(*inputs)

    monkeypatch.setattr(jax, "jit", spy)
    training.trainer(NETWORK, recipe, start, placed)(start, keys)
    text = lowered[-1].compile().as_text()
    assert not re.search(r"u8\[(1,)?2048,6\]", text)  # never all images on one device
    assert re.search(r"u8\[(1,)?256,6\]", text)  # but its eighth
    assert re.search(r"f32\[(1,)?2,[56]\]", text)  # and of a batch, two of sixteen


def traffic(compiled):
    """What a compiled program sends between devices."""
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {k for k in kinds if re.search(rf" {k}(?:-start)?\(", compiled.as_text())}


@pytest.mark.parametrize("place", [data.place, spread], ids=["place", "device_put"])
def test_the_work_is_shared_out(place):
    """Each device computes an eighth, on its own examples; only sums travel."""
    examples = some(2048)

    def compiled(examples):
        program = jax.jit(partial(curvature.hessian_diagonal, NETWORK, batch_size=128))
        return program.lower(PARAMS, examples).compile()

    one, eight = compiled(examples), compiled(place(examples))
    assert traffic(one) == set()
    assert traffic(eight) == {"all-reduce"}
    assert eight.cost_analysis()["flops"] < one.cost_analysis()["flops"] / 6
    # The batch that stands in the program of a device is 16 of 128 examples: never a whole one.
    assert re.search(r"(u8|f32)\[16,6\]", eight.as_text())
    assert not re.search(r"(u8|f32)\[(128|2048),6\]", eight.as_text())
    # What is looked for is there when examples do travel.
    mixed = jax.jit(lambda x: jax.lax.sort(x, dimension=0)).lower(spread(some(64)).images)
    assert traffic(mixed.compile()) - {"all-reduce"}


PROCESS = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
number, address, folder = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, num_processes=2, process_id=number)
from prunelib import curvature, data, models, pruning, training
with np.load(f"{folder}/problem.npz") as problem:
    examples = data.Examples(problem["images"], problem["labels"])
    params = {"dense1": {kind: problem[kind] for kind in ("kernel", "bias")}}
placed = data.place(examples)
assert len(jax.devices()) == 4 and not placed.images.is_fully_addressable
network = models.mlp((6, 3))
diagonal = curvature.hessian_diagonal(network, params, placed)["dense1"]
np.savez(f"{folder}/diagonal{number}.npz", **{k: np.asarray(v) for k, v in diagonal.items()})
runs = training.train(network, training.Recipe(steps=5, batch=4), placed, [0])
np.savez(f"{folder}/trained{number}.npz", **jax.device_get(runs.select(0)["dense1"]))
print(*pruning.evaluate(network, params, placed))
back = data.collected(placed)
assert (back.images == examples.images).all() and (back.labels == examples.labels).all()
"""


def test_two_processes(tmp_path):
    """Joined by jax.distributed on this machine's loopback, each with half of the examples."""
    network, examples = models.mlp((6, 3)), some(21)
    params = network.init(jax.random.key(0))
    np.savez(tmp_path / "problem.npz", images=examples.images, labels=examples.labels,
             **params["dense1"])  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROCESS, str(i), address, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},  # XLA's flags too: the same bits
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    one = curvature.hessian_diagonal(network, params, examples)["dense1"]
    measure = pruning.evaluate(network, params, examples)
    runs = training.train(network, training.Recipe(steps=5, batch=4), examples, [0])
    for number in range(2):
        with np.load(tmp_path / f"trained{number}.npz") as found:
            assert_close(runs.select(0)["dense1"], dict(found), 1e-5)
        with np.load(tmp_path / f"diagonal{number}.npz") as found:
            assert_close(one, dict(found))
        last = said[number].splitlines()[-1].split()
        assert tuple(map(float, last)) == pytest.approx(measure, rel=1e-6)
