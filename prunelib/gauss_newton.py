"""Diagonals by layers: ``z_j = Σ_i a_i W_ij + b_j``, so ``∂²E/∂W_ij² = Σ_n a_ni² ∂²E/∂z_nj²``."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from prunelib import checks
from prunelib.chains import is_chain, patches, shifted
from prunelib.linearity import is_unit_by_unit, slope, varies
from prunelib.passes import batch_of, cross_entropy, mean_over_batches


def _is_layered(logits, kinds, params) -> bool:
    """Whether, besides, each example gives a dense layer one vector, ``[n, in] -> [n, out]``."""
    if not is_chain(logits.origin, kinds, params):
        return False
    forward = partial(shifted, logits.origin, shifts={})
    z = jax.eval_shape(forward, params, logits.program.in_avals[-1])[1][1]
    return all(z[x.name].ndim == 2 for x in logits.origin.layers if x.kind is nnx.Linear)

def is_smooth_chain(logits, params) -> bool:
    """Whether `exact` knows the network: dense layers, and functions unit by unit between them."""
    return _is_layered(logits, (nnx.Linear,), params) and all(
        is_unit_by_unit(function, params[name]["kernel"].shape[1])
        for name, function in _links(logits.origin).items()
    )


def gauss_newton(logits, loss, batch_size, params, examples):
    """The diagonal of the (generalised) Gauss-Newton matrix ``Σ_n J_nᵀ ∇²_z E_n J_n``.

    It *is* the Hessian's where each single weight enters the logits piecewise linearly; for smooth
    activations it is the Levenberg-Marquardt approximation of the OBD paper. With the factor
    ``∇²_z E = Σ_c s_c s_cᵀ``, of the softmax ``s_c = √p_c (e_c - p)``, it is a sum of squares:
    back-propagate each s_c, square, add.
    """
    return _squares(logits, loss, 0, False, batch_size, params, examples, None)


def exact(logits, loss, batch_size, params, examples):
    """The diagonal of the Hessian of a chain of dense layers, with any activations f.

    The Hessian of an example's loss in a layer's pre-activations z is ``H = Aᵀ H' A + diag r``,
    with H' the next layer's, ``A = ∂z'/∂z`` and ``r = f''(z) ⊙ ∂E/∂f(z)``. So its diagonal is
    Gauss-Newton's and ``Σ_k r_mk (∂z_mk/∂z)²`` for this layer and each later one, m. With D hidden
    layers of w units that costs (D - 1)(D - 2)/2 products ``[n, w] @ [w, w]`` for each of w units.
    """
    return _squares(logits, loss, 0, True, batch_size, params, examples, None)


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
    return _squares(logits, loss, draws, False, batch_size, params, numbered, key)


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

@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _squares(logits, loss, draws, bent, batch_size, params, examples, key):
    """Σ_n weight_n Σ_c sign_nc (∂(s_ncᵀ z_n)/∂w)², and what a smooth chain's layers bend."""
    terms = partial(_drawn_terms, draws, key) if draws else partial(loss_terms, loss)
    if _is_layered(logits, (nnx.Linear, nnx.Conv), params):
        of_batch = partial(_by_layers, logits, terms, loss if bent else None, params)
        return mean_over_batches(of_batch, examples, batch_of(batch_size, logits, 5))
    gradients = 3 * sum(leaf.size for leaf in jax.tree.leaves(params))
    size = batch_of(batch_size, logits, 5, gradients)
    return mean_over_batches(partial(_by_examples, logits, terms, params), examples, size)


def _links(network):
    """For each named layer, the function from its output to the next one's input."""
    links, name = {}, None
    for layer in network.layers:
        if layer.name:
            name, links[layer.name] = layer.name, lambda z: z
        elif name:
            links[name] = lambda z, first=links[name], then=layer.function: then(first(z))
    return links

