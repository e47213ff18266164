"""Exact diagonals by layers: a dense layer is linear in its weights, ``z_j = Σ_i a_i W_ij + b_j``,
so ``∂²E/∂W_ij² = Σ_n a_ni² ∂²E/∂z_nj²``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from prunelib import checks
from prunelib.data import scaled
from prunelib.passes import cross_entropy, default_batch, mean_over_batches


def is_chain(network, kinds, params) -> bool:
    """Whether a network is a chain of plain layers of these kinds, and functions."""
    known = getattr(network, "is_chain", False) and isinstance(params, dict)
    return known and all(layer.kind in kinds for layer in network.layers if layer.name)


def gauss_newton(logits, loss, batch_size, params, examples):
    """The diagonal of the (generalised) Gauss-Newton matrix ``Σ_n J_nᵀ ∇²_z E_n J_n``.

    It *is* the Hessian's where each single weight enters the logits piecewise linearly; for smooth
    activations it is the Levenberg-Marquardt approximation of the OBD paper. With the factor
    ``∇²_z E = Σ_c s_c s_cᵀ``, of the softmax ``s_c = √p_c (e_c - p)``, it is a sum of squares:
    back-propagate each s_c, square, add.
    """
    return _squares(logits, loss, 0, batch_size, params, examples, None)


def sampled(logits, loss, batch_size, params, examples, *, draws: int = 1, key=None, first=0):
    """The mean of squared gradients, with labels drawn from the network's own probabilities.

    For a class y drawn with probability p_y, the mean of ``(p - e_y)(p - e_y)ᵀ`` is the Hessian of
    the cross-entropy in the logits, and ``Jᵀ(p - e_y)`` is the gradient as if y were the label
    (Martens, section 5): one back-propagation a draw, with an error that falls as 1/√(n·draws).
    (The true labels give the "empirical Fisher", which is something else.) A draw depends on the
    key and its example's number alone, from `first` on.
    """
    checks.require(loss is cross_entropy, 'loss: "sampled" knows the cross-entropy only; for '
                   'another use "gauss_newton"')  # fmt: skip
    checks.whole("draws", draws)
    checks.whole("first", first, least=0)
    key = jax.random.key(0) if key is None else key
    numbered = examples._replace(labels=first + jnp.arange(len(examples.labels)))
    return _squares(logits, loss, draws, batch_size, params, numbered, key)


def loss_terms(loss, logits, labels):
    """How many terms ``∇²_z E_n = Σ_c sign_c s_c s_cᵀ`` has, and ``c -> sign_c [n], s_c [n, k]``.

    One by one, so that a thousand classes need not be in memory together.
    """
    if loss is cross_entropy:
        p = jax.nn.softmax(logits)
        e, ones = jnp.eye(p.shape[1], dtype=p.dtype), jnp.ones_like(p[:, 0])
        return p.shape[1], lambda c: (ones, jnp.sqrt(p[:, c])[:, None] * (e[c][None] - p))
    of_one = jax.hessian(lambda z, y: loss(z[None], y[None])[0])
    values, vectors = jnp.linalg.eigh(jax.vmap(of_one)(logits, labels))
    vectors = vectors * jnp.sqrt(jnp.abs(values))[:, None, :]
    return values.shape[1], lambda c: (jnp.sign(values[:, c]), vectors[:, :, c])

def _drawn_terms(draws, key, logits, numbers):
    """As `loss_terms`, of classes drawn by examples' numbers: ``(p - e_y) / √draws``."""
    p = jax.nn.softmax(logits)

    def one(draw):
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), draw))(numbers)
        classes = jax.nn.one_hot(jax.vmap(jax.random.categorical)(keys, logits), p.shape[1])
        return jnp.ones_like(p[:, 0]), (p - classes.astype(p.dtype)) / draws**0.5

    return draws, one

def _squares(logits, loss, draws, batch_size, params, examples, key):
    by_layers = is_chain(logits.origin, (nnx.Linear, nnx.Conv), params)
    gradient = 0 if by_layers else 3 * sum(leaf.size for leaf in jax.tree.leaves(params))
    size = batch_size or default_batch(logits, 5, gradient)
    return _summed(by_layers, logits, loss, draws, size, params, examples, key)

@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _summed(by_layers, logits, loss, draws, batch_size, params, examples, key):
    """Σ_n weight_n Σ_c sign_nc (∂(s_ncᵀ z_n)/∂w)²."""
    terms = partial(_drawn_terms, draws, key) if draws else partial(loss_terms, loss)
    mesh = jax.typeof(examples.images).sharding.mesh
    if not by_layers and not mesh.empty:  # XLA shares out wrongly the gradients of convolutions
        everywhere = NamedSharding(mesh, PartitionSpec())
        examples = jax.lax.with_sharding_constraint(examples, everywhere)
    of_batch = partial(_by_layers if by_layers else _by_examples, logits, terms, params)
    return mean_over_batches(of_batch, examples, batch_size)


def shifted(network, params, images, shifts):
    """The logits with ``shifts[name]`` added to each layer's output; all inputs and outputs."""
    x, inputs, outputs = scaled(images), {}, {}
    for layer in network.layers:
        y = layer(params, x)
        if layer.name:
            inputs[layer.name], outputs[layer.name] = x, y
            y = y + shifts.get(layer.name, 0)
        x = y
    return x, (inputs, outputs)

