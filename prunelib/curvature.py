"""Hessian-vector products, and the diagonal of the Hessian of the mean loss, by five methods.

References
----------
.. [1] Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.
.. [2] Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
       Neural Computation 14, 2002.
.. [3] Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", Applied Numerical
       Mathematics 57, 2007.
.. [4] Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree

from prunelib import checks
from prunelib.data import Examples
from prunelib.gauss_newton import exact, gauss_newton, is_chain, is_smooth_chain, sampled
from prunelib.linearity import bent
from prunelib.passes import batch_of, cross_entropy, forward, known_loss, mean_over_batches


def hvp(function: Callable, params: Any, vector: Any) -> Any:
    """The Hessian of a scalar `function` at `params`, times `vector`: forward over reverse [1]_.

    Costs about as much as two gradients. `params`, `vector` and the result are alike in shape.
    """
    return jax.jvp(jax.grad(function), (params,), (vector,))[1]


def hessian_diagonal(
    network, params: Any, examples: Examples, method: str | None = None, *,
    loss: Callable = cross_entropy, batch_size: int | None = None, **options,
) -> Any:  # fmt: skip
    """The diagonal of the Hessian of the mean loss, ``∂²E/∂w_k²``.

    network : a models.Network, or a function ``(params, images) -> logits``
    method :
        =================  ============================================  =========================
        name               exact for                                     cost, in passes: one for
        =================  ============================================  =========================
        exact              dense layers, any activations; and where the  each class; where it bends
                           two below are exact and affordable            somewhat more (see `exact`)
        gauss_newton [2]_  piecewise-linear networks (ReLU, max-pool)    each class
        one_hot            everything                                    each parameter
        hutchinson [3]_    everything, on average                        each of ``probes=64``
        sampled [4]_       piecewise-linear networks, on average         each of ``draws=1``
        =================  ============================================  =========================

        By default exact, or gauss_newton with a warning where nothing exact is affordable.
    loss : ``(logits [n, classes], labels [n]) -> [n]``, the loss of each example
    batch_size : examples in memory at a time (by default some 64 MB); it changes no result
    options : ``probes``, ``draws``; a ``key`` for those two (by default ``jax.random.key(0)``);
        ``first``, the number of the first example, for sampled; ``chunk=64``, the columns computed
        together, for one_hot

    Returns a pytree shaped like `params`, at least float32, in nats per squared weight. Warns where
    Gauss-Newton is not the Hessian, if no method was named, or the network is piecewise linear in
    its images (then weights are used at several depths, which is easily overlooked). Raises
    ValueError or TypeError for bad arguments (see `passes.forward`) or a network that the method
    cannot do, FloatingPointError for what is not finite.
    """
    checks.one_of("method", "one_hot" if method is None else method, METHODS)
    checks.whole("batch_size", 1 if batch_size is None else batch_size)
    logits = forward(network, params, examples)
    loss = known_loss(loss, logits)
    if method in (None, "exact", "gauss_newton", "sampled"):
        method = _resolved(method, logits, params, examples)
    wide = jax.tree.map(lambda w: w.astype(jnp.promote_types(w.dtype, jnp.float32)), params)
    found = METHODS[method](logits, loss, batch_size, wide, examples, **options)
    return checks.finite("the Hessian diagonal", found)

def _resolved(method, logits, params, examples) -> str:
    """What to run: for "exact", and by default, what is exact for this network and affordable."""
    chain = is_chain(logits.origin, (nnx.Linear,), params)
    found, smooth_chain = _facts(logits, jax.tree.structure(params), chain)
    bends = [path for path in found if found[path] and path != "images"]
    named = method in ("gauss_newton", "sampled")
    if not bends or (named and found["images"]):  # of a smooth network one may well want it
        return method if named else "gauss_newton"
    if not named and (smooth_chain or _operations(params, examples) < 1e11):  # some seconds
        return "exact" if smooth_chain else "one_hot"
    why = ("the Gauss-Newton diagonal is not the Hessian's: " + ", ".join(bends)
           + (" do not enter piecewise linearly; " if found["images"] else " multiply themselves; ")
           + '"one_hot" is exact and slow, "hutchinson" estimates')  # fmt: skip
    checks.require(method != "exact", f'method: not "exact" here but "gauss_newton"; {why}')
    warnings.warn(why, stacklevel=3)
    return method or "gauss_newton"

@lru_cache(maxsize=64)
def _facts(logits, structure, chain):
    params = structure.unflatten(logits.program.in_avals[:-1])
    return bent(logits, params), chain and is_smooth_chain(logits, params)

def _operations(params, examples) -> float:
    """Of one Hessian-vector product for each parameter: about six a parameter and example."""
    return 6.0 * sum(leaf.size for leaf in jax.tree.leaves(params)) ** 2 * len(examples.labels)


def one_hot(logits, loss, batch_size, params, examples, *, chunk: int = 64):
    """``h_kk = e_kᵀ H e_k``: one HVP for each parameter. The reference for all other methods."""
    checks.whole("chunk", chunk)
    hours = _operations(params, examples) / 3e10 / 3600
    if hours > 0.1:
        warnings.warn(f"one_hot needs one pass for each parameter, very roughly {hours:.1f} hours "
                      'on two cores; "exact" may need seconds', stacklevel=3)  # fmt: skip
    size = batch_of(batch_size, logits, 4 * chunk)
    return _columns(logits, loss, size, params, examples, chunk)

@partial(jax.jit, static_argnums=(0, 1, 2, 5))
def _columns(logits, loss, batch_size, params, examples, chunk):
    flat, unravel, product = _product(logits, loss, batch_size, params, examples)
    places = jnp.arange(flat.size)
    entry = partial(lambda k, zeros: product(zeros.at[k].set(1))[k], zeros=jnp.zeros_like(flat))
    return unravel(jax.lax.map(entry, places, batch_size=chunk))


def hutchinson(logits, loss, batch_size, params, examples, *, probes: int = 64, key=None):
    """The mean of ``v ⊙ H v`` over random ±1 vectors v.

    Unbiased for any network; the variance of one probe is ``Σ_{j≠k} h_kj²`` (entry k), so the
    error falls as 1/√probes.
    """
    checks.whole("probes", probes)
    keys = jax.random.split(jax.random.key(0) if key is None else key, probes)
    return _probed(logits, loss, batch_of(batch_size, logits, 5), params, examples, keys)

@partial(jax.jit, static_argnums=(0, 1, 2))
def _probed(logits, loss, batch_size, params, examples, keys):
    flat, unravel, product = _product(logits, loss, batch_size, params, examples)

    def add(total, key):
        v = jax.random.rademacher(key, flat.shape, flat.dtype)
        return total + v * product(v), None

    return unravel(jax.lax.scan(add, jnp.zeros_like(flat), keys)[0] / len(keys))

def _product(logits, loss, batch_size, params, examples):
    """The params in one vector, how to get them back, and ``v -> H v`` over all examples."""
    flat, unravel = ravel_pytree(params)

    def product(v):
        def batch(images, labels, weights):
            return hvp(lambda w: weights @ loss(logits(unravel(w), images), labels), flat, v)

        return mean_over_batches(batch, examples, batch_size)

    return flat, unravel, product


METHODS = {f.__name__: f for f in (exact, gauss_newton, one_hot, hutchinson, sampled)}
