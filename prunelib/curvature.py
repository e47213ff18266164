"""Hessian-vector products, and the diagonal of the Hessian: five ways, and a sixth by sampling.

Throughout, E is the mean loss over the data, in nats; its Hessian has the shape params x params.
Every method returns its diagonal as a pytree shaped like params.

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
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from prunelib import checks
from prunelib.data import Examples, scaled
from prunelib.models import Network, convolve
from prunelib.passes import cross_entropy, mean_over_batches


def hvp(function: Callable, params: Any, vector: Any) -> Any:
    """The Hessian of a scalar `function` at `params`, times `vector`: forward over reverse [2]_.

    Costs about as much as two gradients. `params`, `vector` and the result are alike in shape.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        If params or vector are no finite floating-point arrays, or not alike in shape, or the
        result is not finite (not seen inside `jit`).
    """
    checks.params(params)
    checks.params(vector, "vector")
    checks.same_tree("vector", vector, "params", params)
    product = jax.jvp(jax.grad(function), (params,), (vector,))[1]
    return checks.finite("the Hessian-vector product", product)


def hessian_diagonal(
    network,
    params: Any,
    examples: Examples,
    method: str = "gauss_newton",
    *,
    loss: Callable = cross_entropy,
    batch_size: int | None = None,
    **options,
) -> Any:
    """The diagonal of the Hessian of the mean loss, ``∂²E/∂w_k²``.

    Parameters
    ----------
    network : Network
        Anything with ``apply(params, images) -> logits``. `neuron` and `lecun1990` need the
        layers of a `models.Network`, and `gauss_newton` is much faster with them.
    params : pytree of float arrays
    examples : Examples
        Images ``[n, ...]`` and integer labels ``[n]``. All n are used.
    method : str
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
    loss : callable
        ``(logits [n, classes], labels [n]) -> [n]``, the loss of each example, whatever the
        others; the mean is taken here.
    batch_size : int, optional
        Examples in memory at a time; each method has a default. The result does not depend on it.
    **options
        `hutchinson`: ``probes=64, key=jax.random.key(0)``. `sampled`: ``draws=1`` and a `key`.
        `one_hot`: ``chunk=64`` columns at once.

    Returns
    -------
    pytree
        Shaped like `params`; in nats per squared weight.

    Raises
    ------
    ValueError
        For an unknown method, bad arguments (see `checks`), or a network that the method cannot
        do; the message names a method that can.
    FloatingPointError
        If parameters, images or the result contain NaN or infinity.
    """
    checks.one_of("method", method, METHODS)
    return METHODS[method](network, params, examples, loss, batch_size, **options)


def _guarded(method):
    """The method, refusing bad arguments (see `checks`) and a result that is not finite."""

    @wraps(method)
    def guarded(network, params, examples, loss=cross_entropy, batch_size=None, **options):
        checks.network_inputs(network, params, examples, batch_size, loss)
        estimate = method(network, params, examples, loss, batch_size, **options)
        return checks.finite("the Hessian diagonal", estimate)

    return guarded


# 1. One-hot: the definition --------------------------------------------------------------------


@_guarded
def one_hot(network, params, examples, loss, batch_size=None, *, chunk: int = 64):
    """``h_kk = e_kᵀ H e_k``: one HVP for each parameter. The reference for all other methods.

    Warns when the parameters times examples make it a matter of more than some minutes.
    """
    checks.whole("chunk", chunk)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    work = count * count * len(examples.labels)  # multiply-adds of one HVP: about 6 a parameter
    if work > 2e12:
        warnings.warn(
            f"one_hot needs {count:,} Hessian-vector products over {len(examples.labels):,} "
            f"examples, very roughly {6 * work / 3e10 / 3600:.1f} hours on two cores; "
            'method="neuron" or "gauss_newton" gives the same diagonal in seconds',
            stacklevel=4,
        )
    return _one_hot(network, loss, batch_size or 1000, chunk, params, examples)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _one_hot(network, loss, batch_size, chunk, params, examples):
    flat, unravel = ravel_pytree(params)

    def batch(images, labels, weights):
        def mean_loss(flat):
            return weights @ loss(network.apply(unravel(flat), scaled(images)), labels)

        def entry(k):
            return hvp(mean_loss, flat, jnp.zeros_like(flat).at[k].set(1))[k]

        return jax.lax.map(entry, jnp.arange(flat.size), batch_size=chunk)

    return unravel(mean_over_batches(batch, examples, batch_size))


# 2. Neuron: exact second derivatives in pre-activation space -------------------------------------


@_guarded
def neuron(network, params, examples, loss, batch_size=None):
    """Exact for any chain of dense layers, at one second derivative for each *neuron*.

    A dense layer is linear in its weights, ``z_j = Σ_i a_i W_ij + b_j``, so

        ∂²E/∂W_ij² = Σ_n a_ni² ∂²E/∂z_nj².

    The Hessian of each example's loss in its pre-activations z is small (width x width). It is
    pulled back from layer to layer, ``H ← Jᵀ H J + Σ_k g_k ∇²z_k``, where J and the second term
    belong to the map from one layer's pre-activations to the next one's.

    Raises
    ------
    ValueError
        If a layer with parameters is not a plain `nnx.Linear` on vectors, or the network is no
        chain.
    """
    if not _is_chain_of((nnx.Linear,), network, params, examples):
        raise ValueError(
            'network: method "neuron" needs a chain of dense layers: a models.Network of plain '
            "nnx.Linear on vectors; for convolutions, or weights used at several places, use "
            '"gauss_newton" or "one_hot" (at several depths, only "one_hot" is exact)'
        )
    widest = max(layer["kernel"].shape[1] for layer in params.values())
    batch_size = batch_size or max(1, min(500, 1_250_000 // widest**2))
    return _neuron(network, loss, batch_size, params, examples)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _neuron(network, loss, batch_size, params, examples):
    def batch(images, labels, weights):
        inputs, outputs, segments = _walk(network, params, images)
        last = list(segments)[-1]  # the last segment leads from the last layer to the logits
        logits = segments[last](outputs[last])
        gradient = jax.vjp(lambda z: loss(z, labels), logits)[1](jnp.ones_like(weights))[0]
        signs, vectors = loss_factor(loss, logits, labels)
        hessian = jnp.einsum("nc,nci,ncj->nij", signs, vectors, vectors)
        second = {}
        for name in reversed(inputs):
            hessian = _pull_back_hessian(segments[name], outputs[name], gradient, hessian)
            gradient = jax.vjp(segments[name], outputs[name])[1](gradient)[0]
            second[name] = _diagonal(hessian)
        squares = {n: _dense_squares(inputs[n], weights[:, None] * second[n]) for n in inputs}
        return _like(params, squares)

    return mean_over_batches(batch, examples, batch_size)


def _pull_back_hessian(segment, z, gradient, hessian):
    """``Jᵀ H J + Σ_k g_k ∇²segment_k`` for each example; J is the segment's Jacobian at z."""
    pull = jax.vmap(lambda rows: jax.vjp(segment, z)[1](rows)[0], in_axes=1, out_axes=1)
    half = pull(hessian)  # H J
    whole = pull(half.swapaxes(1, 2))  # (H J)ᵀ J = Jᵀ H J, as H is symmetric

    def bend(z, gradient):
        return gradient @ segment(z[None])[0]

    return whole + jax.vmap(jax.hessian(bend))(z, gradient)