def _by_layers(logits, terms, params, images, labels, weights):
    """By signals at each layer's output; nothing as large as a gradient of an example is made."""
    network = logits.origin
    forward = partial(shifted, network, params, images)
    shapes = jax.eval_shape(lambda: forward({})[1][1])
    zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
    z, pull, (inputs, _) = jax.vjp(forward, zeros, has_aux=True)
    count, one = terms(z, labels)
    conv = [layer for layer in network.layers if layer.kind is nnx.Conv]

    def add(dense, c):
        sign, vector = one(c)
        factor, signals = weights * sign, pull(vector)[0]
        dense = {name: dense[name] + factor[:, None] * signals[name] ** 2 for name in dense}
        return dense, (factor, {layer.name: signals[layer.name] for layer in conv})

    start = {name: z for name, z in zeros.items() if z.ndim == 2}
    # Small matrix products gain by running on without a loop; convolutions compile slowly.
    unroll = 1 if conv else min(10, count)
    dense, (factor, signals) = jax.lax.scan(add, start, jnp.arange(count), unroll=unroll)
    out = {name: _dense_squares(inputs[name], dense[name]) for name in dense}
    for layer in conv:
        a, by_place = inputs[layer.name], jnp.moveaxis(signals[layer.name], 0, -2)
        out[layer.name] = _conv_squares(layer.module(params), a, by_place, factor.T)
    return _like(params, out)

def _dense_squares(a, squares):
    """``a [n, in]``, weighted second derivatives ``[n, out]`` -> those of kernel and bias."""
    return {"kernel": (a**2).T @ squares, "bias": squares.sum(0)}

def _conv_squares(module, a, signals, factor):
    """``a [n, h, w, in]``, signals ``[n, h', w', c, out]`` -> sums over examples.

    A kernel is shared over positions: each example's gradient is summed over them, then squared.
    """
    n, _, _, classes, out = signals.shape
    height, width = module.kernel_size
    steps = module.strides if isinstance(module.strides, tuple) else (module.strides or 1,) * 2
    patches = jax.lax.conv_general_dilated_patches(
        a, (height, width), steps, module.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(n, signals.shape[1] * signals.shape[2], -1)
    flat = signals.reshape(n, -1, classes * out)
    gradients = jnp.einsum("npk,npo->nko", patches, flat).reshape(n, -1, classes, out)
    kernel = jnp.einsum("nkco,nc->ko", gradients**2, factor)
    # patches list the input channel first, kernels the place first
    kernel = kernel.reshape(-1, height, width, out).transpose(1, 2, 0, 3)
    return {"kernel": kernel, "bias": jnp.einsum("nco,nc->o", signals.sum((1, 2)) ** 2, factor)}

def _like(params, found):
    """Drop what params does not have (a layer without a bias)."""
    return {name: {kind: found[name][kind] for kind in params[name]} for name in params}

def _by_examples(logits, terms, params, images, labels, weights):
    """One gradient an example and class, one class after the other."""
    count, one = terms(logits(params, images), labels)

    def square(image, vector):
        gradient = jax.grad(lambda p: (logits(p, image[None])[0] * vector).sum())(params)
        return jax.tree.map(jnp.square, gradient)

    def add(total, c):
        sign, vectors = one(c)
        squares, factor = jax.vmap(square)(images, vectors), weights * sign
        return jax.tree.map(lambda t, s: t + jnp.tensordot(factor, s, 1), total, squares), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(count))[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def neuron(logits, loss, batch_size, params, examples):
    """Exact for any chain of dense layers, at one second derivative for each *neuron*.

    The Hessian of each example's loss in a layer's pre-activations z is small (width x width). It
    is pulled back from layer to layer, ``H ← Jᵀ H J + Σ_k g_k ∇²z_k``, where J and the second term
    belong to the map from one layer's pre-activations to the next one's.
    """
    chain = is_chain(logits.origin, (nnx.Linear,), params)
    checks.require(chain, 'network: "neuron" needs a models.Network of plain nnx.Linear; use '
                   '"gauss_newton" or "one_hot"')  # fmt: skip
    widest = max(layer["kernel"].shape[1] for layer in params.values())

    def batch(images, labels, weights):
        z, (inputs, outputs) = shifted(logits.origin, params, images, {})
        maps = _maps(logits.origin, params)
        gradient = jax.grad(lambda z: loss(z, labels).sum())(z)
        count, one = loss_terms(loss, z, labels)
        signs, vectors = jax.vmap(one, out_axes=1)(jnp.arange(count))
        hessian, squares = jnp.einsum("nc,nci,ncj->nij", signs, vectors, vectors), {}
        for name in reversed(inputs):
            hessian = _pull_back(maps[name], outputs[name], gradient, hessian)
            gradient = jax.vjp(maps[name], outputs[name])[1](gradient)[0]
            second = weights[:, None] * jnp.diagonal(hessian, axis1=1, axis2=2)
            squares[name] = _dense_squares(inputs[name], second)
        return _like(params, squares)

    size = batch_size or max(1, min(500, 1_250_000 // widest**2))
    return mean_over_batches(batch, examples, size)

def _maps(network, params):
    """For each named layer, the map from its output to the next one's, or to the logits."""
    links, name = {}, None
    for layer in network.layers:
        if name:
            links[name].append(layer)
        if layer.name:
            name, links[layer.name] = layer.name, []

    def run(layers, x):
        for layer in layers:
            x = layer(params, x)
        return x

    return {name: partial(run, links[name]) for name in links}

def _pull_back(function, z, gradient, hessian):
    """``Jᵀ H J + Σ_k g_k ∇²function_k`` for each example; J is the function's Jacobian at z."""
    pull = jax.vmap(lambda rows: jax.vjp(function, z)[1](rows)[0], in_axes=1, out_axes=1)
    whole = pull(pull(hessian).swapaxes(1, 2))  # (H J)ᵀ J = Jᵀ H J, as H is symmetric
    bend = jax.hessian(lambda z, gradient: gradient @ function(z[None])[0])
    return whole + jax.vmap(bend)(z, gradient)