def _by_layers(logits, terms, loss, params, images, labels, weights):
    """By signals at each layer's output; nothing as large as a gradient of an example is made."""
    network = logits.origin
    forward = partial(shifted, network, params, images)
    shapes = jax.eval_shape(lambda: forward({})[1][1])
    zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
    top, pull, (inputs, z) = jax.vjp(forward, zeros, has_aux=True)
    count, one = terms(top, labels)
    conv = [layer for layer in network.layers if layer.kind is nnx.Conv]

    def add(dense, c):
        sign, vector = one(c)
        factor, signals = weights * sign, pull(vector)[0]
        dense = {name: dense[name] + factor[:, None] * signals[name] ** 2 for name in dense}
        return dense, (factor, {layer.name: signals[layer.name] for layer in conv})

    start = {name: zeros[name] for name in zeros if zeros[name].ndim == 2}
    if loss:
        top = jax.grad(lambda z: loss(z, labels).sum())(top)
        start = _bent(network, params, z, pull(top)[0], top)
        start = {name: weights[:, None] * start[name] for name in start}
    dense, (factor, signals) = jax.lax.scan(add, start, jnp.arange(count))
    out = {n: {"kernel": (inputs[n] ** 2).T @ q, "bias": q.sum(0)} for n, q in dense.items()}
    for layer in conv:
        a, by_place = inputs[layer.name], jnp.moveaxis(signals[layer.name], 0, -2)
        out[layer.name] = _conv_squares(patches(layer, params, a), by_place, factor.T)
        out[layer.name]["kernel"] = out[layer.name]["kernel"].reshape(layer.shapes["kernel"].shape)
    return {n: {kind: out[n][kind] for kind in params[n]} for n in params}  # one may have no bias

def _bent(network, params, z, gradients, top):
    """``Σ_{m ≥ l} Σ_k r_mk (∂z_mk/∂z_l)²`` for each layer l; from its z, ∂E/∂z and ∂E/∂logits."""
    names, functions = list(z), _links(network).values()
    kernels = [params[name]["kernel"] for name in names]
    above = [gradients[name] @ params[name]["kernel"].T for name in names[1:]] + [top]
    slopes = [slope(f)(z[name]) for f, name in zip(functions, names, strict=True)]
    second = [slope(slope(f))(z[name]) for f, name in zip(functions, names, strict=True)]
    r = jax.tree.map(jnp.multiply, second, above)  # f''(z) ⊙ ∂E/∂f(z)
    found = list(r)  # m = l
    for m in range(1, len(names)):  # m = l + 1, where ∂z_mk/∂z_l is a weight times a slope
        found[m - 1] += slopes[m - 1] ** 2 * (r[m] @ (kernels[m] ** 2).T)

    def from_unit(m, found, unit):  # m > l + 1: from one unit of m down, layer by layer
        weights, r = unit
        t, found = weights[None] * slopes[m - 1], list(found)
        for below in range(m - 2, -1, -1):
            t = (t @ kernels[below + 1].T) * slopes[below]
            found[below] += r[:, None] * t**2
        return found, None

    for m, f in list(enumerate(functions))[2:]:
        if varies(slope(f), [jax.typeof(r[m])]):  # else r is zero
            units = kernels[m].T, r[m].T
            found, _ = jax.lax.scan(partial(from_unit, m), found, units)
    return dict(zip(names, found, strict=True))

def _conv_squares(rows, signals, factor):
    """Patches ``[n, places, inputs]``, signals ``[n, h', w', c, out]`` -> sums over examples.

    A kernel is shared over positions: each example's gradient is summed over them, then squared.
    """
    n, _, _, classes, out = signals.shape
    flat = signals.reshape(n, -1, classes * out)
    gradients = jnp.einsum("npk,npo->nko", rows, flat).reshape(n, -1, classes, out)
    kernel = jnp.einsum("nkco,nc->ko", gradients**2, factor)
    return {"kernel": kernel, "bias": jnp.einsum("nco,nc->o", signals.sum((1, 2)) ** 2, factor)}

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