def _diagonal(matrices):
    return jnp.diagonal(matrices, axis1=1, axis2=2)


# 3. Gauss-Newton: squared back-propagated signals ------------------------------------------------


@_guarded
def gauss_newton(network, params, examples, loss, batch_size=None):
    """The diagonal of the (generalised) Gauss-Newton matrix ``Σ_n J_nᵀ ∇²_z E_n J_n`` [3]_.

    It *is* the Hessian's diagonal for piecewise-linear networks, since each single weight enters
    the logits piecewise linearly; for smooth activations it is the Levenberg-Marquardt
    approximation of the OBD paper [1]_. With the factor ``∇²_z E = Σ_c s_c s_cᵀ``, of the softmax
    ``s_c = √p_c (e_c - p)``, it is a sum of squares: back-propagate each s_c, square, add.

    A layer's kernel is shared over positions in a convolution, so there each example's gradient
    is summed over positions before it is squared. Layers other than plain `nnx.Linear` and
    `nnx.Conv`, and networks other than `models.Network`, take a general and slower path: one
    gradient an example.
    """
    return _squares(_Factors(loss), network, params, examples, batch_size)


def _squares(factors, network, params, examples, batch_size, *options):
    if _is_chain_of((nnx.Linear, nnx.Conv), network, params, examples):
        convolutional = any(layer.kind is nnx.Conv for layer in network.layers)
        batch_size = batch_size or (25 if convolutional else 1000)
        return _gauss_newton_layers(network, factors, batch_size, params, examples, *options)
    return _gauss_newton_general(network, factors, batch_size or 100, params, examples, *options)


