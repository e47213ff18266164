"""Let the other weights move, to where the quadratic model of the loss is lowest: for any Hessian;
for a chain of layers, where each unit's is that of a regression; and for a whole network.

References
----------
.. [1] Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992.
.. [2] Frantar, Singh, Alistarh, "Optimal Brain Compression", 2022.
.. [3] Frantar, Alistarh, "SparseGPT", 2023.
.. [4] Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for LLMs" (Wanda), 2023.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prunelib import checks, pruning
from prunelib.chains import damped, fit, is_chain, moments, regress, room
from prunelib.checks import require
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples
from prunelib.passes import forward


def step(w: jax.Array, inverse: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The best move when weight k of `w` ``[n]`` goes, ``-(w_k / M_kk) M e_k``, and its price in
    units of the loss, ``w_k² / (2 M_kk)``; `inverse` is M, the inverse Hessian [1]_."""
    return -(w[k] / inverse[k, k]) * inverse[:, k], w[k] ** 2 / (2 * inverse[k, k])


def without(inverse: jax.Array, k: int) -> jax.Array:
    """The inverse of the Hessian without row and column k: row and column k of it are zero [2]_."""
    return inverse - jnp.outer(inverse[:, k], inverse[k]) / inverse[k, k]


def refit(w: jax.Array, hessian: jax.Array, kept: jax.Array) -> jax.Array:
    """The weights of lowest ``½ δᵀHδ`` that are zero where `kept` is False: a regression,
    ``δ_R = H_RR⁻¹ H_RS w_S``, whatever the order in which S goes. `w` and `kept` are ``[n]``.
    """
    return regress(hessian, hessian @ w, kept)


@jax.jit
def greedy(w: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order in which the cheapest weight goes next, the others moving each time [2]_.

    Returns each weight's place in that order, and the price paid when it went. The inverse is never
    updated: with the columns taken out so far in U, it is ``M - U Uᵀ``.
    """
    n = len(w)

    def one(number, state):
        w, diagonal, taken, places, prices = state
        alive = places == n
        price = jnp.where(alive, w**2 / (2 * jnp.maximum(diagonal, 1e-30)), jnp.inf)
        k = jnp.argmin(price)
        column = jnp.where(alive, inverse[:, k] - taken @ taken[k], 0) / jnp.sqrt(diagonal[k])
        w = jnp.where(alive, w - w[k] / jnp.sqrt(diagonal[k]) * column, 0).at[k].set(0)
        taken = taken.at[:, number].set(column)
        places, prices = places.at[k].set(number), prices.at[k].set(price[k])
        return w, diagonal - column**2, taken, places, prices

    start = (w, jnp.diagonal(inverse), jnp.zeros_like(inverse), jnp.full(n, n), jnp.zeros_like(w))
    return jax.lax.fori_loop(0, n, one, start)[3:]


def sparsegpt(weights: jax.Array, hessian: jax.Array, percent: float, block: int = 128):
    """SparseGPT's one pass over the inputs: each error is made up for by later inputs only [3]_.

    `weights` ``[inputs, units]``. With ``U = chol(H⁻¹)ᵀ``, in each block of inputs the lowest
    `percent` of ``w_i² / U_ii²`` go. Returns weights with zeros.
    """
    upper = jnp.linalg.cholesky(jnp.linalg.inv(hessian)).T
    for start in range(0, len(weights), block):
        rows = slice(start, start + block)
        score = weights[rows] ** 2 / jnp.diagonal(upper)[rows, None] ** 2
        weights = sweep(weights, upper, pruning.mask(score, percent), start)
    return weights


@jax.jit
def sweep(weights, upper, kept, start=0):
    """Inputs from `start` on in their order: what `kept` drops goes, and later inputs move."""

    def one(weights, i):
        error = jnp.where(kept[i], 0, weights[start + i] / upper[start + i, start + i])
        weights = weights - jnp.outer(upper[start + i], error)
        return weights.at[start + i].multiply(kept[i]), None

    return jax.lax.scan(one, weights, jnp.arange(len(kept)))[0]


class Pruned(NamedTuple):
    """`params`, zero where the mask `kept` (a pytree of bool) is False."""

    params: Any
    kept: Any


def layerwise(
    network, params: Any, examples: Examples, percent: float, scope: str = "all",
    refit: bool = True, damping: float = 0.01, ranked: Any = None,
) -> Pruned:  # fmt: skip
    """Prune `percent` of a chain's weights by OBS, unit by unit (or filter by filter); biases stay.

    Ranked by `scores`, or `ranked`. The kept weights are fitted to the dense network's
    pre-activations, by the covariance of the layer's inputs (the bias moves along) plus `damping`
    times its mean diagonal: with `refit`, layer after layer from the pruned network's activations,
    else from the dense ones [2]_. Raises ValueError for a network that is no chain of dense layers
    and convolutions, and what `passes.forward` and `pruning.mask` refuse.
    """
    logits = _chain(network, params, examples, damping)
    ranked = scores(network, params, examples, damping) if ranked is None else ranked
    kept = pruning.mask(ranked, percent, scope, pruning.weights_only(params))
    found = pruning.masked(params, kept)
    for name, layer in params.items():
        inputs = moments(logits, found if refit else params, params, examples, name)
        stay = kept[name]["kernel"].reshape(len(inputs[0]), -1)
        found = found | {name: fit(layer, stay, inputs, damping, room(stay))}
    return Pruned(checks.finite("the fitted weights", found), kept)


def scores(network, params: Any, examples: Examples, damping: float = 0.01) -> Any:
    """What each weight costs when greedy OBS takes it, in nats; for biases OBD's saliency.

    The price in the unit's squared error (a running maximum along its order: what goes first ranks
    first) times its own curvature, the exact diagonal at its bias: the one currency of all layers.
    A convolution is a dense layer on patches, its error a mean over places. Zero weights go first.
    """
    logits = _chain(network, params, examples, damping)
    curvature = hessian_diagonal(network, params, examples, "gauss_newton")
    found = {}
    for name, layer in params.items():
        covariance, _, mean, _ = moments(logits, params, params, examples, name)
        kernel = layer["kernel"].reshape(len(covariance), -1)
        unit, size = curvature[name]["bias"], room(kernel != 0)
        prices = _prices(damped(covariance, mean, damping), kernel, unit, size)
        found[name] = {"bias": unit * layer["bias"] ** 2 / 2}
        found[name]["kernel"] = prices.reshape(layer["kernel"].shape)
    return found


def wanda(network, params: Any, examples: Examples) -> Any:
    """Wanda's score ``|w_ij| · √E[a_i²]``, for ranking within a unit; zero for biases [4]_."""
    logits, found = _chain(network, params, examples), {}
    for name, layer in params.items():
        covariance, _, mean, _ = moments(logits, params, params, examples, name)
        size = jnp.sqrt(jnp.diagonal(covariance) + mean**2)[:, None]
        score = jnp.abs(layer["kernel"].reshape(len(size), -1)) * size
        found[name] = {"kernel": score.reshape(layer["kernel"].shape), "bias": 0 * layer["bias"]}
    return found

