"""Hessian-vector products, and the diagonal of the Hessian: five ways, and a sixth by sampling.

Throughout, E is the mean loss over the data, in nats; its Hessian has the shape params x params.
Every method returns its diagonal as a pytree shaped like params, at least in float32.

References
----------
.. [1] LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989 (published 1990).
.. [2] Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.
.. [3] Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
       Neural Computation 14, 2002.
.. [4] Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", Applied Numerical
       Mathematics 57, 2007.
.. [5] Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020.
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
from prunelib.data import Examples, scaled
from prunelib.linearity import SHARED, SMOOTH, dependence
from prunelib.passes import (
    cross_entropy,
    default_batch,
    forward,
    known_loss,
    mean_over_batches,
)


def hvp(function: Callable, params: Any, vector: Any) -> Any:
    """The Hessian of a scalar `function` at `params`, times `vector`: forward over reverse [2]_.

    Costs about as much as two gradients. `params`, `vector` and the result are alike in shape.
    """
    return jax.jvp(jax.grad(function), (params,), (vector,))[1]


def hessian_diagonal(
    network,
    params: Any,
    examples: Examples,
    method: str | None = None,
    *,
    loss: Callable = cross_entropy,
    batch_size: int | None = None,
    **options,
) -> Any:
    """The diagonal of the Hessian of the mean loss, ``∂²E/∂w_k²``.

    Parameters
    ----------
    network : Network, or a function ``(params, images) -> logits``
        `neuron` and `lecun1990` need the layers of a `models.Network`, and `gauss_newton` and
        `sampled` are much faster with them.
    params : pytree of float arrays
    examples : Examples
        Images ``[n, ...]`` and integer labels ``[n]``. All n are used.
    method : str, optional
        ===============  ==========================================  ==============================
        name             exact for                                   cost, in passes over the data
        ===============  ==========================================  ==============================
        "gauss_newton"   piecewise-linear networks (ReLU, max-pool)  one for each class
        "neuron"         chains of dense layers, any activation      about one for each neuron
        "one_hot"        everything                                  one for each parameter
        "lecun1990"      nothing but the last layer                  two
        "hutchinson"     everything, on average                      one for each probe
        "sampled"        piecewise-linear networks, on average       one for each draw
        ===============  ==========================================  ==============================

        By default "gauss_newton" where that is the Hessian; else the exact "neuron" for a chain of
        dense layers, or "one_hot" for a small network.
    loss : callable
        ``(logits [n, classes], labels [n]) -> [n]``, the loss of each example, whatever the
        others; the mean is taken here.
    batch_size : int, optional
        Examples in memory at a time; by default what fits into 64 MB. The result does not depend
        on it.
    **options
        `hutchinson`: ``probes=64, key=jax.random.key(0)``. `sampled`: ``draws=1``, a `key`, and
        ``first=0``, the number of the first example. `one_hot`: ``chunk=64`` columns at once.

    Returns
    -------
    pytree
        Shaped like `params`; in nats per squared weight.

    Warns
    -----
    UserWarning
        If `gauss_newton` or `sampled` is not the Hessian because weights are used at several
        depths; or because activations are smooth, no method was named and none is affordable.

    Raises
    ------
    ValueError
        For an unknown method, bad arguments (see `passes.forward`), or a network that the method
        cannot do; the message names a method that can.
    FloatingPointError
        If parameters, images or the result contain NaN or infinity.
    """
    if method is not None:
        checks.one_of("method", method, METHODS)
    if batch_size is not None:
        checks.whole("batch_size", batch_size)
    logits = forward(network, params, examples)
    loss = known_loss(loss, logits)
    if method in (None, "gauss_newton", "sampled"):
        method = _exact(method, logits, params, examples)
    wide = jax.tree.map(lambda w: w.astype(jnp.promote_types(w.dtype, jnp.float32)), params)
    found = METHODS[method](logits, loss, batch_size, wide, examples, **options)
    return checks.finite("the Hessian diagonal", found)


def _exact(method, logits, params, examples) -> str:
    """A method that is exact, if one is named or affordable; else Gauss-Newton and a warning."""
    kinds = _dependence(logits, jax.tree.structure(params))
    worst = max(kinds.values())
    if worst < SHARED or (worst == SMOOTH and method is not None):
        return method or "gauss_newton"
    if method is None and worst == SMOOTH and is_chain(logits.origin, (nnx.Linear,), params):
        return "neuron"
    if method is None and _operations(params, examples) < 1e11:  # some seconds
        return "one_hot"
    where = ", ".join(path for path, kind in kinds.items() if kind == worst)
    how = "multiply themselves" if worst == SHARED else "do not enter piecewise linearly"
    warnings.warn(
        f"the Gauss-Newton diagonal is not the Hessian's here: {where} {how}; "
        'method="one_hot" is exact, and slow; "hutchinson" estimates it',
        stacklevel=3,
    )
    return method or "gauss_newton"


def _operations(params, examples) -> float:
    """Of one Hessian-vector product for each parameter: about six a parameter and example."""
    return 6.0 * sum(leaf.size for leaf in jax.tree.leaves(params)) ** 2 * len(examples.labels)


@lru_cache(maxsize=64)
def _dependence(logits, structure):
    return dependence(logits, structure.unflatten([0] * structure.num_leaves))


# 1. One-hot: the definition --------------------------------------------------------------------


def _one_hot(logits, loss, batch_size, params, examples, *, chunk: int = 64):
    """``h_kk = e_kᵀ H e_k``: one HVP for each parameter. The reference for all other methods."""
    checks.whole("chunk", chunk)
    hours = _operations(params, examples) / 3e10 / 3600
    if hours > 0.1:
        warnings.warn(
            f"one_hot needs one pass over {len(examples.labels):,} examples for each parameter, "
            f"very roughly {hours:.1f} hours on two cores; where they are exact, "
            '"gauss_newton" and "neuron" give the same diagonal in seconds',
            stacklevel=3,
        )
    size = batch_size or default_batch(logits, 4 * chunk)
    return _one_hots(logits, loss, size, chunk, params, examples)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _one_hots(logits, loss, batch_size, chunk, params, examples):
    flat, unravel = ravel_pytree(params)

    def batch(images, labels, weights):
        def mean_loss(flat):
            return weights @ loss(logits(unravel(flat), images), labels)

        def entry(k):
            return hvp(mean_loss, flat, jnp.zeros_like(flat).at[k].set(1))[k]

        return jax.lax.map(entry, jnp.arange(flat.size), batch_size=chunk)

    return unravel(mean_over_batches(batch, examples, batch_size))


# 2. Neuron: exact second derivatives in pre-activation space -------------------------------------


@partial(jax.jit, static_argnums=(0, 1, 2))
def _neuron(logits, loss, batch_size, params, examples):
    """Exact for any chain of dense layers, at one second derivative for each *neuron*.

    A dense layer is linear in its weights, ``z_j = Σ_i a_i W_ij + b_j``, so

        ∂²E/∂W_ij² = Σ_n a_ni² ∂²E/∂z_nj².

    The Hessian of each example's loss in its pre-activations z is small (width x width). It is
    pulled back from layer to layer, ``H ← Jᵀ H J + Σ_k g_k ∇²z_k``, where J and the second term
    belong to the map from one layer's pre-activations to the next one's.
    """
    network = logits.origin
    if not is_chain(network, (nnx.Linear,), params):
        raise ValueError(
            'network: method "neuron" needs a models.Network of plain nnx.Linear and functions; '
            'use "gauss_newton" (if weights enter piecewise linearly) or "one_hot"'
        )
    widest = max(layer["kernel"].shape[1] for layer in params.values())
    batch_size = batch_size or max(1, min(500, 1_250_000 // widest**2))

    def batch(images, labels, weights):
        inputs, outputs, segments = walk(network, params, scaled(images))
        last = list(segments)[-1]  # the last segment leads from the last layer to the logits
        z = segments[last](outputs[last])
        gradient = jax.vjp(lambda z: loss(z, labels), z)[1](jnp.ones_like(weights))[0]
        count, one = factors(loss, z, labels)
        signs, vectors = jax.vmap(one, out_axes=1)(jnp.arange(count))
        hessian = jnp.einsum("nc,nci,ncj->nij", signs, vectors, vectors)
        squares = {}
        for name in reversed(inputs):
            hessian = _pull_back(segments[name], outputs[name], gradient, hessian)
            gradient = jax.vjp(segments[name], outputs[name])[1](gradient)[0]
            second = weights[:, None] * jnp.diagonal(hessian, axis1=1, axis2=2)
            squares[name] = _dense_squares(inputs[name], second)
        return _like(params, squares)

    return mean_over_batches(batch, examples, batch_size)


def _pull_back(segment, z, gradient, hessian):
    """``Jᵀ H J + Σ_k g_k ∇²segment_k`` for each example; J is the segment's Jacobian at z."""
    pull = jax.vmap(lambda rows: jax.vjp(segment, z)[1](rows)[0], in_axes=1, out_axes=1)
    half = pull(hessian)  # H J
    whole = pull(half.swapaxes(1, 2))  # (H J)ᵀ J = Jᵀ H J, as H is symmetric

    def bend(z, gradient):
        return gradient @ segment(z[None])[0]

    return whole + jax.vmap(jax.hessian(bend))(z, gradient)