def loss_factor(loss, logits, labels):
    """Signs ``[n, c]`` and vectors ``[n, c, c]`` with ``∇²_z E_n = Σ_c sign_c s_c s_cᵀ``."""
    count, one = _Factors(loss)(logits, labels)
    return jax.vmap(one, out_axes=1)(jnp.arange(count))


class _Factors(NamedTuple):
    """`loss_factor` one by one: how many, and a function ``c -> sign_c [n], s_c [n, classes]``.

    So a thousand classes need not be in memory together.
    """

    loss: Callable

    def __call__(self, logits, labels):
        if self.loss is cross_entropy:
            p = jax.nn.softmax(logits)

            def one(c):
                e_c = jax.nn.one_hot(c, p.shape[1], dtype=p.dtype)[None]
                return jnp.ones_like(p[:, 0]), jnp.sqrt(p[:, c])[:, None] * (e_c - p)

            return p.shape[1], one
        of_one = jax.hessian(lambda z, y: self.loss(z[None], y[None])[0])
        values, vectors = jnp.linalg.eigh(jax.vmap(of_one)(logits, labels))
        vectors = vectors * jnp.sqrt(jnp.abs(values))[:, None, :]
        return values.shape[1], lambda c: (jnp.sign(values[:, c]), vectors[:, :, c])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gauss_newton_layers(network, factors, batch_size, params, examples, *options):
    def batch(images, labels, weights):
        def shifted(shifts):
            return _shifted_apply(network, params, shifts, images)

        outputs = jax.eval_shape(lambda x: _walk(network, params, x)[1], images)
        zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), outputs)
        logits, pull, inputs = jax.vjp(shifted, zeros, has_aux=True)
        count, one = factors(logits, labels, *options)
        return _sum_of_squares(network, params, pull, inputs, weights, count, one)

    return mean_over_batches(batch, examples, batch_size)


