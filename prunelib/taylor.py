"""The loss change of pruning, term by term of its Taylor expansion."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prunelib import checks
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples, scaled
from prunelib.passes import cross_entropy, mean_over_batches
from prunelib.pruning import apply_mask


class LossChange(NamedTuple):
    """The terms of E(w + δ) - E(w), in nats. The first four add up to `actual`.

    first : ``gᵀδ``; zero at a minimum (the "extremal" assumption)
    diagonal : ``½ Σ h_kk δ_k²``; what OBD keeps
    cross : ``½ δᵀHδ - ½ Σ h_kk δ_k²``; dropped by the "diagonal" assumption
    higher : all that is beyond second order; dropped by the "quadratic" assumption
    actual : the change itself
    """

    first: float
    diagonal: float
    cross: float
    higher: float
    actual: float


def loss_change(
    network,
    params: Any,
    kept: Any,
    examples: Examples,
    diagonal: Any = None,
    batch_size: int = 2500,
) -> LossChange:
    """What pruning to the mask `kept` does to the mean loss, split into Taylor terms.

    Equation 1 of LeCun, Denker, Solla, "Optimal Brain Damage", 1990, with δ = -w for pruned
    entries and 0 for kept ones. All of ``gᵀδ`` and ``δᵀHδ`` comes from differentiating
    ``t -> E(w + tδ)`` twice, forward over forward: one pass, no gradient is ever stored.

    Parameters
    ----------
    kept : pytree of bool
        Shaped like `params`; True = kept.
    diagonal : pytree, optional
        The Hessian's diagonal at `params`; by default computed by `curvature.hessian_diagonal`.
        Pass it when many masks are measured on one network.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        See `checks`: trees that do not match, bad examples, numbers that are not finite.
    """
    checks.network_inputs(network, params, examples, batch_size)
    checks.same_tree("kept", kept, "params", params)
    if diagonal is None:
        diagonal = hessian_diagonal(network, params, examples)
    checks.same_tree("diagonal", diagonal, "params", params)
    delta = jax.tree.map(jnp.subtract, apply_mask(params, kept), params)
    first, second, actual = _along(network, batch_size, params, delta, examples)
    terms = jax.tree.map(lambda h, d: 0.5 * (h * d**2).sum(), diagonal, delta)
    own = sum(float(term) for term in jax.tree.leaves(terms))
    first, half, actual = float(first), 0.5 * float(second), float(actual)
    change = LossChange(first, own, half - own, actual - first - half, actual)
    return checks.finite("the loss change", change)


@partial(jax.jit, static_argnums=(0, 1))
def _along(network, batch_size, params, delta, examples):
    def batch(images, labels, weights):
        x = scaled(images)

        def loss(t):
            moved = jax.tree.map(lambda w, d: w + t * d, params, delta)
            return cross_entropy(network.apply(moved, x), labels)

        def slope(t):
            return jax.jvp(loss, (t,), (jnp.ones_like(t),))

        t = jnp.zeros((), x.dtype)
        (before, first), (_, second) = jax.jvp(slope, (t,), (jnp.ones_like(t),))
        after = loss(jnp.ones_like(t))
        return weights @ first, weights @ second, weights @ (after - before)

    return mean_over_batches(batch, examples, batch_size)