# 3. Gauss-Newton: squared back-propagated signals ------------------------------------------------


def _gauss_newton(logits, loss, batch_size, params, examples):
    """The diagonal of the (generalised) Gauss-Newton matrix ``Σ_n J_nᵀ ∇²_z E_n J_n`` [3]_.

    It *is* the Hessian's diagonal for piecewise-linear networks, since each single weight enters
    the logits piecewise linearly; for smooth activations it is the Levenberg-Marquardt
    approximation of the OBD paper [1]_. With the factor ``∇²_z E = Σ_c s_c s_cᵀ``, of the softmax
    ``s_c = √p_c (e_c - p)``, it is a sum of squares: back-propagate each s_c, square, add.
    """
    return _squares(logits, partial(factors, loss), batch_size, params, examples)


def factors(loss, logits, labels):
    """How many terms ``∇²_z E_n = Σ_c sign_c s_c s_cᵀ`` has, and ``c -> sign_c [n], s_c [n, k]``.

    One by one, so that a thousand classes need not be in memory together.
    """
    if loss is cross_entropy:
        p = jax.nn.softmax(logits)

        def one(c):
            e_c = jax.nn.one_hot(c, p.shape[1], dtype=p.dtype)[None]
            return jnp.ones_like(p[:, 0]), jnp.sqrt(p[:, c])[:, None] * (e_c - p)

        return p.shape[1], one
    of_one = jax.hessian(lambda z, y: loss(z[None], y[None])[0])
    values, vectors = jnp.linalg.eigh(jax.vmap(of_one)(logits, labels))
    vectors = vectors * jnp.sqrt(jnp.abs(values))[:, None, :]
    return values.shape[1], lambda c: (jnp.sign(values[:, c]), vectors[:, :, c])