def _sum_of_squares(network, params, pull, inputs, weights, count, one):
    """Σ_n weight_n Σ_c sign_nc (∂(s_ncᵀ z_n)/∂w)², for each weight of each layer."""
    modules = {layer.name: layer.module(params) for layer in network.layers if layer.name}
    conv = [name for name in modules if not isinstance(modules[name], nnx.Linear)]

    def add(dense, c):
        sign, vector = one(c)
        factor, signals = weights * sign, pull(vector)[0]
        dense = {name: dense[name] + factor[:, None] * signals[name] ** 2 for name in dense}
        return dense, (factor, {name: signals[name] for name in conv})

    shapes = jax.eval_shape(lambda c: pull(one(c)[1])[0], 0)
    zeros = {
        name: jnp.zeros(shapes[name].shape, shapes[name].dtype)
        for name in modules
        if name not in conv
    }
    # Small matrix products gain by running on without a loop; convolutions take long to compile.
    unroll = 1 if conv else min(10, count)
    dense, (factors, signals) = jax.lax.scan(add, zeros, jnp.arange(count), unroll=unroll)
    out = {name: _dense_squares(inputs[name], dense[name]) for name in dense}
    for name in conv:
        by_place = jnp.moveaxis(signals[name], 0, -2)
        out[name] = _conv_squares(modules[name], inputs[name], by_place, factors.T)
    return _like(params, out)


def _dense_squares(a, squares):
    """``a [n, in]``, squared signals summed over classes ``[n, out]`` -> sums over examples."""
    return {"kernel": (a**2).T @ squares, "bias": squares.sum(0)}


