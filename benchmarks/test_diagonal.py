"""The diagonal of the Hessian: prunelib beside BackPACK, curvlinops and matfree.

    make bench

Everything runs side by side, in one process, on the same weights and examples, in float32, and on
one core: else it is the libraries' threads, and what else the machine does, that decide. Errors are
against `exact` in float64, relative to the largest entry. A time is the median of up to ten.
A ratio is the median over pairs: before every run of a candidate, `exact` runs once, so that
whatever else the machine does slows both. (For ReLU `exact` *is* `gauss_newton`.) Memory is what
XLA sets aside for a pass, beyond the data and the result. The table is benchmarks/diagonal.csv.

Six networks, so that nothing is tuned to one shape: the study's, a wide one, one with a hundred
classes (a digit, and which tenth of the images it is in by brightness), the first two with tanh,
and LeNet-5. Slow ones get fewer images; `exact` goes over all of LeNet-5's once.

Not here: kfac-jax 0.0.8, whose `ggn_exact` is the nearest rival, does not import beside JAX 0.12
(it needs names that `jax.core` has dropped, and TensorFlow Probability, which does too); the exact
`GGNDiagonalLinearOperator` of curvlinops is in its repository, but in no release up to 3.0.1.
"""

import csv
import functools
import os
import platform
import time
from pathlib import Path

if hasattr(os, "sched_setaffinity"):  # Linux; before anything starts its threads
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact, DiagHessian
from curvlinops import HessianLinearOperator, hutchinson_diag, xdiag
from jax.flatten_util import ravel_pytree
from matfree import stochtrace

from prunelib import curvature, data, models, passes, training

torch.set_num_threads(1)
TABLE = Path(__file__).with_name("diagonal.csv")
PROBES = 16
SHORT = training.Recipe(steps=300)  # any weights will do, but not the first ones
STUDY, WIDE = (784, 50, 50, 50, 50, 10), (784, 1000, 1000, 10)
NETWORKS = {  # the network, PyTorch's activation, how many examples
    "study": (models.mlp(STUDY), torch.nn.ReLU, 60_000),
    "wide": (models.mlp(WIDE), torch.nn.ReLU, 2_000),
    "100 classes": (models.mlp((*STUDY[:-1], 100)), torch.nn.ReLU, 6_000),
    "study, tanh": (models.mlp(STUDY, jnp.tanh), torch.nn.Tanh, 60_000),
    "wide, tanh": (models.mlp(WIDE, jnp.tanh), torch.nn.Tanh, 200),
    "LeNet-5": (models.lenet5(), torch.nn.ReLU, 500),
}
rows = []


class Problem:
    """One network with its weights and examples, for JAX and for PyTorch."""

    def __init__(self, name):
        self.name = name
        self.network, self.activation, self.count = NETWORKS[name]
        train = data.load_mnist().train
        labels = train.labels
        if name == "100 classes":
            brightness = train.images.mean(1).argsort().argsort() * 10 // len(labels)
            labels = (10 * labels + brightness).astype(np.int32)
        every = data.Examples(train.images, labels)
        self.params = training.train(self.network, SHORT, every, [0]).select(0)
        self.every = every
        examples = every.first(self.count)
        self.examples = jax.device_put(examples)
        with jax.enable_x64(True):
            exact = curvature.hessian_diagonal(
                self.network,
                jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), self.params),
                data.Examples(np.asarray(examples.images, np.float64) / 255, examples.labels),
                batch_size=100,
            )
            self.exact = np.asarray(ravel_pytree(exact)[0])
        images = torch.tensor(examples.images).float() / 255
        if name == "LeNet-5":
            images = images.reshape(-1, 1, 28, 28)
        self.torch_data = images, torch.tensor(examples.labels).long()

    def torch_network(self):
        """The same network; the loss is a sum over the batch, so batches add up."""
        layers = []
        for layer in self.params.values():
            kernel = np.asarray(layer["kernel"])
            if kernel.ndim == 4:
                module = torch.nn.Conv2d(*kernel.shape[2:], kernel.shape[0])
                after = [torch.nn.MaxPool2d(2)]
            else:
                module, after = torch.nn.Linear(*kernel.shape), [self.activation()]
            if kernel.shape[0] == 800:
                layers.append(torch.nn.Flatten())
            with torch.no_grad():
                module.weight.copy_(torch.tensor(to_torch(kernel)))
                module.bias.copy_(torch.tensor(np.asarray(layer["bias"])))
            layers += [module, *after]
        return torch.nn.Sequential(*layers[:-1]), torch.nn.CrossEntropyLoss(reduction="sum")

    def flat(self, weights, biases):
        """PyTorch's arrays in the order of JAX's flat vector."""
        tree = {
            name: {"kernel": from_torch(np.asarray(w)), "bias": np.asarray(b)}
            for name, w, b in zip(self.params, weights, biases, strict=True)
        }
        return ravel_pytree(tree)[0]

    def least_flop(self):
        """Per example: forward; back to each hidden layer, per class; one product for the sums."""
        sizes = [layer["kernel"].size for layer in self.network.shapes.values()]
        classes = self.network.shapes[list(self.network.shapes)[-1]]["bias"].size
        return 2 * (2 * sum(sizes) + classes * sum(sizes[1:]))

    def memory(self):
        """Bytes for a pass, beyond its inputs and outputs."""

        def diagonal(params, examples):
            return curvature.hessian_diagonal(self.network, params, examples, "exact")

        compiled = jax.jit(diagonal).lower(self.params, self.examples).compile()
        return compiled.memory_analysis().temp_size_in_bytes


