"""The loss change of pruning, term by term of its Taylor expansion."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunelib import checks
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples, scaled
from prunelib.passes import cross_entropy, mean_over_batches


class LossChange(NamedTuple):
    """The terms of E(w + δ) - E(w), in nats. The first four add up to `actual`.

    Each is a float, or an array of floats if several masks were given.

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
    network,
    params: Any,
    kept: Any,
    examples: Examples,
    diagonal: Any = None,
    *,
    loss: Callable = cross_entropy,
    batch_size: int = 1000,
) -> LossChange:
    """What pruning to the mask `kept` does to the mean loss, split into Taylor terms.

    Equation 1 of LeCun, Denker, Solla, "Optimal Brain Damage", 1990, with δ = -w for pruned
    entries and 0 for kept ones. Both ``gᵀδ`` and ``δᵀHδ`` come from differentiating along δ
    twice, forward over forward: no gradient is ever stored. All masks share one pass.

    Parameters
    ----------
    params : pytree of float arrays
        One network. For several, see `loss_changes`.
    kept : pytree of bool
        Shaped like `params`; True = kept. For several masks at once, each leaf has the same
        leading axes in front, for instance ``[levels, ...]``.
    examples : Examples
        Images ``[n, ...]`` and integer labels ``[n]``. All n are used.
    diagonal : pytree, optional
        The Hessian's diagonal at `params`, shaped like it; by default that of
        `curvature.hessian_diagonal`, which is exact for piecewise-linear networks. For smooth
        activations pass the result of its method "neuron" or "one_hot".
    loss : callable
        ``(logits [n, classes], labels [n]) -> [n]``, the loss of each example.
    batch_size : int
        Examples in memory at a time. The result does not depend on it.

    Returns
    -------
    LossChange
        Floats, or NumPy arrays of the masks' leading axes.

    Raises
    ------
    ValueError
        If the pytrees do not match, or network, params and examples do not (see `checks`).
    TypeError
        If `kept` holds anything but booleans.
    FloatingPointError
        If a parameter, an image, the diagonal or a term is NaN or infinite.
    """
    checks.network_inputs(network, params, examples, batch_size, loss)
    axes = _leading_axes(kept, params)
    if diagonal is None:
        diagonal = hessian_diagonal(network, params, examples, loss=loss)
    checks.same_tree("diagonal", diagonal, "params", params)
    checks.convertible("diagonal", diagonal)
    checks.finite("diagonal", diagonal)
    masks = jax.tree.map(lambda k, w: jnp.reshape(k, (-1, *w.shape)), kept, params)
    first, own, half, actual = (
        np.asarray(term, float).reshape(axes)[()]  # [()]: a 0-d array becomes a number
        for term in _terms(network, loss, batch_size, params, masks, diagonal, examples)
    )
    change = LossChange(first, own, half - own, actual - first - half, actual)
    return checks.finite("the loss change", change)


def loss_changes(network, params, kept, examples, diagonal=None, **options) -> LossChange:
    """`loss_change` of several networks, each with masks of its own.

    `params` and `diagonal` have a leading axis over networks (as in `training.Runs`), `kept` has
    that axis before all others: ``[networks, levels, ...]`` gives arrays ``[networks, levels]``.
    """

    def select(tree, place):
        return None if tree is None else jax.tree.map(lambda leaf: leaf[place], tree)

    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((params, kept, diagonal))}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "params, kept, diagonal: expected the same leading axis over networks, "
            f"got {sorted(sizes)}; for a single network use loss_change"
        )
    each = [
        loss_change(
            network, select(params, i), select(kept, i), examples, select(diagonal, i), **options
        )
        for i in range(sizes.pop()[0])
    ]
    return LossChange(*(np.stack(terms) for terms in zip(*each, strict=True)))


def _leading_axes(kept, params):
    """The axes that every leaf of `kept` has before those of `params`."""
    checks.booleans(kept)
    leaves = jax.tree.leaves(kept)
    extra = np.ndim(leaves[0]) - np.ndim(jax.tree.leaves(params)[0]) if leaves else 0
    axes = np.shape(leaves[0])[:extra] if extra > 0 else ()
    expected = jax.tree.map(lambda w: jax.ShapeDtypeStruct((*axes, *w.shape), bool), params)
    checks.same_tree("kept", kept, "params (after the axes over masks)", expected)
    return axes


@partial(jax.jit, static_argnums=(0, 1, 2))
def _terms(network, loss, batch_size, params, masks, diagonal, examples):
    """gᵀδ, ½ Σ h_kk δ_k², ½ δᵀHδ and the change itself, for each mask: four arrays ``[masks]``."""
    deltas = jax.tree.map(lambda k, w: jnp.where(k, jnp.zeros_like(w), -w), masks, params)

    def batch(images, labels, weights):
        x = scaled(images)

        def losses(params):
            return loss(network.apply(params, x), labels)

        def along(delta):
            def slope(params):
                return jax.jvp(losses, (params,), (delta,))

            (before, first), (_, second) = jax.jvp(slope, (params,), (delta,))
            after = losses(jax.tree.map(jnp.add, params, delta))
            return weights @ first, weights @ (0.5 * second), weights @ (after - before)

        return jax.vmap(along)(deltas)

    first, half, actual = mean_over_batches(batch, examples, batch_size)

    def own(delta):
        terms = jax.tree.map(lambda h, d: 0.5 * (h * d**2).sum(), diagonal, delta)
        return sum(jax.tree.leaves(terms))

    return first, jax.vmap(own)(deltas), half, actual


def layer_terms(
    network,
    params: Any,
    kept: Any,
    examples: Examples,
    *,
    loss: Callable = cross_entropy,
    batch_size: int = 1000,
) -> np.ndarray:
    """Second-order terms by pairs of layers: ``½ δ_aᵀ H_ab δ_b``, an array ``[layers, layers]``.

    A layer is an entry of `params` at its top level. The matrix is symmetric, and all its entries
    add up to ``½ δᵀHδ``, the `diagonal` plus the `cross` of `loss_change`. It is half the Hessian
    of ``c -> E(w + Σ_a c_a δ_a)`` at 0: one HVP for each layer, with δ in that layer only.

    Parameters and errors are those of `loss_change`; `kept` is a single mask.
    """
    checks.network_inputs(network, params, examples, batch_size, loss)
    if axes := _leading_axes(kept, params):
        raise ValueError(f"kept: expected a single mask, shaped like params, got axes {axes} more")
    terms = _layer_terms(network, loss, batch_size, params, kept, examples)
    return np.asarray(checks.finite("the layer terms", terms), float)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _layer_terms(network, loss, batch_size, params, kept, examples):
    def batch(images, labels, weights):
        def mean_loss(c):  # c_a = 1 prunes layer a
            shares = {name: jax.tree.map(lambda _, c=c[a]: c, params[name])
                      for a, name in enumerate(params)}  # fmt: skip
            moved = jax.tree.map(lambda w, k, c: jnp.where(k, w, w - c * w), params, kept, shares)
            return weights @ loss(network.apply(moved, scaled(images)), labels)

        return 0.5 * jax.hessian(mean_loss)(jnp.zeros(len(params), weights.dtype))

    return mean_over_batches(batch, examples, batch_size)
