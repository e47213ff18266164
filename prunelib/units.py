"""Whole units, of a dense layer, and filters, of a convolution: what one is worth, how the others
take over its work, and arrays that are really smaller.

Scores of units are ``{layer: [units]}``, of all layers but the last; `pruning.mask` of them gives
what is called `units` here, booleans of that form, True = kept. A dropped unit is one whose
*outgoing* weights are zero; so what it would say through its bias alone goes too, unless `refit`
moves that into the next bias. What stands between two layers must act on each unit by itself, as
activations, pooling and `models.flatten` do.
"""

from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prunelib import checks
from prunelib.chains import damped, fit, is_chain, moments, shifted
from prunelib.checks import require
from prunelib.curvature import hessian_diagonal
from prunelib.data import Examples, scaled
from prunelib.models import Network, Params
from prunelib.passes import forward


def _links(network, params, units=None) -> list[tuple]:
    """For each layer but the last: its name, the next layer, which units stay, which inputs do."""
    require(is_chain(network, (nnx.Linear, nnx.Conv), params), "network: units need a models."
            "Network of plain nnx.Linear and nnx.Conv, which says what leads where")  # fmt: skip
    units, found = {} if units is None else units, []
    checks.booleans(units, "units")
    pairs = list(pairwise(layer for layer in network.layers if layer.name))
    known = [layer.name for layer, _ in pairs]
    require(isinstance(units, dict) and set(units) <= set(known), "units: expected booleans for "
            f"some of {known} (the last layer's are the classes), got {units}")  # fmt: skip
    for layer, following in pairs:
        width, rows = (params[x.name]["kernel"].shape for x in (layer, following))
        width, rows = width[-1], rows[-2]
        own = np.asarray(units.get(layer.name, np.ones(width, bool)))
        require(own.shape == (width,) and own.any(), f"units[{layer.name!r}]: expected {width} "
                f"booleans, some of them True, got {own.sum()} True of {own.shape}")  # fmt: skip
        require(rows % width == 0, f"network: {width} units of {layer.name!r} become {rows} inputs "
                "of the next layer; nothing between may join or split units")  # fmt: skip
        found.append((layer.name, following, own, np.tile(own, rows // width)))
    return found


def mask(network, params: Params, units: dict) -> Any:
    """`units` as a mask of parameters: a dropped unit's weights go, in and out, and its bias."""
    kept = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    for name, following, own, rows in _links(network, params, units):
        kept[name] = {kind: leaf & own for kind, leaf in kept[name].items()}
        kept[following.name]["kernel"] = kept[following.name]["kernel"] & rows[:, None]
    return kept


def shrink(network: Network, params: Params, units: dict) -> tuple[Network, Params]:
    """A smaller network without the dropped units, and its params.

    Its logits, and the derivatives of its loss, are those of `network` with `mask` applied. Layers
    that `units` does not name stay whole. Raises ValueError or TypeError for a network that is no
    chain of plain layers, a layer that is unknown or the last, and anything but one boolean for
    each unit, at least one of them True.
    """
    small = {name: dict(layer) for name, layer in params.items()}
    for name, following, own, rows in _links(network, params, units):
        small[name] = {kind: leaf[..., own] for kind, leaf in small[name].items()}
        small[following.name]["kernel"] = small[following.name]["kernel"][..., rows, :]

    def resized(layer, rngs):
        module, options = layer.module(params), signature(layer.kind.__init__).parameters
        same = {name: getattr(module, name) for name in options if hasattr(module, name)}
        inputs, outputs = small[layer.name]["kernel"].shape[-2:]
        return layer.kind(**same | {"in_features": inputs, "out_features": outputs}, rngs=rngs)

    layers = [(x.name, partial(resized, x)) if x.name else x.function for x in network.layers]
    return Network(layers), small


def spared(scores: dict) -> dict:
    """`scores` of units with each layer's best above all: a ranking that never empties a layer."""
    top = 1 + max(s.max() for s in scores.values())
    return {name: jnp.where(jnp.arange(s.size) == s.argmax(), top, s) for name, s in scores.items()}


def summed(network, scores: Any) -> dict:
    """For each unit the sum of its weights' `scores` (a pytree like params): in, out, and bias."""
    found = {}
    for name, following, own, _ in _links(network, scores):
        sides = [*scores[name].values(), jnp.moveaxis(scores[following.name]["kernel"], -2, -1)]
        found[name] = sum(side.reshape(-1, own.size).sum(0) for side in sides)
    return found


def gate(network, params: Params, examples: Examples) -> dict:
    """``½ E Σ_c (a_u δ_cu)²`` in nats: OBD on a gate that multiplies what a unit gives.

    It is ``½ dᵀHd`` of the step d that takes all outgoing weights of the unit to zero, their cross
    terms included (exactly for ReLU, else by Gauss-Newton): one pass for all units.
    """
    links = _links(network, params)
    before = {following.name: name for name, following, _, _ in links}

    def gated(gates, images):
        x = scaled(images)
        for layer in network.layers:
            if layer.name in before:
                rows = jnp.resize(gates[before[layer.name]], x.shape[-1])
                x = x * jnp.broadcast_to(rows, x.shape)
            x = layer(params, x)
        return x

    ones = {name: jnp.ones(own.size) for name, _, own, _ in links}
    return jax.tree.map(lambda h: h / 2, hessian_diagonal(gated, ones, examples, "gauss_newton"))


def obs(network, params: Params, examples: Examples, damping: float = 0.01) -> dict:
    """What each unit costs, in nats, when it is the cheapest left and the others take over.

    Greedy, layer by layer: ``½ tr(V_uᵀ [M_uu]⁻¹ V_u)``, V_u the unit's outgoing weights, each times
    the root of the curvature at its target (the one currency of all layers), M the inverse of the
    damped covariance of the next layer's inputs. A running maximum along the order.
    """
    logits, links, found = forward(network, params, examples), _links(network, params), {}
    kernels = {x.name: params[x.name]["kernel"] for _, x, _, _ in links}
    zeros = {n: jnp.zeros((1,) * (k.ndim - 1) + k.shape[-1:]) for n, k in kernels.items()}

    def of_shifts(shifts, images):
        return shifted(network, params, images, shifts)[0]

    curvature = hessian_diagonal(of_shifts, zeros, examples, "gauss_newton")
    for name, following, own, _ in links:
        covariance, _, mean, _ = moments(logits, params, params, examples, following.name)
        hessian = damped(covariance, mean, damping)
        target = np.sqrt(np.asarray(curvature[following.name], float)).ravel()
        kernel = np.asarray(kernels[following.name], float).reshape(-1, target.size)
        found[name] = jnp.asarray(_prices(kernel * target, hessian, own.size))
    return found

def _prices(kernel, hessian, units):
    blocks = len(kernel) // units  # input r belongs to unit r % units
    inverse = np.linalg.inv(np.asarray(hessian, float))
    inverse = inverse.reshape(blocks, units, blocks, units).transpose(1, 0, 3, 2)
    kernel = kernel.reshape(blocks, units, -1).swapaxes(0, 1)
    prices, alive, highest = np.zeros(units), np.arange(units), 0.0
    while alive.size:
        own = np.linalg.inv(inverse[alive, :, alive])
        moves = own @ kernel[alive]
        each = 0.5 * (kernel[alive] * moves).sum((1, 2))
        k = each.argmin()
        prices[alive[k]] = highest = max(highest, each[k])
        column = inverse[:, :, alive[k]]
        kernel = kernel - column @ moves[k]
        inverse = inverse - np.tensordot(column @ own[k], column, (2, 2))
        alive = np.delete(alive, k)
    return prices


def refit(network, params: Params, units: dict, examples: Examples, damping=0.01) -> Params:
    """The others take over: params shaped as before, zero where `mask` is False.

    From the first layer to the last, each kernel is fitted by least squares to the dense network's
    pre-activations z, from what the pruned one gives it, x: ``V_R = (C_RR + λ)⁻¹ (Cov(x, z)_R +
    λ V_R)``, C = Cov(x), λ `damping` times its mean diagonal. The bias takes up the means.
    """
    kept, logits = mask(network, params, units), forward(network, params, examples)
    found = jax.tree.map(jnp.multiply, params, kept)
    for _, following, _, rows in _links(network, params, units):
        name = following.name
        inputs = moments(logits, found, params, examples, name)
        new = fit(params[name], np.resize(rows, len(inputs[0])), inputs, damping)
        found[name] = jax.tree.map(jnp.multiply, new, kept[name])
    return checks.finite("the fitted weights", found)