def _squares(logits, terms, batch_size, params, examples, *options):
    """Σ_n weight_n Σ_c sign_nc (∂(s_ncᵀ z_n)/∂w)², by layers where they are known."""
    by_layers = is_chain(logits.origin, (nnx.Linear, nnx.Conv), params)
    each = 0 if by_layers else 3 * sum(leaf.size for leaf in jax.tree.leaves(params))
    size = batch_size or default_batch(logits, 5, each)
    name, *given = (terms.func.__name__, *terms.args)
    return _summed(by_layers, logits, name, tuple(given), size, params, examples, *options)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _summed(by_layers, logits, name, given, batch_size, params, examples, *options):
    def terms(z, labels):
        return {"factors": factors, "drawn": drawn}[name](*given, z, labels, *options)

    of_batch = _batch_of_layers if by_layers else _batch_of_any
    return mean_over_batches(of_batch(logits, terms, params), examples, batch_size)


def _batch_of_layers(logits, terms, params):
    """A layer's kernel is shared over the positions of a convolution: there each example's
    gradient is summed over positions before it is squared.
    """
    network = logits.origin
    modules = {layer.name: layer.module(params) for layer in network.layers if layer.name}
    conv = [name for name in modules if modules[name].kernel.ndim == 4]

    def shifted(shifts, images):
        """The logits with ``shifts[name]`` added to each layer's output; each layer's input."""
        x, inputs = scaled(images), {}
        for layer in network.layers:
            if layer.name:
                inputs[layer.name] = x
            x = layer(params, x)
            if layer.name:
                x = x + shifts[layer.name]
        return x, inputs

    def batch(images, labels, weights):
        outputs = jax.eval_shape(lambda x: walk(network, params, scaled(x))[1], images)
        zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), outputs)
        z, pull, inputs = jax.vjp(partial(shifted, images=images), zeros, has_aux=True)
        count, one = terms(z, labels)

        def add(dense, c):
            sign, vector = one(c)
            factor, signals = weights * sign, pull(vector)[0]
            dense = {name: dense[name] + factor[:, None] * signals[name] ** 2 for name in dense}
            return dense, (factor, {name: signals[name] for name in conv})

        start = {name: zeros[name] for name in modules if name not in conv}
        # Small matrix products gain by running on without a loop; convolutions compile slowly.
        unroll = 1 if conv else min(10, count)
        dense, (factor, signals) = jax.lax.scan(add, start, jnp.arange(count), unroll=unroll)
        out = {name: _dense_squares(inputs[name], dense[name]) for name in dense}
        for name in conv:
            by_place = jnp.moveaxis(signals[name], 0, -2)
            out[name] = _conv_squares(modules[name], inputs[name], by_place, factor.T)
        return _like(params, out)

    return batch


