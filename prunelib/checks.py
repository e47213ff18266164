"""Refusing bad input, in words: each error names the argument, what was found, and the remedy."""

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
    """Raise unless `tree` is a non-empty pytree of finite floating-point arrays."""
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
    finite(name, tree)


def labels(value: Any, classes: int | None = None, name: str = "labels") -> None:
    """Raise unless `value` is an array of integers, each from 0 to ``classes - 1`` if given."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name}: expected an array of integers, got {dtype or type(value).__name__}; "
            "for one-hot labels take the argmax"
        )
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
    if isinstance(sharding := getattr(images, "sharding", None), jax.sharding.NamedSharding):
        mesh(sharding.mesh, "examples: their mesh")
    if images.dtype != np.uint8:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"examples.images: expected uint8 (0 to 255) or floats (0 to 1), "
                f"got {images.dtype}; convert them with .astype"
            )
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


def network_inputs(network: Any, values: Any, data: Any, batch: int | None = None) -> None:
    """Raise unless network, params, examples and batch size fit together."""
    if not callable(getattr(network, "apply", None)):
        raise TypeError(
            f"network: {type(network).__name__} has no apply(params, images); "
            "pass a models.Network or an object with that method"
        )
    try:
        hash(network)
    except TypeError as error:
        raise TypeError(
            f"network: {type(network).__name__} cannot be hashed, and a compiled program is kept "
            "for each network; pass a models.Network, or give its class __hash__ and __eq__"
        ) from error
    params(values)
    examples(data)
    batch_size(batch)
    two = jax.ShapeDtypeStruct((2, *data.images.shape[1:]), data.images.dtype)
    try:
        logits = jax.eval_shape(network.apply, values, two)
    except Exception as error:
        raise ValueError(
            f"network, params, examples: the network cannot take images of shape "
            f"{tuple(data.images.shape[1:])} with these params ({error}); "
            "use params that this network.init made, and images of the shape it was made for"
        ) from error
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 2:
        found = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(
            f"network: apply must return logits [n, classes], got {found} for two images; "
            "end it with one row for each image"
        )
    labels(data.labels, logits.shape[1], "examples.labels")
    if not is_traced((values, data.images)):
        first = jnp.asarray(data.images[0])
        rows = np.asarray(network.apply(values, jnp.stack([first] * 4)))
        finite("network: the logits of the first image", rows)
        if not np.allclose(rows, rows[:1], rtol=1e-3, atol=1e-3):
            raise ValueError(
                "network: apply gives four copies of one image different logits; "
                "switch dropout off for measuring"
            )
        blank = jnp.zeros_like(first)
        among_others = np.asarray(network.apply(values, jnp.stack([first, blank, blank, blank])))
        if not np.allclose(among_others[0], rows[0], rtol=1e-3, atol=1e-3):
            raise ValueError(
                "network: apply gives the first image other logits among other images; "
                "switch batch normalization to its running averages for measuring"
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
