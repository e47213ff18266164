"""From scores to a ranking, a mask, and the accuracy that is left.

A score says how much a parameter matters; the lowest scores go first. A mask is a pytree of
booleans shaped like params, True where the parameter is kept. Nothing here changes parameters:
a pruned network is ``apply_mask(params, kept)``, a new pytree.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from prunelib import checks
from prunelib.checks import require
from prunelib.data import Examples, count
from prunelib.passes import batch_of, cross_entropy, forward, mean_over_batches
from prunelib.units import shrink as shrink  # by the units that a mask of theirs keeps

SCOPES = ("all", "layer")


def magnitude(params: Any) -> Any:
    """``|w_k|``, a pytree shaped like `params`."""
    checks.params(params)
    return jax.tree.map(jnp.abs, params)


def obd_saliency(params: Any, diagonal: Any) -> Any:
    """``s_k = ½ h_kk w_k²``, in nats: the predicted rise of the loss when w_k goes to zero.

    Equation 3, and step 4 of the procedure, in LeCun, Denker, Solla, "Optimal Brain Damage", 1990.
    `diagonal` is the Hessian's, shaped like `params`. Raises FloatingPointError if it or a score
    is not finite, or all are zero: a ranking of equal scores is the order of the indices.
    """
    checks.params(params)
    checks.params(diagonal, "diagonal")
    diagonal = checks.like("diagonal", diagonal, "params", params)
    some = checks.is_traced(diagonal) or any(map(np.any, jax.tree.leaves(diagonal)))
    require(some, "diagonal: every entry is exactly zero, so that nothing would be ranked; if the "
            "loss is below rounding, use float64, or magnitude", FloatingPointError)  # fmt: skip

    def saliency(w, h):
        dtype = jnp.promote_types(jnp.result_type(w, h), jnp.float32)  # at least
        return 0.5 * h.astype(dtype) * w.astype(dtype) ** 2

    return checks.finite("the saliencies", jax.tree.map(saliency, params, diagonal))


def random_scores(key: jax.Array, params: Any) -> Any:
    """Uniform random scores, the baseline that any criterion must beat; shaped like `params`."""
    checks.params(params)
    leaves, structure = jax.tree.flatten(params)
    keys = structure.unflatten(jax.random.split(key, len(leaves)))
    return jax.tree.map(lambda w, key: jax.random.uniform(key, w.shape), params, keys)


def weights_only(params: Any) -> Any:
    """A pytree for `prunable`: False for every leaf named "bias", True for the others."""
    checks.params(params)
    return jax.tree.map_with_path(lambda path, _: checks.names_of(path)[-1:] != ("bias",), params)


def ranks(scores: Any, scope: str = "all", prunable: Any = None) -> Any:
    """The place of each entry in the order of pruning, 0 for the lowest score.

    scores : pytree of real arrays
    scope : "all" ranks the whole pytree in one order; "layer" ranks each array by itself, as in
        2016 (a layer's weights and its biases are two arrays)
    prunable : pytree of bool, one a leaf; a leaf with False is never pruned (`weights_only`)

    Returns int32, shaped like `scores`. Equal scores (on a CPU all below 1.2e-38) are ranked in the
    order of ``jax.tree.leaves``, and row by row within an array. Raises ValueError, TypeError or
    FloatingPointError for an unknown scope, a `prunable` of another structure, or scores that are
    not finite real numbers: NaN has no place in any order.
    """
    return _places(scores, scope, _checked(scores, scope, prunable))

def _checked(scores, scope, prunable) -> tuple[bool, ...]:
    """For each leaf whether it may be pruned, if all arguments make sense."""
    checks.one_of("scope", scope, SCOPES)
    checks.params(scores, "scores", (jnp.floating, jnp.integer))
    structure = jax.tree.structure(scores)
    free, found = [True] * structure.num_leaves, structure
    if prunable is not None:
        free, found = jax.tree.flatten(prunable)
    good = found == structure and all(isinstance(f, bool | np.bool_) for f in free)
    require(good, f"prunable: expected a bool for each leaf of scores, got {prunable}")
    return tuple(map(bool, free))

@partial(jax.jit, static_argnums=(1, 2))
def _places(scores, scope, free):
    leaves, structure = jax.tree.flatten(scores)
    if scope == "layer":
        return structure.unflatten([_order(leaf.ravel()).reshape(leaf.shape) for leaf in leaves])
    chosen = [leaf.ravel() for leaf, f in zip(leaves, free, strict=True) if f]
    order = _order(jnp.concatenate(chosen)) if chosen else None
    ranked, start = [], 0
    for leaf, f in zip(leaves, free, strict=True):
        part = order[start : start + leaf.size] if f else jnp.zeros(leaf.size, jnp.int32)
        ranked.append(part.reshape(leaf.shape))
        start += leaf.size * f
    return structure.unflatten(ranked)

def _order(scores: jax.Array) -> jax.Array:
    numbers = jnp.arange(scores.size, dtype=jnp.int32)
    return jnp.zeros_like(numbers).at[jnp.argsort(scores, stable=True)].set(numbers)

def _limits(scores, percent, scope, free):
    """For each leaf the rank below which its entries go, ``floor(percent · n / 100)``, exactly."""
    leaves, structure = jax.tree.flatten(scores)
    sizes = [leaf.size * f for leaf, f in zip(leaves, free, strict=True)]
    if scope == "all":
        sizes = [sum(sizes) * (size > 0) for size in sizes]
    exact = checks.percent(percent)
    return structure.unflatten([math.floor(exact * n / 100) for n in sizes])


def mask(scores: Any, percent: float, scope: str = "all", prunable: Any = None) -> Any:
    """Which entries stay when the lowest `percent` of the scores go.

    A pytree of bool shaped like `scores`, True = kept. Of n prunable entries
    ``floor(percent · n / 100)`` go, so what is pruned at one level is pruned at every higher one.
    Parameters and errors are those of `ranks`.
    """
    free = _checked(scores, scope, prunable)
    below = _limits(scores, percent, scope, free)
    return jax.tree.map(jnp.greater_equal, _places(scores, scope, free), below)


def apply_mask(params: Any, kept: Any) -> Any:
    """A copy of `params` with zeros where the mask is False; ValueError if they do not match."""
    checks.params(params)
    checks.booleans(kept)
    return masked(params, checks.like("kept", kept, "params", params))


def masked(params: Any, kept: Any) -> Any:
    """`apply_mask` without its checks."""
    return jax.tree.map(lambda w, k: jnp.where(k, w, jnp.zeros_like(w)), params, kept)


class Measure(NamedTuple):
    """`accuracy`, a fraction, and `loss`, the mean cross-entropy in nats."""

    accuracy: float
    loss: float


def evaluate(network, params: Any, examples: Examples, batch_size: int | None = None) -> Measure:
    """Accuracy and mean loss over all `examples`, as two floats; errors as `passes.forward`."""
    checks.concrete("params, examples", (params, examples))
    logits = forward(network, params, examples)
    correct, loss = _evaluate(logits, batch_of(batch_size, logits, 1), params, examples)
    checks.finite("the loss", loss)
    return Measure(int(correct) / count(examples), float(loss))

@partial(jax.jit, static_argnums=(0, 1))
def _evaluate(logits, batch_size, params, examples):
    def batch(images, labels, weights):
        z = logits(params, images)
        correct = (z.argmax(1) == labels) & (weights > 0)
        return correct.sum(), weights @ cross_entropy(z, labels)

    return mean_over_batches(batch, examples, batch_size)


def accuracy_curve(
    network, params: Any, scores: Any, examples: Examples, percents: Iterable[float] = range(100),
    scope: str = "all", prunable: Any = None, batch_size: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy and loss over all `examples`, with the lowest scores pruned, level by level.

    No retraining: each level, of `percents` pruned, starts from `params`. One compiled program
    serves every level, criterion, scope and set of weights. Returns a DataFrame, one row a level:
    `percent` pruned, `remaining` (100 minus that), `accuracy` (a fraction) and `loss` (nats).
    Parameters and errors are those of `ranks` and `passes.forward`.
    """
    levels = list(percents)
    require(levels, "percents: there are none; pass for instance range(0, 100)")
    checks.concrete("params, scores, examples", (params, scores, examples))
    logits = forward(network, params, examples)
    scores = checks.like("scores", scores, "params", params)
    free = _checked(scores, scope, prunable)
    below = [_limits(scores, percent, scope, free) for percent in levels]
    order = _places(scores, scope, free)
    examples = jax.tree.map(jnp.asarray, examples)  # on the device once, for all levels
    size = batch_of(batch_size, logits, 1)
    found = [_pruned(logits, size, params, order, limit, examples) for limit in below]
    correct, loss = (np.array(column, float) for column in zip(*found, strict=True))
    checks.finite("the loss of the pruned network", loss)
    table = {"percent": levels, "remaining": 100 - np.array(levels, float)}
    return pd.DataFrame({**table, "accuracy": correct / count(examples), "loss": loss})

@partial(jax.jit, static_argnums=(0, 1))
def _pruned(logits, batch_size, params, order, below, examples):
    kept = jax.tree.map(jnp.greater_equal, order, below)
    return _evaluate(logits, batch_size, masked(params, kept), examples)