def _dense_squares(a, squares):
    """``a [n, in]``, squared signals summed over classes ``[n, out]`` -> sums over examples."""
    return {"kernel": (a**2).T @ squares, "bias": squares.sum(0)}


def _conv_squares(module, a, signals, factor):
    """``a [n, h, w, in]``, signals ``[n, h', w', c, out]`` -> sums over examples."""
    n, _, _, classes, out = signals.shape
    height, width = module.kernel_size
    steps = module.strides if isinstance(module.strides, tuple) else (module.strides or 1,) * 2
    patches = jax.lax.conv_general_dilated_patches(
        a, (height, width), steps, module.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    gradients = jnp.einsum(
        "npk,npo->nko",
        patches.reshape(n, -1, patches.shape[-1]),
        signals.reshape(n, -1, classes * out),
    ).reshape(n, -1, classes, out)
    kernel = jnp.einsum("nkco,nc->ko", gradients**2, factor)
    # patches list the input channel first, kernels the place first
    return {
        "kernel": kernel.reshape(-1, height, width, out).transpose(1, 2, 0, 3),
        "bias": jnp.einsum("nco,nc->o", signals.sum((1, 2)) ** 2, factor),
    }


def _batch_of_any(logits, terms, params):
    """One gradient an example and class, one class after the other."""

    def of_one(image, label):
        z, pull = jax.vjp(lambda p: logits(p, image[None]), params)
        count, one = terms(z, label[None])

        def add(total, c):
            sign, vector = one(c)
            return jax.tree.map(lambda t, g: t + sign[0] * g**2, total, pull(vector)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, jnp.arange(count))[0]

    def batch(images, labels, weights):
        squares = jax.vmap(of_one)(images, labels)
        return jax.tree.map(lambda s: jnp.tensordot(weights, s, 1), squares)

    return batch


# 4. The recursion of 1990 ------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1, 2))
def _lecun1990(logits, loss, batch_size, params, examples):
    """The recursion of the OBD paper [1]_: back-propagate only the diagonal.

        ∂²E/∂w_ij² = ∂²E/∂z_i² a_j²                                  (the paper's equation 6)
        ∂²E/∂z_i² = f'(z_i)² Σ_l w_li² ∂²E/∂z_l² + f''(z_i) ∂E/∂a_i   (7)

    It starts at the logits with the diagonal of the loss's own Hessian (the paper's 8, there for a
    squared error). The sum over l drops what two units of a layer do together, so below the last
    layer this is an approximation. In a convolution, likewise, positions are taken one by one.
    Functions between the layers must act on each number by itself, or only move or select numbers
    (reshape, max-pool).
    """
    network = logits.origin
    if not is_chain(network, (nnx.Linear, nnx.Conv), params):
        raise ValueError(
            'network: method "lecun1990" needs a models.Network of plain nnx.Linear and nnx.Conv; '
            'use "gauss_newton" or "one_hot"'
        )

    def batch(images, labels, weights):
        values = [scaled(images)]
        for layer in network.layers:
            values.append(layer(params, values[-1]))
        z = values[-1]
        gradient = jax.vmap(jax.grad(lambda z, y: loss(z[None], y[None])[0]))(z, labels)
        count, one = factors(loss, z, labels)

        def add(second, c):
            sign, vector = one(c)
            return second + sign[:, None] * vector**2, None

        second = jax.lax.scan(add, jnp.zeros_like(z), jnp.arange(count))[0]
        out = {}
        for layer, x in zip(reversed(network.layers), reversed(values[:-1]), strict=True):
            if layer.name:
                weighted = second * weights.reshape(-1, *[1] * (second.ndim - 1))
                own = params[layer.name]
                at_squares = partial(lambda layer, x, own: layer({layer.name: own}, x), layer, x**2)
                out[layer.name] = jax.vjp(at_squares, own)[1](weighted)[0]  # equation 6
                squared = {layer.name: jax.tree.map(jnp.square, own)}
                second = jax.vjp(partial(layer, squared), x)[1](second)[0]
                gradient = jax.vjp(partial(layer, params), x)[1](gradient)[0]
            else:
                gradient, second = _pull_through(layer.function, x, gradient, second)
        return {name: out[name] for name in params}

    return mean_over_batches(batch, examples, batch_size or default_batch(logits, 5))


def _pull_through(function, x, gradient, second):
    """Equation 7 for an activation; for a function that moves numbers, the same move."""
    y, pull = jax.vjp(function, x)
    if y.shape != x.shape:
        return pull(gradient)[0], pull(second)[0]
    slope = pull(jnp.ones_like(y))[0]
    bend = jax.jvp(lambda x: jax.vjp(function, x)[1](gradient)[0], (x,), (jnp.ones_like(x),))[1]
    return slope * gradient, slope**2 * second + bend


# 5. Hutchinson: random probes --------------------------------------------------------------------


def _hutchinson(logits, loss, batch_size, params, examples, *, probes: int = 64, key=None):
    """The mean of ``v ⊙ H v`` over random ±1 vectors v [4]_.

    Unbiased for any network; the variance of one probe is ``Σ_{j≠k} h_kj²`` (entry k), so the
    error falls as 1/√probes.
    """
    checks.whole("probes", probes)
    key = jax.random.key(0) if key is None else key
    size = batch_size or default_batch(logits, 5)
    return _probed(logits, loss, size, params, examples, jax.random.split(key, probes))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _probed(logits, loss, batch_size, params, examples, keys):
    flat, unravel = ravel_pytree(params)

    def add(total, key):
        v = jax.random.rademacher(key, flat.shape, flat.dtype)

        def batch(images, labels, weights):
            def mean_loss(flat):
                return weights @ loss(logits(unravel(flat), images), labels)

            return hvp(mean_loss, flat, v)

        return total + v * mean_over_batches(batch, examples, batch_size), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(flat), keys)
    return unravel(total / len(keys))