def _conv_squares(module, a, signals, factors):
    """``a [n, h, w, in]``, signals ``[n, h', w', c, out]`` -> sums over examples."""
    n, _, _, classes, out = signals.shape
    patches = jax.lax.conv_general_dilated_patches(
        a,
        module.kernel_size,
        module.strides if isinstance(module.strides, tuple) else (module.strides or 1,) * 2,
        module.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    gradients = jnp.einsum(
        "npk,npo->nko",
        patches.reshape(n, -1, patches.shape[-1]),
        signals.reshape(n, -1, classes * out),
    ).reshape(n, -1, classes, out)
    kernel = jnp.einsum("nkco,nc->ko", gradients**2, factors)
    height, width = module.kernel_size
    return {
        # patches list the input channel first, kernels the place first
        "kernel": kernel.reshape(-1, height, width, out).transpose(1, 2, 0, 3),
        "bias": jnp.einsum("nco,nc->o", signals.sum((1, 2)) ** 2, factors),
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gauss_newton_general(network, factors, batch_size, params, examples, *options):
    def of_one(image, label):
        logits, pull = jax.vjp(lambda p: network.apply(p, scaled(image[None])), params)
        count, one = factors(logits, label[None], *options)
        signs, vectors = jax.vmap(one)(jnp.arange(count))  # [c, 1] and [c, 1, classes]
        squares = jax.tree.map(lambda g: g**2, jax.vmap(pull)(vectors)[0])
        return jax.tree.map(lambda s: jnp.tensordot(signs[:, 0], s, 1), squares)

    def batch(images, labels, weights):
        return jax.tree.map(
            lambda s: jnp.tensordot(weights, s, 1), jax.vmap(of_one)(images, labels)
        )

    return mean_over_batches(batch, examples, batch_size)


# 4. The recursion of 1990 ------------------------------------------------------------------------


@_guarded
def lecun1990(network, params, examples, loss, batch_size=None):
    """The recursion of the OBD paper [1]_: back-propagate only the diagonal.

        ∂²E/∂w_ij² = ∂²E/∂z_i² a_j²                                  (the paper's equation 6)
        ∂²E/∂z_i² = f'(z_i)² Σ_l w_li² ∂²E/∂z_l² + f''(z_i) ∂E/∂a_i   (7)

    It starts at the logits with the diagonal of the loss's own Hessian (the paper's 8, there for a
    squared error). The sum over l drops what two units of a layer do together, so below the last
    layer this is an approximation. In a convolution, likewise, positions are taken one by one.

    Raises
    ------
    ValueError
        If a layer with parameters is neither a plain `nnx.Linear` nor `nnx.Conv`, or the network
        is no chain. Functions between them must act on each number by itself, or only move or
        select numbers (reshape, max-pool).
    """
    if not _is_chain_of((nnx.Linear, nnx.Conv), network, params, examples):
        raise ValueError(
            'network: method "lecun1990" needs a chain of layers: a models.Network of plain '
            'nnx.Linear and nnx.Conv; use "gauss_newton" or "one_hot"'
        )
    for function, x in _functions(network, params, examples):
        if not _unit_by_unit(function, x):
            raise ValueError(
                f'network: method "lecun1990" follows each unit by itself, and '
                f"{getattr(function, '__name__', function)} mixes units (or scales while it moves "
                'them); use "neuron", "gauss_newton" or "one_hot"'
            )
    return _lecun1990(network, loss, batch_size or 1000, params, examples)


def _functions(network, params, examples):
    """The functions between the layers, and the shape that each is given for one example."""
    x = jax.eval_shape(lambda images: scaled(images[:1]), examples.images)
    for layer in network.layers:
        if not layer.name:
            yield layer.function, x
        x = jax.eval_shape(layer, params, x)


@partial(jax.jit, static_argnums=(0, 1))
def _two_sides(function, like):
    scales = 10.0 ** jnp.arange(-4, 3)
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    shape = (2, len(scales), *like.shape[1:])
    x, v = jax.random.normal(jax.random.key(0), shape, dtype)
    x = x * scales.astype(dtype).reshape(-1, *[1] * (x.ndim - 1))

    def push(v):
        return jax.jvp(function, (x,), (v,))[1]

    if push(v).shape == v.shape:
        return push(v), push(jnp.ones_like(v)) * v
    return push(v) ** 2, push(v**2)


def _unit_by_unit(function, like) -> bool:
    """Whether a function acts on each number by itself or, if the shape changes, only moves them.

    Its Jacobian at random points, small and large, must be diagonal, ``J v = (J 1) ⊙ v`` for a
    random v; or must have at most a single 1 in each row, ``J v² = (J v)²``.
    """
    with jax.ensure_compile_time_eval():  # inside `jit`, too
        sides = np.array(_two_sides(function, like))
    one, two = np.where(np.isfinite(sides).all(0), sides, 0)
    return bool(np.abs(one - two).max(initial=0) <= 1e-4 * np.abs(one).max(initial=0))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _lecun1990(network, loss, batch_size, params, examples):
    layers = network.layers

    def batch(images, labels, weights):
        values = [scaled(images)]
        for layer in layers:
            values.append(layer(params, values[-1]))
        logits = values[-1]
        gradient = jax.vmap(jax.grad(lambda z, y: loss(z[None], y[None])[0]))(logits, labels)
        count, one = _Factors(loss)(logits, labels)

        def add(second, c):
            sign, vector = one(c)
            return second + sign[:, None] * vector**2, None

        second = jax.lax.scan(add, jnp.zeros_like(logits), jnp.arange(count))[0]
        out = {}
        for layer, x in zip(reversed(layers), reversed(values[:-1]), strict=True):
            if layer.name:
                out[layer.name] = _pull_to_weights(layer, params, x**2, second, weights)
                squared = {layer.name: jax.tree.map(jnp.square, params[layer.name])}
                second = jax.vjp(partial(layer, squared), x)[1](second)[0]
                gradient = jax.vjp(partial(layer, params), x)[1](gradient)[0]
            else:
                gradient, second = _pull_through(layer.function, x, gradient, second)
        return {name: out[name] for name in params}

    return mean_over_batches(batch, examples, batch_size)


def _pull_to_weights(layer, params, squared_input, second, weights):
    """Equation 6, summed over positions and examples: the layer is linear in its parameters."""
    weighted = second * weights.reshape(-1, *[1] * (second.ndim - 1))
    pull = jax.vjp(lambda own: layer({layer.name: own}, squared_input), params[layer.name])[1]
    return pull(weighted)[0]


def _pull_through(function, x, gradient, second):
    """Equation 7 for an activation; for a function that moves numbers, the same move."""
    y, pull = jax.vjp(function, x)
    if y.shape != x.shape:
        return pull(gradient)[0], pull(second)[0]
    slope = pull(jnp.ones_like(y))[0]
    bend = jax.jvp(lambda x: jax.vjp(function, x)[1](gradient)[0], (x,), (jnp.ones_like(x),))[1]
    return slope * gradient, slope**2 * second + bend


# 5. Hutchinson: random probes --------------------------------------------------------------------


class Estimate(NamedTuple):
    """An estimate and its standard error: two pytrees shaped like params."""

    mean: Any
    standard_error: Any


def hutchinson(
    network, params, examples, loss=cross_entropy, batch_size=None, *, probes=64, key=None
):
    """The mean of ``v ⊙ H v`` over random ±1 vectors v [4]_; see `hutchinson_estimate`."""
    return hutchinson_estimate(
        network, params, examples, loss, batch_size, probes=probes, key=key
    ).mean


@_guarded
def hutchinson_estimate(
    network, params, examples, loss=cross_entropy, batch_size=None, *, probes=64, key=None
) -> Estimate:
    """Unbiased for any network; the variance of one probe is ``Σ_{j≠k} h_kj²`` (entry k).

    Parameters
    ----------
    probes : int
        The number of random vectors, one HVP each; at least 2. The error falls as 1/√probes.
    key : jax.random.key, optional
        The source of randomness; by default ``jax.random.key(0)``.
    """
    if not (isinstance(probes, int) and probes >= 2):
        raise ValueError(f"probes: expected an integer of at least 2, got {probes!r}")
    key = jax.random.key(0) if key is None else checks.key(key)
    mean, square = _hutchinson(network, loss, batch_size or 1000, probes, params, examples, key)
    error = jax.tree.map(
        lambda m, s: jnp.sqrt(jnp.maximum(s - m**2, 0) / (probes - 1)), mean, square
    )
    return Estimate(mean, error)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _hutchinson(network, loss, batch_size, probes, params, examples, key):
    flat, unravel = ravel_pytree(params)

    def one_probe(key):
        v = jax.random.rademacher(key, flat.shape, flat.dtype)

        def batch(images, labels, weights):
            def mean_loss(flat):
                return weights @ loss(network.apply(unravel(flat), scaled(images)), labels)

            return hvp(mean_loss, flat, v)

        return v * mean_over_batches(batch, examples, batch_size)

    def step(totals, key):
        sample = one_probe(key)
        return (totals[0] + sample, totals[1] + sample**2), None

    zeros = (jnp.zeros_like(flat), jnp.zeros_like(flat))
    totals, _ = jax.lax.scan(step, zeros, jax.random.split(key, probes))
    return unravel(totals[0] / probes), unravel(totals[1] / probes)


# 6. Sampled: Gauss-Newton with drawn classes -----------------------------------------------------


@_guarded
def sampled(network, params, examples, loss, batch_size=None, *, draws=1, key=None, first=0):
    """The mean of squared gradients, with labels drawn from the network's own probabilities.

    For a class y drawn with probability p_y, the mean of ``(p - e_y)(p - e_y)ᵀ`` is the Hessian of
    the cross-entropy in the logits, and ``Jᵀ(p - e_y)`` is the gradient as if y were the label
    [5]_. So its square is, on average, what `gauss_newton` adds up over all classes: for the price
    of one back-propagation a draw, however many classes there are. The error falls as
    1/√(n·draws).

    (With the true labels one gets the "empirical Fisher" instead, which is something else.)

    Parameters
    ----------
    draws : int
        Classes drawn for each example.
    key : jax.random.key, optional
        The source of randomness; by default ``jax.random.key(0)``.
    first : int
        The number of the first example, for a part of a longer stream: each draw depends on the
        key and its example's number alone, whatever the batches and devices.

    Raises
    ------
    ValueError
        If the loss is not `passes.cross_entropy`, `draws` is less than 1, or `first` less than 0.
    """
    if loss is not cross_entropy:
        raise ValueError(
            'loss: method "sampled" draws classes from the softmax, so it knows the cross-entropy '
            'only; for another loss use "gauss_newton"'
        )
    checks.whole("draws", draws)
    if not isinstance(first, int) or first < 0:
        raise ValueError(f"first: expected an integer of at least 0, got {first!r}; count from 0")
    key = jax.random.key(0) if key is None else checks.key(key)
    numbers = first + jnp.arange(len(examples.labels))
    numbered = examples._replace(labels=numbers)
    return _squares(_Drawn(draws), network, params, numbered, batch_size, key)


class _Drawn(NamedTuple):
    """As `_Factors`, for the examples' numbers instead of labels: ``(p - e_y) / √draws``."""

    draws: int

    def __call__(self, logits, numbers, key):
        p = jax.nn.softmax(logits)

        def one(draw):
            keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), draw))(numbers)
            drawn = jax.nn.one_hot(jax.vmap(jax.random.categorical)(keys, logits), p.shape[1])
            return jnp.ones_like(p[:, 0]), (p - drawn.astype(p.dtype)) / self.draws**0.5

        return self.draws, one


