"""From scores to a ranking, a mask, and the accuracy that is left.

A score says how much a parameter matters; the lowest scores go first. A mask is a pytree of
booleans shaped like params, True where the parameter is kept. Nothing here changes parameters:
a pruned network is ``apply_mask(params, kept)``, a new pytree.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunelib import checks
from prunelib.data import Examples, scaled
from prunelib.passes import count, cross_entropy, mean_over_batches

SCOPES = ("all", "layer")


@partial(jax.jit, static_argnums=0)
def _each(function, *trees):
    """`jax.tree.map` as one compiled program, not one for each array and operation."""
    return jax.tree.map(function, *trees)


# Scores ------------------------------------------------------------------------------------------


def magnitude(params: Any) -> Any:
    """``|w_k|``, a pytree shaped like `params`."""
    checks.params(params)
    return _each(jnp.abs, params)


def obd_saliency(params: Any, diagonal: Any) -> Any:
    """``s_k = ½ h_kk w_k²``, in nats: the predicted rise of the loss when w_k goes to zero.

    Source: equation 3, and step 4 of the procedure, in LeCun, Denker, Solla, "Optimal Brain
    Damage", 1990. `diagonal` is the diagonal of the Hessian, shaped like `params`.

    Raises
    ------
    ValueError
        If the two pytrees differ in structure or shapes.
    FloatingPointError
        If the diagonal has NaN or infinite entries, or is zero everywhere: a ranking of equal
        scores is the order of the indices, and says nothing about the parameters. Or if a score
        overflows.
    """
    checks.params(params)
    checks.params(diagonal, "diagonal")
    checks.same_tree("diagonal", diagonal, "params", params)
    if not checks.is_traced(diagonal) and not any(map(np.any, jax.tree.leaves(diagonal))):
        raise FloatingPointError(
            "diagonal: every entry is exactly zero, so that nothing would be ranked; "
            "if the loss is below rounding, compute in float64, or rank by magnitude"
        )
    return checks.finite("the saliencies", _each(_half_h_w_squared, params, diagonal))


def _half_h_w_squared(w, h):
    dtype = jnp.promote_types(jnp.result_type(w, h), jnp.float32)  # at least
    return 0.5 * h.astype(dtype) * w.astype(dtype) ** 2


def random_scores(key: jax.Array, params: Any) -> Any:
    """Uniform random scores, the baseline that any criterion must beat; shaped like `params`."""
    checks.key(key)
    checks.params(params)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.uniform(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
    )


def weights_only(params: Any) -> Any:
    """A pytree for `prunable`: False for every leaf named "bias", True for the others.

    Raises
    ------
    TypeError
        If a leaf has no name, being an array alone, or in a list or a tuple.
    """
    checks.params(params)

    def is_weight(path, _):
        names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        if names[-1:] == ["value"]:  # inside an nnx.Param
            names.pop()
        if not (names and isinstance(names[-1], str)):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)}: expected a name for each array, such as "
                '"kernel" or "bias", found none; make a pytree of bools yourself'
            )
        return names[-1] != "bias"

    return jax.tree.map_with_path(is_weight, params)


# Ranking and masks -------------------------------------------------------------------------------


def ranks(scores: Any, scope: str = "all", prunable: Any = None) -> Any:
    """The place of each entry in the order of pruning, 0 for the lowest score.

    Parameters
    ----------
    scores : pytree of real arrays
    scope : {"all", "layer"}
        "all" ranks the whole pytree in one order; "layer" ranks each array by itself, as in 2016
        (a layer's weights and its biases are two arrays).
    prunable : pytree of bool, optional
        One for each leaf; a leaf with False is never pruned (see `weights_only`).

    Returns
    -------
    pytree of int32
        Shaped like `scores`. Equal scores are ranked in the order of ``jax.tree.leaves`` (dict
        keys sorted), and row by row within an array. On a CPU, scores below the smallest normal
        number (1.2e-38 in float32) count as zero, and so as equal.

    Raises
    ------
    ValueError
        For an unknown scope, an empty pytree, or a `prunable` of another structure.
    TypeError
        If scores are complex or no arrays of numbers, or `prunable` holds anything but bools.
    FloatingPointError
        If a score is NaN or infinite: it has no place in any order.
    """
    leaves, structure, free = _checked(scores, scope, prunable)
    return structure.unflatten(_ranked(leaves, scope, tuple(free)))


@partial(jax.jit, static_argnums=(1, 2))
def _ranked(leaves, scope, free):
    if scope == "layer":
        return [_places(leaf.ravel()).reshape(leaf.shape) for leaf in leaves]
    chosen = [leaf.ravel() for leaf, f in zip(leaves, free, strict=True) if f]
    order = _places(jnp.concatenate(chosen)) if chosen else None
    ranked, start = [], 0
    for leaf, is_free in zip(leaves, free, strict=True):
        if is_free:
            ranked.append(order[start : start + leaf.size].reshape(leaf.shape))
            start += leaf.size
        else:
            ranked.append(jnp.zeros(leaf.shape, jnp.int32))
    return ranked


def _places(scores: jax.Array) -> jax.Array:
    order = jnp.argsort(scores, stable=True)
    places = jnp.arange(scores.size, dtype=jnp.int32)
    return jnp.zeros_like(places).at[order].set(places)


def _checked(scores, scope, prunable):
    """The leaves of `scores`, their structure, and for each leaf whether it may be pruned."""
    checks.one_of("scope", scope, SCOPES)
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:
        raise ValueError("scores: the pytree has no arrays; pass one shaped like params")
    for path, leaf in jax.tree.leaves_with_path(scores):
        dtype = getattr(leaf, "dtype", None)
        real = dtype is not None and (
            jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        )
        if not real:
            raise TypeError(
                f"scores{jax.tree_util.keystr(path)}: expected real numbers, "
                f"got {dtype or type(leaf).__name__}; rank the magnitude, or a real saliency"
            )
    checks.convertible("scores", scores)
    checks.finite("scores", scores)
    if prunable is None:
        return leaves, structure, [True] * len(leaves)
    if jax.tree.structure(prunable) != structure or any(map(np.ndim, jax.tree.leaves(prunable))):
        raise ValueError(
            f"prunable: expected one bool for each leaf of scores, {structure}, "
            f"got {jax.tree.structure(prunable)}; make it as weights_only(params) does"
        )
    for path, free in jax.tree.leaves_with_path(prunable):
        if np.asarray(free).dtype != bool:
            raise TypeError(
                f"prunable{jax.tree_util.keystr(path)}: expected a bool, got {free!r}; "
                "make it as weights_only(params) does"
            )
    return leaves, structure, [bool(f) for f in jax.tree.leaves(prunable)]


def counts(scores: Any, percent: float, scope: str = "all", prunable: Any = None) -> Any:
    """How many entries go: for each leaf, the rank below which its entries are pruned.

    `percent` of n prunable entries is ``floor(percent · n / 100)``, in exact arithmetic; n counts
    all leaves together (scope "all") or each by itself (scope "layer").

    Raises
    ------
    ValueError
        If `percent` is not within 0 to 100; and see `ranks`.
    """
    return _counts(*_checked(scores, scope, prunable), scope, percent)


def _counts(leaves, structure, free, scope, percent):
    sizes = [leaf.size * f for leaf, f in zip(leaves, free, strict=True)]
    if scope == "all":
        sizes = [sum(sizes) * f for f in free]
    exact = _exact(percent)
    return structure.unflatten([math.floor(exact * n / 100) for n in sizes])


def _exact(percent) -> Fraction:
    try:
        # str: 0.1 is meant as a tenth, not as the double next to it.
        exact = Fraction(str(percent)) if np.ndim(percent) == 0 else None
    except ValueError:
        exact = None
    if exact is None or isinstance(percent, str) or not 0 <= exact <= 100:
        raise ValueError(
            f"percent: expected a number from 0 to 100, got {percent!r}; it is the share to prune"
        )
    return exact


def mask(scores: Any, percent: float, scope: str = "all", prunable: Any = None) -> Any:
    """Which entries stay when the lowest `percent` of the scores go.

    Parameters are those of `ranks` and `counts`, and so are the errors. Masks nest: what is pruned
    at one level is pruned at every higher one.

    Returns
    -------
    pytree of bool
        Shaped like `scores`; True = kept.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> mask({"w": jnp.array([0.3, 0.1, 0.2, 0.4])}, percent=50)["w"].tolist()
    [True, False, False, True]
    """
    limits = counts(scores, percent, scope, prunable)
    return _each(jnp.greater_equal, ranks(scores, scope, prunable), limits)


def apply_mask(params: Any, kept: Any) -> Any:
    """A copy of `params` with zeros where the mask is False.

    Raises
    ------
    ValueError
        If the two pytrees differ in structure or shapes.
    TypeError
        If `kept` holds anything but booleans.
    """
    checks.params(params)
    checks.same_tree("kept", kept, "params", params)
    checks.booleans(kept)
    return _each(_zero_where_pruned, params, kept)


def _zero_where_pruned(w, k):
    return jnp.where(k, w, jnp.zeros_like(w))


# Curves ------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """What is left at each level: NumPy arrays of one length.

    `accuracy` is a fraction (0 to 1), `loss` the mean cross-entropy in nats.
    """

    percents: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray


def accuracy_curve(
    network,
    params: Any,
    scores: Any,
    examples: Examples,
    percents: Iterable[float] = range(0, 100),
    scope: str = "all",
    prunable: Any = None,
    batch_size: int = 2500,
) -> Curve:
    """Accuracy and loss over all `examples`, with the lowest scores pruned, level by level.

    One compiled program serves every level, criterion, scope and set of weights. No retraining:
    each level starts from `params`.

    Parameters
    ----------
    scores : pytree
        Shaped like `params`; the lowest go first. See `ranks` for `scope` and `prunable`.
    percents : iterable of numbers
        The levels, each from 0 to 100, in any order.
    batch_size : int
        Examples in memory at a time; the result does not depend on it.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        See `ranks`, `counts` and `checks.network_inputs`; and if `percents` is empty.
    """
    percents = list(percents)
    if not percents:
        raise ValueError("percents: there are none; pass for instance range(0, 100)")
    checks.network_inputs(network, params, examples, batch_size)
    checks.same_tree("scores", scores, "params", params)
    checked = _checked(scores, scope, prunable)
    limits = [_counts(*checked, scope, percent) for percent in percents]
    places = ranks(scores, scope, prunable)
    examples = jax.tree.map(jnp.asarray, examples)  # once for all levels
    found = [_pruned(network, batch_size, params, places, limit, examples) for limit in limits]
    correct, loss = (np.array(column) for column in zip(*found, strict=True))
    checks.finite("the loss of the pruned network", loss)
    return Curve(np.array(percents), correct / count(examples), loss)


@partial(jax.jit, static_argnums=(0, 1))
def _pruned(network, batch_size, params, places, limits, examples):
    kept = jax.tree.map(jnp.greater_equal, places, limits)
    pruned = jax.tree.map(_zero_where_pruned, params, kept)

    def batch(images, labels, weights):
        logits = network.apply(pruned, scaled(images))
        correct = (logits.argmax(1) == labels) & (weights > 0)
        return correct.sum(), weights @ cross_entropy(logits, labels)

    return mean_over_batches(batch, examples, batch_size)


def evaluate(network, params: Any, examples: Examples, batch_size: int = 2500):
    """``(accuracy, mean loss)`` of a network over all `examples`: a fraction, and nats.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        See `checks.network_inputs`.
    """
    checks.params(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    curve = accuracy_curve(network, params, zeros, examples, [0], batch_size=batch_size)
    return float(curve.accuracy[0]), float(curve.loss[0])