# 6. Sampled: Gauss-Newton with drawn classes -----------------------------------------------------


def _sampled(
    logits, loss, batch_size, params, examples, *, draws: int = 1, key=None, first: int = 0
):
    """The mean of squared gradients, with labels drawn from the network's own probabilities.

    For a class y drawn with probability p_y, the mean of ``(p - e_y)(p - e_y)ᵀ`` is the Hessian of
    the cross-entropy in the logits, and ``Jᵀ(p - e_y)`` is the gradient as if y were the label
    [5]_. So its square is, on average, what `gauss_newton` adds up over all classes: for the price
    of one back-propagation a draw, however many classes there are. The error falls as
    1/√(n·draws). (With the true labels one gets the "empirical Fisher", which is something else.)

    Each draw depends on the key and its example's number alone, whatever the batches and devices.
    """
    if loss is not cross_entropy:
        raise ValueError(
            'loss: method "sampled" draws classes from the softmax, so it knows the cross-entropy '
            'only; for another loss use "gauss_newton"'
        )
    checks.whole("draws", draws)
    checks.whole("first", first, least=0)
    key = jax.random.key(0) if key is None else key
    numbered = examples._replace(labels=first + jnp.arange(len(examples.labels)))
    return _squares(logits, partial(drawn, draws), batch_size, params, numbered, key)


def drawn(draws, logits, numbers, key):
    """As `factors`, for the examples' numbers instead of labels: ``(p - e_y) / √draws``."""
    p = jax.nn.softmax(logits)

    def one(draw):
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), draw))(numbers)
        classes = jax.nn.one_hot(jax.vmap(jax.random.categorical)(keys, logits), p.shape[1])
        return jnp.ones_like(p[:, 0]), (p - classes.astype(p.dtype)) / draws**0.5

    return draws, one


METHODS = {
    "gauss_newton": _gauss_newton,
    "neuron": _neuron,
    "one_hot": _one_hot,
    "lecun1990": _lecun1990,
    "hutchinson": _hutchinson,
    "sampled": _sampled,
}

# Walking along a chain of layers -----------------------------------------------------------------


def walk(network, params, x):
    """Each named layer's input, its output, and the map from that output to the next one.

    The last layer's segment leads to the logits.
    """
    inputs, outputs, links, name = {}, {}, {}, None
    for layer in network.layers:
        if name:
            links[name].append(layer)
        y = layer(params, x)
        if layer.name:
            name = layer.name
            inputs[name], outputs[name], links[name] = x, y, []
        x = y

    def run(layers, x):
        for layer in layers:
            x = layer(params, x)
        return x

    return inputs, outputs, {name: partial(run, tuple(links[name])) for name in links}


def _like(params, found):
    """Drop what params does not have (a layer without a bias)."""
    return {name: {kind: found[name][kind] for kind in params[name]} for name in params}


def is_chain(network, kinds, params) -> bool:
    """Whether a network is a chain of plain layers of these kinds, on vectors and pictures."""
    if not getattr(network, "is_chain", False) or not isinstance(params, dict):
        return False
    return all(
        layer.is_plain and layer.kind in kinds for layer in network.layers if layer.name
    )