METHODS = {
    "gauss_newton": gauss_newton,
    "neuron": neuron,
    "one_hot": one_hot,
    "lecun1990": lecun1990,
    "hutchinson": hutchinson,
    "sampled": sampled,
}


# Walking along a chain of layers -----------------------------------------------------------------


def _shifted_apply(network, params, shifts, images):
    """The logits with ``shifts[name]`` added to each layer's output, and each layer's input."""
    x, inputs = scaled(images), {}
    for layer in network.layers:
        if layer.name:
            inputs[layer.name] = x
            x = layer(params, x) + shifts[layer.name]
        else:
            x = layer(params, x)
    return x, inputs


def _walk(network, params, images):
    """Each named layer's input, its output, and the map from that output to the next one.

    The last layer's segment leads to the logits.
    """
    x, name = scaled(images), None
    inputs, outputs, links = {}, {}, {}
    for layer in network.layers:
        y = layer(params, x)
        if name:
            links[name].append(layer)
        if layer.name:
            name = layer.name
            inputs[name], outputs[name], links[name] = x, y, []
        x = y
    return inputs, outputs, {n: partial(_run, tuple(links[n]), params) for n in links}


def _run(layers, params, x):
    for layer in layers:
        x = layer(params, x)
    return x


def _like(params, found):
    """Drop what params does not have (a layer without a bias)."""
    return {name: {kind: found[name][kind] for kind in params[name]} for name in params}