def _chain(network, params, examples, damping=0.01):
    """The network as `passes.forward` gives it, if layer-wise OBS can do it."""
    require(is_chain(network, (nnx.Linear, nnx.Conv), params), "network: layer-wise OBS needs a "
            "models.Network of plain nnx.Linear and nnx.Conv")  # fmt: skip
    require(all("bias" in layer for layer in params.values()), "params: a layer has no bias")
    require(0 < damping < np.inf, f"damping: expected a positive number, got {damping}; without it "
            "an input that never varies has no inverse")  # fmt: skip
    return forward(network, params, examples)

@partial(jax.jit, static_argnums=3)
def _prices(hessian, kernel, curvature, size):
    """`scores` of a kernel ``[inputs, units]`` of which no unit has more than `size` weights."""
    whole = jnp.linalg.inv(hessian) if size == len(kernel) else None

    def one(unit):
        weights, worth = unit
        chosen = jnp.argsort(weights == 0)[:size]
        inverse = jnp.linalg.inv(hessian[chosen][:, chosen]) if whole is None else whole
        places, prices = greedy(weights[chosen], inverse)
        order = jnp.argsort(places)
        return jnp.zeros_like(weights).at[chosen[order]].set(jax.lax.cummax(prices[order]) * worth)

    return jax.lax.map(one, (kernel.T, curvature), batch_size=max(1, 2**22 // size**2)).T


def woodbury(diagonal: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The diagonal of ``(D + GᵀG)⁻¹``, D ``[p]``, G ``[m, p]``, in float64 and never as a matrix:
    ``1/D_k - ‖L⁻¹g_k‖² / D_k²`` with ``LLᵀ = I + G D⁻¹ Gᵀ``.
    """
    diagonal, rows = np.asarray(diagonal, float), np.asarray(rows, float)
    lower = np.linalg.cholesky(np.eye(len(rows)) + (rows / diagonal) @ rows.T)
    return 1 / diagonal - (np.linalg.solve(lower, rows) ** 2).sum(0) / diagonal**2


def whole(w: np.ndarray, diagonal: np.ndarray, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`refit` for ``H = D + GᵀG`` of a whole network; arrays as in `woodbury`, `w` ``[p]``."""
    w, rows, kept = np.asarray(w, float), np.asarray(rows, float), np.asarray(kept)
    g, d = rows[:, kept], np.asarray(diagonal, float)[kept]
    right = g.T @ (rows[:, ~kept] @ w[~kept])
    inner = np.eye(len(g)) + (g / d) @ g.T
    found = np.zeros_like(w)
    found[kept] = w[kept] + right / d - (g.T @ np.linalg.solve(inner, (g / d) @ right)) / d
    return found