def to_torch(kernel):
    """Outputs first; and channels before places, also where a picture has been flattened."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    if len(kernel) == 800:
        kernel = kernel.reshape(4, 4, 50, -1).transpose(2, 0, 1, 3).reshape(800, -1)
    return kernel.T


def from_torch(weight):
    """The way back."""
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    if weight.shape[1] == 800:
        return weight.T.reshape(50, 4, 4, -1).transpose(1, 2, 0, 3).reshape(800, -1)
    return weight.T


@functools.cache
def problem(name):
    return Problem(name)


# The candidates: problem -> a function without arguments that gives the flat diagonal


def prunelib(method, **options):
    def prepare(p):
        return lambda: ravel_pytree(
            curvature.hessian_diagonal(p.network, p.params, p.examples, method, **options)
        )[0].block_until_ready()

    return prepare


def backpack_diagonal(extension, attribute):
    def prepare(p):
        network, loss = map(extend, p.torch_network())
        linear = [m for m in network if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        # What a batch holds grows with its classes and widths.
        biases = [layer["bias"].size for layer in p.network.shapes.values()]
        widest = 2500 if p.name == "LeNet-5" else max(biases)
        size = max(50, min(2500, 2500 * 10 * 50 // (biases[-1] * widest)))

        def run():
            total = [0] * (2 * len(linear))
            for images, labels in zip(*(x.split(size) for x in p.torch_data), strict=True):
                network.zero_grad()
                with backpack(extension()):
                    loss(network(images), labels).backward()
                for i, module in enumerate(linear):
                    total[2 * i] += getattr(module.weight, attribute)
                    total[2 * i + 1] += getattr(module.bias, attribute)
            weights = [(t / p.count).detach().numpy() for t in total[0::2]]
            biases = [(t / p.count).detach().numpy() for t in total[1::2]]
            return p.flat(weights, biases)

        return run

    return prepare


def curvlinops(estimate):
    return lambda p: curvlinops_estimate(p, estimate)


def curvlinops_estimate(p, estimate):
    network, _ = p.torch_network()
    batches = list(zip(*(x.split(2500) for x in p.torch_data), strict=True))
    operator = HessianLinearOperator(
        network,
        torch.nn.CrossEntropyLoss(reduction="mean"),
        list(network.parameters()),
        batches,
        check_deterministic=False,
        num_data=p.count,
    )

    def run():
        torch.manual_seed(0)
        parts = estimate(operator, PROBES).detach()
        arrays, start = [], 0
        for array in network.parameters():
            arrays.append(parts[start : start + array.numel()].reshape(array.shape).numpy())
            start += array.numel()
        return p.flat(arrays[0::2], arrays[1::2])

    return run


def matfree_monte_carlo(p):
    flat, unravel = ravel_pytree(p.params)

    def product(vector, examples):
        def batch(images, labels, weights):
            def loss(w):
                logits = p.network.apply(unravel(w), data.scaled(images))
                return weights @ passes.cross_entropy(logits, labels)

            return curvature.hvp(loss, flat, vector)

        return passes.mean_over_batches(batch, examples, 1000)

    # One probe at a time: all at once would hold every activation of each.
    sampler = stochtrace.sampler_signs(flat, num=1)
    one = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_diagonal(), sampler)

    @jax.jit
    def estimate(key, examples):
        keys = jax.random.split(key, PROBES)
        return jax.lax.map(lambda k: one(product, k, examples), keys).mean(0)

    return lambda: estimate(jax.random.key(0), p.examples).block_until_ready()


CANDIDATES = {
    ("prunelib", "exact"): prunelib("exact"),
    ("prunelib", "gauss_newton"): prunelib("gauss_newton"),
    ("prunelib", f"hutchinson, {PROBES} products"): prunelib("hutchinson", probes=PROBES),
    ("BackPACK", "DiagGGNExact"): backpack_diagonal(DiagGGNExact, "diag_ggn_exact"),
    ("BackPACK", "DiagHessian"): backpack_diagonal(DiagHessian, "diag_h"),
    ("curvlinops", f"hutchinson_diag, {PROBES} products"): curvlinops(hutchinson_diag),
    ("curvlinops", f"xdiag, {PROBES} products"): curvlinops(xdiag),
    ("matfree", f"monte_carlo_diagonal, {PROBES} products"): matfree_monte_carlo,
}
GAUSS_NEWTON = ("gauss_newton", "DiagGGNExact")
EXACT = ("exact", "DiagHessian")  # and the others, where nothing bends


def test_matrix_product_peak(benchmark):
    """What the machine can do at most: the unit in which gauss_newton is measured."""
    square = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    benchmark.pedantic(
        lambda: product(square, square).block_until_ready(), rounds=30, warmup_rounds=2
    )
    peak = 2 * 2048**3 / benchmark.stats.stats.min
    benchmark.extra_info["GFLOP/s"] = round(peak / 1e9)
    rows.append({"network": "", "library": "jax", "method": "matrix product", "peak": peak})


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("candidate", CANDIDATES, ids=" ".join)
def test_diagonal(benchmark, name, candidate):
    p, (library, method) = problem(name), candidate
    run = CANDIDATES[candidate](p)
    reference = CANDIDATES["prunelib", "exact"](p)
    reference()
    once = seconds(run)  # and compiles
    rounds = int(np.clip(4 / (once if once > 4 else seconds(run)), 1, 10))
    beside = []
    found = benchmark.pedantic(run, setup=lambda: beside.append(seconds(reference)), rounds=rounds)
    error = float(np.abs(np.asarray(found, float) - p.exact).max() / p.exact.max())
    if method in EXACT or (method in GAUSS_NEWTON and "tanh" not in name):
        # An example that sits on a kink may get the other slope from another processor.
        assert error < max(1e-5, 3 / p.count)
    times = benchmark.stats.stats.data
    row = {
        "network": name,
        "library": library,
        "method": method,
        "examples": p.count,
        "seconds": float(np.median(times)),
        "ratio": float(np.median(np.divide(times, beside))),
        "error": error,
    }
    if method == "exact":
        row["memory"] = p.memory()
        assert row["memory"] < 200e6
    if method == "gauss_newton" and name != "LeNet-5":
        row["least"] = p.count * p.least_flop() / min(times)
    rows.append(row)
    benchmark.extra_info["error"] = error


def test_lenet5_over_all_images():
    p = problem("LeNet-5")
    every = jax.device_put(p.every)
    jax.block_until_ready(every)

    def once():
        jax.block_until_ready(curvature.hessian_diagonal(p.network, p.params, every, "exact"))

    row = {"network": "LeNet-5, all", "examples": 60_000, "library": "prunelib", "method": "exact"}
    rows.append(row | {"seconds": seconds(once), "memory": p.memory()})  # with its compilation


@pytest.fixture(scope="module", autouse=True)
def _write_the_table():
    yield
    peak = next((r["peak"] for r in rows if "peak" in r), None)
    if len(rows) < len(NETWORKS) * len(CANDIDATES) + 2:
        return  # only a part was run
    with TABLE.open("w", newline="") as file:
        columns = ["network", "examples", "library", "method", "seconds", "ratio", "error"]
        columns += ["of_peak", "memory_mb"]  # the least arithmetic over the time; of `exact`
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        names = [*NETWORKS, "LeNet-5, all"]
        for row in (row for name in names for row in rows if row["network"] == name):
            shown = row | {"seconds": f"{row['seconds']:.3g}"}
            if "ratio" in row:
                ratio = np.format_float_positional(row["ratio"], 2, fractional=False, trim="-")
                shown |= {"ratio": ratio, "error": f"{row['error']:.1g}"}
            if "least" in row:
                shown["of_peak"] = f"{row['least'] / peak:.2f}"
            if "memory" in row:
                shown["memory_mb"] = f"{row['memory'] / 1e6:.0f}"
            writer.writerow(shown)
    print(f"\n{platform.processor() or platform.machine()}: {peak / 1e9:.0f} GFLOP/s in products")
