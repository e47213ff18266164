"""Refusing bad input, in words: each error names the argument, what was found, and the remedy."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(tree: Any) -> bool:
    """Whether `tree` holds values that are not known yet, inside `jit`, `vmap` or `grad`."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def finite(what: str, tree: Any) -> Any:
    """Return `tree` if all its numbers are finite.

    Raises
    ------
    FloatingPointError
        If not; the message says in which leaf, and how many. Traced values pass unseen.
    """
    if is_traced(tree):
        return tree
    for path, leaf in jax.tree.leaves_with_path(tree):
        good = np.isfinite(_here(leaf))  # NumPy, to be out of any trace around
        if not bool(good.all()):
            bad = int((~good).sum())
            place = jax.tree_util.keystr(path) or "the array"
            raise FloatingPointError(
                f"{what}: {bad} of {np.size(leaf)} numbers in {place} are NaN or infinite; "
                "find the step that made them (often log(softmax): use logits) before going on"
            )
    return tree


def _here(array: Any) -> np.ndarray:
    """The numbers that this process can see: all, but of an array spread over processes its own."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.concatenate([np.ravel(shard.data) for shard in array.addressable_shards])


def params(tree: Any, name: str = "params") -> None:
    """Raise unless `tree` is a non-empty pytree of finite floating-point arrays, in JAX too."""
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name}: the pytree has no arrays; pass what network.init returned")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)}: expected a floating-point array, "
                f"got {dtype or type(leaf).__name__}; convert it with .astype(float32)"
            )
    convertible(name, tree)
    finite(name, tree)


def native(name: str, array: Any) -> None:
    """Raise if a NumPy array's bytes are not in this machine's order, which JAX can misread."""
    dtype = getattr(array, "dtype", None)
    if not getattr(dtype, "isnative", True):
        raise TypeError(
            f"{name}: expected numbers in this machine's byte order, got {dtype.str}; "
            "convert them with .astype(dtype.newbyteorder('='))"
        )


def convertible(name: str, tree: Any) -> None:
    """Raise if JAX, which computes in 32 bits unless told otherwise, would change NumPy's numbers.

    Rounding is no change; an overflow is, or an underflow to zero, or another integer.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        place = f"{name}{jax.tree_util.keystr(path)}"
        native(place, leaf)
        if not isinstance(leaf, np.ndarray | np.generic):
            continue
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if dtype == leaf.dtype:
            continue
        with np.errstate(over="ignore", under="ignore"):
            taken = leaf.astype(dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            lost = np.isfinite(leaf) & ~np.isfinite(taken) | ((leaf != 0) & (taken == 0))
        else:
            lost = taken.astype(leaf.dtype) != leaf
        if lost.any():
            raise ValueError(
                f"{place}: {leaf[lost].flat[0]!r} is no number in {dtype}, which JAX would make "
                f"of this {leaf.dtype}; scale the numbers, or use jax.enable_x64"
            )


def booleans(mask: Any, name: str = "kept") -> None:
    """Raise unless all leaves of a mask are arrays of booleans."""
    for leaf in jax.tree.leaves(mask):
        if getattr(leaf, "dtype", None) != np.dtype(bool):
            found = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(f"{name}: expected booleans, got {found}; make masks by pruning.mask")


def labels(value: Any, classes: int | None = None, name: str = "labels") -> None:
    """Raise unless `value` is an array of integers, each from 0 to ``classes - 1`` if given."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name}: expected an array of integers, got {dtype or type(value).__name__}; "
            "for one-hot labels take the argmax"
        )
    native(name, value)
    if classes is None or is_traced(value) or value.size == 0:
        return
    value = _here(value)
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name}: found {low} to {high}, but there are {classes} classes (0 to {classes - 1}); "
            "number the classes from 0, or make a network with a wider last layer"
        )


def examples(value: Any) -> None:
    """Raise unless `value` holds n > 0 images (uint8 or float, finite) and n integer labels."""
    if not (hasattr(value, "images") and hasattr(value, "labels")):
        raise TypeError(
            f"examples: expected Examples(images, labels), got {type(value).__name__}; "
            "pass for instance load_mnist().train"
        )
    images, classes = value.images, value.labels
    for name, array in (("images", images), ("labels", classes)):
        if not hasattr(array, "dtype"):
            raise TypeError(
                f"examples.{name}: expected an array, got {type(array).__name__}; "
                "convert it with numpy.asarray"
            )
    if images.ndim < 2 or classes.ndim != 1 or len(images) != len(classes):
        raise ValueError(
            f"examples: expected images [n, ...] and labels [n], got {images.shape} and "
            f"{classes.shape}; cut both alike, and leave the first axis to the examples"
        )
    if len(classes) == 0:
        raise ValueError("examples: there are none; pass at least one image and its label")
    labels(classes, name="examples.labels")
    real = getattr(value, "real", None)
    if real is not None and (real.dtype != bool or np.shape(real) != np.shape(classes)):
        raise ValueError(
            f"examples.real: expected a boolean for each label, got {real.dtype} "
            f"{np.shape(real)}; let data.place make it"
        )
    known = not is_traced(real) and getattr(real, "is_fully_addressable", True)
    if real is not None and known and not np.any(real):
        raise ValueError("examples.real: all are False; pass at least one example that counts")
    if isinstance(sharding := getattr(images, "sharding", None), jax.sharding.NamedSharding):
        mesh(sharding.mesh, "examples: their mesh")
    if images.dtype != np.uint8:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"examples.images: expected uint8 (0 to 255) or floats (0 to 1), "
                f"got {images.dtype}; convert them with .astype"
            )
        native("examples.images", images)
        finite("examples.images", images)


def mesh(value: Any, name: str = "mesh") -> None:
    """Raise unless `value` is a mesh over whose axes JAX itself spreads the work."""
    if not isinstance(value, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(
            f"{name}: expected a jax.sharding.Mesh, got {type(value).__name__}; "
            'make one as Mesh(jax.devices(), ("examples",))'
        )
    if set(value.axis_types) != {jax.sharding.AxisType.Auto}:
        raise ValueError(
            f"{name}: expected axes of the type Auto, got {value.axis_types}; "
            'make it as Mesh(jax.devices(), ("examples",)), not by jax.make_mesh'
        )


def batch_size(value: Any) -> None:
    """Raise unless `value` is None (a method's default) or an integer of at least 1."""
    if value is not None:
        whole("batch_size", value)


def whole(name: str, value: Any) -> None:
    """Raise unless `value` is an integer of at least 1."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (integer and value >= 1):
        raise ValueError(
            f"{name}: expected an integer of at least 1, got {value!r}; "
            "any will do, what is left over is counted too"
        )


def key(value: Any, name: str = "key") -> Any:
    """Return `value` if it is a single random key of JAX, new style or old."""
    dtype, ndim = getattr(value, "dtype", None), np.ndim(value)
    new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and ndim == 0
    if not (new or (dtype == np.uint32 and ndim == 1)):
        found = f"{dtype} {np.shape(value)}" if dtype is not None else repr(value)
        raise TypeError(
            f"{name}: expected one random key of JAX, got {found}; make one by jax.random.key(0)"
        )
    return value


def seeds(value: Any) -> tuple[int, ...]:
    """The seeds as a tuple of integers, or an error if there are none or one is no 32-bit number.

    `jax.random.key` drops the bits beyond: it would take 2**32 for 0, and give the same network.
    """
    found = tuple(value) if np.iterable(value) else (value,)
    if not found or not all(
        isinstance(s, int | np.integer) and not isinstance(s, bool) and 0 <= s < 2**32
        for s in found
    ):
        raise ValueError(
            f"seeds: expected at least one integer, each from 0 to 2**32 - 1, got {value}; "
            "pass range(5)"
        )
    return tuple(int(seed) for seed in found)


def network_inputs(
    network: Any, values: Any, data: Any, batch: int | None = None, *losses: Any
) -> None:
    """Raise unless network, params, examples, batch size and loss (if any) fit together.

    Warns if images are floats that look like bytes.
    """
    from prunelib.models import Network  # here, for these modules import this one
    from prunelib.passes import cross_entropy

    if not callable(getattr(network, "apply", None)):
        raise TypeError(
            f"network: {type(network).__name__} has no apply(params, images); "
            "pass a models.Network or an object with that method"
        )
    _hashable("network", network)
    params(values)
    examples(data)
    _warn_of_bytes(data.images)
    batch_size(batch)
    two = jax.ShapeDtypeStruct((2, *data.images.shape[1:]), data.images.dtype)
    try:
        if isinstance(network, Network):
            same_tree("params", values, "network.init", network.shapes)
        logits = jax.eval_shape(partial(_apply, network), values, two)
    except Exception as error:
        raise ValueError(
            f"network, params, examples: the network cannot take images of shape "
            f"{tuple(data.images.shape[1:])} with these params ({error}); "
            "use params that this network.init made, and images of the shape it was made for"
        ) from error
    found = f"{getattr(logits, 'dtype', type(logits).__name__)} {getattr(logits, 'shape', '')}"
    real = jnp.issubdtype(getattr(logits, "dtype", bool), jnp.floating)
    if not real or logits.ndim != 2 or logits.shape[0] != 2:
        raise ValueError(
            f"network: apply must return float logits [n, classes], got {found} for two images; "
            "end it with one row for each image"
        )
    labels(data.labels, logits.shape[1], "examples.labels")
    known = not is_traced((values, data.images, data.labels))
    if known:
        logits, places = _independent(partial(_logits, network, values), values, data.images)
    for loss in losses:
        if loss is not cross_entropy:
            of_each("loss", loss, logits, data.labels[places] if known else data.labels[:2])


def _apply(network, values, images):
    from prunelib.data import scaled

    return network.apply(values, scaled(images))


# Of a few images, so the least time goes into compiling it.
_logits = jax.jit(_apply, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def _warn_of_bytes(images) -> None:
    if images.dtype == np.uint8 or is_traced(images):
        return
    few = _here(images[:100]).astype(np.float32)
    if few.max(initial=0) > 1 and (few == np.round(few)).all():
        warnings.warn(
            f"examples.images: whole numbers up to {few.max():.0f}, as floats, are taken as they "
            "are; for grey values 0 to 255 divide by 255, or pass uint8",
            stacklevel=4,
        )


def _hashable(name, value) -> None:
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            f"{name}: {type(value).__name__} cannot be hashed, and a compiled program is kept for "
            "each; pass a models.Network or a function (its settings tuples, not lists), or give "
            "its class __hash__ and __eq__"
        ) from error


def _independent(apply, values, images) -> tuple[jax.Array, np.ndarray]:
    """The logits of some images and their places, or an error if they depend on more than these."""
    places = np.array([0, len(images) // 2, len(images) - 1, 0])
    first, middle, last, _ = some = [jnp.asarray(images[place]) for place in places]
    logits = apply(jnp.stack(some))
    finite("network: the logits of the first, middle or last image", logits)
    together = np.asarray(logits, np.float64)
    eps = max(float(jnp.finfo(w.dtype).eps) for w in jax.tree.leaves((values, logits)))
    limit = max(1e-3, 4 * eps) * np.abs(together).max()
    copies = np.asarray(apply(jnp.stack([first] * 4)), np.float64)
    if not (np.abs(copies - copies[:1]) <= limit).all():
        raise ValueError(
            "network: apply gives four copies of one image different logits; "
            "switch dropout off for measuring"
        )
    alone = [np.asarray(apply(image[None]), np.float64) for image in (middle, last)]
    if not (np.abs(together - np.concatenate([copies[:1], *alone, copies[:1]])) <= limit).all():
        raise ValueError(
            "network: apply gives an image other logits among other images; "
            "switch batch normalization to its running averages for measuring"
        )
    return logits, places


def of_each(name: str, loss: Callable, logits: Any, classes: Any) -> None:
    """Raise unless `loss` gives each example a loss of its own, ``[n, classes], [n] -> [n]``."""
    if not callable(loss):
        raise TypeError(
            f"{name}: expected a function of logits and labels, got {loss!r}; "
            "pass for instance passes.cross_entropy"
        )
    _hashable(name, loss)
    remedy = "return one loss for each example; the mean is taken here"
    like = jax.ShapeDtypeStruct(np.shape(classes), jnp.asarray(classes).dtype)
    try:
        found = getattr(jax.eval_shape(loss, logits, like), "shape", "no array")
    except Exception as error:
        raise ValueError(
            f"{name}: it cannot take logits {logits.shape} and labels {like.shape} ({error}); "
            "write it with jax.numpy for any number of examples"
        ) from error
    if found != like.shape:
        raise ValueError(
            f"{name}: expected shape {like.shape} for as many labels, got {found}; {remedy}"
        )
    if is_traced((logits, classes)) or isinstance(logits, jax.ShapeDtypeStruct):
        return
    logits, classes = jnp.asarray(_here(logits)), jnp.asarray(_here(classes))
    together = np.asarray(loss(logits, classes), np.float64)
    rows = range(len(together))
    alone = [float(loss(logits[n : n + 1], classes[n : n + 1])[0]) for n in rows]
    size = np.abs(together, where=np.isfinite(together), out=np.zeros(len(together))).max()
    if not np.allclose(together, alone, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
        raise ValueError(
            f"{name}: expected the same losses for examples together and alone, got "
            f"{together.tolist()} and {alone}; {remedy}"
        )


def same_tree(name: str, tree: Any, reference_name: str, reference: Any) -> None:
    """Raise unless two pytrees agree in structure and in the shape of each leaf."""
    one, two = jax.tree.structure(tree), jax.tree.structure(reference)
    if one != two:
        raise ValueError(
            f"{name}: expected the structure of {reference_name}, {two}, got {one}; "
            "make it by jax.tree.map from the same params"
        )
    for (path, a), b in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(reference), strict=True
    ):
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected shape {np.shape(b)} "
                f"as in {reference_name}, got {np.shape(a)}; make it from the same params"
            )


def one_of(name: str, value: Any, known) -> None:
    """Raise unless `value` is one of the `known` ones; the message lists them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: {value!r} is unknown; choose one of {sorted(known)}")
