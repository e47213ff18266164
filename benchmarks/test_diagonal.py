"""The diagonal of the Hessian: prunelib beside BackPACK, curvlinops and matfree.

    make bench

Everything runs side by side, in one process, on the same weights and examples, in float32. Errors
are against `gauss_newton` in float64 (all networks here are piecewise linear, so it is exact),
relative to the largest entry. A time is the shortest of up to ten. A ratio is the median over
pairs: before every run of a candidate, `gauss_newton` runs once, so that whatever else the machine
does slows both. The table goes to benchmarks/diagonal.csv.

Three networks, so that nothing is tuned to one shape: the study's, a wide one, and one with a
hundred classes (a digit, and which tenth of the images it is in by brightness).
"""

import csv
import functools
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact, DiagHessian
from curvlinops import HessianLinearOperator, hutchinson_diag
from jax.flatten_util import ravel_pytree
from matfree import stochtrace

from prunelib import curvature, data, models, passes, training

TABLE = Path(__file__).with_name("diagonal.csv")
PROBES = 16
SHORT = training.Recipe(steps=300)  # any weights will do, but not the first ones
SHAPES = {  # layer widths, examples
    "study": ((784, 50, 50, 50, 50, 10), 60_000),
    "wide": ((784, 1000, 1000, 10), 2_000),
    "100 classes": ((784, 50, 50, 50, 50, 100), 6_000),
}
rows = []


class Problem:
    """One network with its weights and examples, for JAX and for PyTorch."""

    def __init__(self, name):
        widths, count = SHAPES[name]
        train = data.load_mnist().train
        labels = train.labels
        if widths[-1] == 100:
            brightness = train.images.mean(1).argsort().argsort() * 10 // len(labels)
            labels = (10 * labels + brightness).astype(np.int32)
        examples = data.Examples(train.images[:count], labels[:count])
        self.name, self.widths, self.count = name, widths, count
        self.network = models.mlp(widths)
        self.params = training.train(self.network, SHORT, examples, [0]).select(0)
        self.examples = jax.device_put(examples)
        with jax.enable_x64(True):
            exact = curvature.hessian_diagonal(
                self.network,
                jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), self.params),
                data.Examples(np.asarray(examples.images, np.float64) / 255, examples.labels),
                batch_size=500,
            )
            self.exact = np.asarray(ravel_pytree(exact)[0])
        self.torch_data = (
            torch.tensor(examples.images).float() / 255,
            torch.tensor(examples.labels).long(),
        )

    def torch_network(self):
        """The same network; the loss is a sum over the batch, so batches add up."""
        layers = []
        for layer in self.params.values():
            module = torch.nn.Linear(*layer["kernel"].shape)
            with torch.no_grad():
                module.weight.copy_(torch.tensor(np.asarray(layer["kernel"]).T))
                module.bias.copy_(torch.tensor(np.asarray(layer["bias"])))
            layers += [module, torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1]), torch.nn.CrossEntropyLoss(reduction="sum")

    def flat(self, weights, biases):
        """PyTorch's arrays in the order of JAX's flat vector."""
        tree = {
            name: {"kernel": np.asarray(w).T, "bias": np.asarray(b)}
            for name, w, b in zip(self.params, weights, biases, strict=True)
        }
        return ravel_pytree(tree)[0]

    def least_flop(self):
        """Per example: forward; back to each hidden layer, per class; one product for the sums."""
        sizes = [a * b for a, b in zip(self.widths[:-1], self.widths[1:], strict=True)]
        return 2 * (2 * sum(sizes) + self.widths[-1] * sum(sizes[1:]))


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
        linear = [m for m in network if isinstance(m, torch.nn.Linear)]
        # What a batch holds grows with its classes and widths.
        size = max(50, min(2500, 2500 * 10 * 50 // (p.widths[-1] * max(p.widths[1:]))))

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


def curvlinops_hutchinson(p):
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
        parts = hutchinson_diag(operator, PROBES).detach()
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
    ("prunelib", "gauss_newton"): prunelib("gauss_newton"),
    ("prunelib", "neuron"): prunelib("neuron"),
    ("prunelib", f"hutchinson, {PROBES} probes"): prunelib("hutchinson", probes=PROBES),
    ("BackPACK", "DiagGGNExact"): backpack_diagonal(DiagGGNExact, "diag_ggn_exact"),
    ("BackPACK", "DiagHessian"): backpack_diagonal(DiagHessian, "diag_h"),
    ("curvlinops", f"hutchinson_diag, {PROBES} probes"): curvlinops_hutchinson,
    ("matfree", f"monte_carlo_diagonal, {PROBES} probes"): matfree_monte_carlo,
}
EXACT = ("gauss_newton", "neuron", "DiagGGNExact", "DiagHessian")


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


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("candidate", CANDIDATES, ids=" ".join)
def test_diagonal(benchmark, name, candidate):
    p = problem(name)
    run = CANDIDATES[candidate](p)
    reference = CANDIDATES["prunelib", "gauss_newton"](p)
    reference(), run()  # compile
    rounds = int(np.clip(10 / seconds(run), 1, 10))
    beside = []
    found = benchmark.pedantic(run, setup=lambda: beside.append(seconds(reference)), rounds=rounds)
    error = float(np.abs(np.asarray(found, float) - p.exact).max() / p.exact.max())
    library, method = candidate
    if method in EXACT:
        assert error < 1e-5
    times = benchmark.stats.stats.data
    rows.append(
        {
            "network": name,
            "library": library,
            "method": method,
            "examples": p.count,
            "seconds": min(times),
            "ratio": float(np.median(np.divide(times, beside))),
            "error": error,
            "least": p.count * p.least_flop() / min(times),
        }
    )
    benchmark.extra_info["error"] = error


@pytest.fixture(scope="module", autouse=True)
def _write_the_table():
    yield
    peak = next((r["peak"] for r in rows if "peak" in r), None)
    if len(rows) < len(SHAPES) * len(CANDIDATES) + 1:
        return  # only a part was run
    with TABLE.open("w", newline="") as file:
        columns = ["network", "examples", "library", "method", "seconds", "ratio", "error"]
        columns.append("of_peak")  # the least arithmetic over the time, as a share of the peak
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in (row for name in SHAPES for row in rows if row["network"] == name):
            shown = row | {
                "seconds": f"{row['seconds']:.3g}",
                "ratio": np.format_float_positional(row["ratio"], 2, fractional=False, trim="-"),
                "error": f"{row['error']:.1g}",
            }
            if row["method"] == "gauss_newton":
                shown["of_peak"] = f"{row['least'] / peak:.2f}"
            writer.writerow(shown)
    print(f"\n{platform.processor() or platform.machine()}: {peak / 1e9:.0f} GFLOP/s in products")
