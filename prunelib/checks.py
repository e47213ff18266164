"""Refusing bad input, in words: each error names the argument, what was found, and the remedy.

Public functions call these once, at their door. Inside there is only mathematics. What is tested
here is what JAX itself is silent about.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(tree: Any) -> bool:
    """Whether `tree` holds values that are not known yet, inside `jit`, `vmap` or `grad`."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def concrete(name: str, tree: Any) -> None:
    """Raise TypeError inside `jit`, `vmap` or `grad`, for a function that returns plain numbers."""
    if is_traced(tree):
        raise TypeError(
            f"{name}: expected numbers, got values that are not known yet, inside jit, vmap or "
            "grad; call this function outside, or write the sum with passes.mean_over_batches"
        )


def here(array: Any) -> np.ndarray:
    """The numbers this process can see: all, or its own share of an array over processes."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.concatenate([np.ravel(shard.data) for shard in array.addressable_shards])


def finite(what: str, tree: Any) -> Any:
    """Return `tree` if all its numbers are finite, else raise FloatingPointError.

    The message says in which leaf, and how many. Traced values pass unseen.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer):
            continue
        bad = int((~np.isfinite(here(leaf))).sum())
        if bad:
            place = jax.tree_util.keystr(path) or "the array"
            raise FloatingPointError(
                f"{what}: {bad} of {np.size(leaf)} numbers in {place} are NaN or infinite; "
                "find the step that made them (often log(softmax): use logits) before going on"
            )
    return tree


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


def scores(tree: Any) -> None:
    """Raise unless `tree` is a non-empty pytree of finite real arrays, fit to be ranked."""
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        raise ValueError("scores: the pytree has no arrays; pass one shaped like params")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        real = dtype is not None and any(
            jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)
        )
        if not real:
            raise TypeError(
                f"scores{jax.tree_util.keystr(path)}: expected real numbers, "
                f"got {dtype or type(leaf).__name__}; rank the magnitude, or a real saliency"
            )
    finite("scores", tree)


def names_of(path: tuple) -> tuple[str, ...]:
    """A leaf's path as plain names, without what only wraps an array (an `nnx.Variable`)."""
    names = []
    for entry in path:
        kinds = [getattr(entry, kind) for kind in ("key", "name", "idx") if hasattr(entry, kind)]
        names.append(str(kinds[0] if kinds else entry))
    return tuple(names[:-1] if names[-1:] == ["value"] else names)


def like(name: str, tree: Any, reference_name: str, reference: Any) -> Any:
    """`tree` in the structure of `reference`, if both have the same leaves of the same shapes.

    Wrappers may differ: a dict of arrays fits an `nnx.State`, or Variables fit bare arrays.

    Raises
    ------
    ValueError
        If a leaf is missing, is too many, or has another shape.
    """
    found, expected = jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(reference)
    one, two = ({names_of(path): leaf for path, leaf in side} for side in (found, expected))
    if one.keys() != two.keys():
        raise ValueError(
            f"{name}: expected the leaves of {reference_name}, "
            f"{sorted(map('/'.join, two))}, got {sorted(map('/'.join, one))}; "
            "make it by jax.tree.map from the same params"
        )
    for path, leaf in two.items():
        if np.shape(one[path]) != np.shape(leaf):
            raise ValueError(
                f"{name}, {'/'.join(path)}: expected shape {np.shape(leaf)} "
                f"as in {reference_name}, got {np.shape(one[path])}; make it from the same params"
            )
    leaves = [one[names_of(path)] for path, _ in expected]
    return jax.tree.structure(reference).unflatten(leaves)


def booleans(mask: Any, name: str = "kept") -> None:
    """Raise TypeError unless all leaves of a mask are arrays of booleans."""
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
    if classes is None or is_traced(value) or value.size == 0:
        return
    low, high = int(here(value).min()), int(here(value).max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name}: found {low} to {high}, but there are {classes} classes (0 to {classes - 1}); "
            "number the classes from 0, or make a network with a wider last layer"
        )


