"""The loss change of pruning, term by term of its Taylor expansion."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunelib import checks
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples
from prunelib.passes import batch_of, cross_entropy, forward, known_loss, mean_over_batches


class LossChange(NamedTuple):
    """The terms of E(w + δ) - E(w), in nats, floats or arrays. The first four add up to `actual`.

    first : ``gᵀδ``; zero at a minimum (the "extremal" assumption)
    diagonal : ``½ Σ h_kk δ_k²``; what OBD keeps
    cross : ``½ δᵀHδ - ½ Σ h_kk δ_k²``; dropped by the "diagonal" assumption
    higher : all that is beyond second order; dropped by the "quadratic" assumption
    actual : the change itself
    """

    first: Any
    diagonal: Any
    cross: Any
    higher: Any
    actual: Any


def loss_change(
    network, params: Any, kept: Any, examples: Examples, diagonal: Any = None, *,
    loss: Callable = cross_entropy, batch_size: int | None = None,
) -> LossChange:  # fmt: skip
    """What pruning to the mask `kept` does to the mean loss, split into Taylor terms.

    Equation 1 of LeCun, Denker, Solla, "Optimal Brain Damage", 1990, with δ = -w for pruned entries
    and 0 for kept ones. ``gᵀδ`` and ``δᵀHδ`` come from differentiating along δ twice, forward over
    forward: no gradient is ever stored. All masks share one pass.

    `kept` is a mask, or several at once: then each leaf has the same leading axes in front, for
    instance ``[levels, ...]``, and so have the terms. `diagonal` is the Hessian's, by default from
    `curvature.hessian_diagonal`. Raises ValueError or TypeError if the pytrees, network and
    examples do not match, FloatingPointError if anything is not finite.
    """
    checks.concrete("params, kept, examples", (params, kept, examples))
    logits = forward(network, params, examples)
    axes, masks = _masks(kept, params)
    if diagonal is None:
        diagonal = hessian_diagonal(network, params, examples, loss=loss)
    diagonal = checks.finite("diagonal", checks.like("diagonal", diagonal, "params", params))
    size = batch_of(batch_size, logits, 8)
    terms = _terms(logits, known_loss(loss, logits), size, params, masks, diagonal, examples)
    first, own, half, actual = (np.asarray(t, float).reshape(axes)[()] for t in terms)
    change = LossChange(first, own, half - own, actual - first - half, actual)
    return checks.finite("the loss change", change)

def _masks(kept, params):
    """The axes that every leaf of `kept` has before those of `params`; and masks ``[m, ...]``."""
    checks.booleans(kept)
    first = np.shape(next(iter(jax.tree.leaves(kept)), 0))
    axes = first[: max(0, len(first) - np.ndim(jax.tree.leaves(params)[0]))]
    expected = jax.tree.map(lambda w: jax.ShapeDtypeStruct((*axes, *w.shape), bool), params)
    kept = checks.like("kept", kept, "params (after the axes over masks)", expected)
    return axes, jax.tree.map(lambda k, w: k.reshape(math.prod(axes), *w.shape), kept, params)

@partial(jax.jit, static_argnums=(0, 1, 2))
def _terms(logits, loss, batch_size, params, masks, diagonal, examples):
    """gᵀδ, ½ Σ h_kk δ_k², ½ δᵀHδ and the change itself, for each mask: four arrays ``[masks]``."""

    def deltas(mask):
        return jax.tree.map(lambda k, w: jnp.where(k, jnp.zeros_like(w), -w), mask, params)

    def batch(images, labels, weights):
        def losses(params):
            return loss(logits(params, images), labels)

        def along(mask):
            delta = (deltas(mask),)

            def sloped(params):  # the losses, and their slopes along δ
                return jax.jvp(losses, (params,), delta)

            (before, first), (_, second) = jax.jvp(sloped, (params,), delta)
            after = losses(jax.tree.map(jnp.add, params, *delta))
            return weights @ first, weights @ (0.5 * second), weights @ (after - before)

        return jax.lax.map(along, masks)

    def own(mask):
        terms = jax.tree.map(lambda h, d: 0.5 * (h * d**2).sum(), diagonal, deltas(mask))
        return sum(jax.tree.leaves(terms))

    first, half, actual = mean_over_batches(batch, examples, batch_size)
    return first, jax.lax.map(own, masks), half, actual