def _layer_inputs(network, params, examples):
    one = jax.eval_shape(lambda images: images[:1], examples.images)
    return jax.eval_shape(lambda p, x: _walk(network, p, x)[0], params, one)


def _is_chain_of(kinds, network, params, examples) -> bool:
    """Whether `apply` is what the layers say, and each layer with parameters one of `kinds`."""
    if getattr(type(network), "apply", None) is not Network.apply:
        return False
    inputs = _layer_inputs(network, params, examples)
    return all(
        layer.kind in kinds and _is_plain(layer.module(params), inputs[layer.name].ndim)
        for layer in network.layers
        if layer.name
    )


def _is_plain(module, ndim) -> bool:
    """Whether a layer computes what its class is known for, on vectors or pictures."""
    if module.promote_dtype is not nnx.nn.dtypes.promote_dtype:
        return False
    if isinstance(module, nnx.Linear):
        return ndim == 2 and module.dot_general is jax.lax.dot_general
    return (
        ndim == 4
        and len(module.kernel_size) == 2
        and module.conv_general_dilated in (jax.lax.conv_general_dilated, convolve)
        and all(d in (1, None, (1, 1)) for d in (module.kernel_dilation, module.input_dilation))
        and module.feature_group_count == 1
        and module.padding in ("SAME", "VALID")
    )