def examples(value: Any) -> None:
    """Raise unless `value` holds n > 0 images (uint8 or finite floats) and n integer labels."""
    if not (hasattr(value, "images") and hasattr(value, "labels")):
        raise TypeError(
            f"examples: expected Examples(images, labels), got {type(value).__name__}; "
            "pass for instance load_mnist().train"
        )
    images, classes, real = value.images, value.labels, getattr(value, "real", None)
    for name, array in (("images", images), ("labels", classes)):
        if not hasattr(array, "dtype"):
            raise TypeError(
                f"examples.{name}: expected an array, got {type(array).__name__}; "
                "convert it with numpy.asarray"
            )
    if images.ndim < 2 or classes.ndim != 1 or len(images) != len(classes) or not len(classes):
        raise ValueError(
            f"examples: expected images [n, ...] and labels [n], n > 0, got {images.shape} and "
            f"{classes.shape}; cut both alike, and leave the first axis to the examples"
        )
    labels(classes, name="examples.labels")
    if real is not None and (real.dtype != bool or np.shape(real) != np.shape(classes)):
        raise ValueError(
            f"examples.real: expected a boolean for each label, got {real.dtype} "
            f"{np.shape(real)}; let data.place make it"
        )
    if images.dtype == np.uint8:
        return
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"examples.images: expected uint8 (0 to 255) or floats (0 to 1), "
            f"got {images.dtype}; convert them with .astype"
        )
    finite("examples.images", images)
    if not is_traced(images):
        few = here(images[:100])
        if few.max(initial=0) > 1.5 and (few == np.round(few)).all():
            raise ValueError(
                f"examples.images: found whole numbers up to {few.max():.0f} as floats, which "
                "would be taken as they are; divide grey values by 255, or pass uint8"
            )


def logits(shape: Any, examples: Any) -> None:
    """Raise unless what a network returns for two images has the form and type of logits."""
    dtype = getattr(shape, "dtype", None)
    real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not real or shape.ndim != 2 or shape.shape[0] != 2:
        found = f"{dtype or type(shape).__name__} {getattr(shape, 'shape', '')}"
        raise ValueError(
            f"network: apply must return float logits [n, classes], got {found} for two images; "
            "end it with one row for each image"
        )
    labels(examples.labels, shape.shape[1], "examples.labels")


def network(value: Any) -> Callable:
    """``value.apply``, or `value` itself if it is a function ``(params, images) -> logits``."""
    apply = getattr(value, "apply", value)
    if not callable(apply):
        raise TypeError(
            f"network: expected a function (params, images) -> logits, or an object with such an "
            f"apply, got {type(value).__name__}; pass for instance models.mlp()"
        )
    return apply


def percent(value: Any) -> Fraction:
    """A percentage from 0 to 100, exactly: 0.1 is meant as a tenth, not as the nearest double."""
    try:
        exact = Fraction(str(value)) if np.ndim(value) == 0 else None
    except ValueError:
        exact = None
    if exact is None or isinstance(value, str) or not 0 <= exact <= 100:
        raise ValueError(
            f"percent: expected a number from 0 to 100, got {value!r}; it is the share to prune"
        )
    return exact


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (integer and value >= least):
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def seeds(value: Any) -> tuple[int, ...]:
    """The seeds as a tuple of distinct integers, or an error that says what to pass instead."""
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError(
            f"seeds: expected several integers, got {value!r}; pass range({value!r}) for so many "
            f"seeds, or [{value!r}] for that one"
        )
    found = list(value)
    integers = [isinstance(s, int | np.integer) and not isinstance(s, bool) for s in found]
    if not found or not all(integers) or len(set(found)) < len(found):
        raise ValueError(f"seeds: expected distinct integers, got {found}; pass e.g. range(5)")
    return tuple(int(seed) for seed in found)


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the `known` names; the message lists them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: {value!r} is unknown; choose one of {sorted(known)}")
