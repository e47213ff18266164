"""Refusing, at the public doors, what JAX is silent about: each error names the argument, what was
found, and the remedy.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require(good: bool, message: str, kind: type[Exception] = ValueError) -> None:
    """Raise `kind` with this message unless `good`."""
    if not good:
        raise kind(message)


def is_traced(tree: Any) -> bool:
    """Whether `tree` holds values that are not known yet, inside `jit`, `vmap` or `grad`."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def concrete(name: str, tree: Any) -> None:
    """Raise TypeError inside `jit`, `vmap` or `grad`, for a function that returns plain numbers."""
    require(not is_traced(tree), f"{name}: expected numbers, got values that are not known yet, "
            "inside jit, vmap or grad; call this outside, or use passes.mean_over_batches there",
            TypeError)  # fmt: skip


def here(array: Any) -> np.ndarray:
    """The numbers this process can see: all, or its own share of an array over processes."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.concatenate([np.ravel(shard.data) for shard in array.addressable_shards])


def finite(what: str, tree: Any) -> Any:
    """`tree`, if all its numbers that are known are finite; else raise FloatingPointError."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_traced(leaf) and (bad := int((~np.isfinite(here(leaf))).sum())):
            raise FloatingPointError(
                f"{what}: {bad} of {np.size(leaf)} numbers in {jax.tree_util.keystr(path)} are "
                "NaN or infinite; find the step that made them (often log(softmax): use logits)"
            )
    return tree


def params(tree: Any, name: str = "params", kinds: tuple = (jnp.floating,)) -> None:
    """Raise unless `tree` is a non-empty pytree of finite arrays of these kinds of numbers."""
    leaves = jax.tree.leaves_with_path(tree)
    require(leaves, f"{name}: the pytree has no arrays; pass one as network.init returns it")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        good = dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)
        require(good, f"{name}{jax.tree_util.keystr(path)}: expected an array of real numbers, got "
                f"{dtype or type(leaf).__name__}; convert it to float32", TypeError)  # fmt: skip
    finite(name, tree)


def booleans(mask: Any, name: str = "kept") -> None:
    """Raise TypeError unless all leaves of a mask are arrays of booleans."""
    for leaf in jax.tree.leaves(mask):
        found = getattr(leaf, "dtype", type(leaf).__name__)
        require(found == np.dtype(bool), f"{name}: expected booleans, got {found}; make masks by "
                "pruning.mask", TypeError)  # fmt: skip


def names_of(path: tuple) -> tuple[str, ...]:
    """A leaf's path as plain names, without what only wraps an array (an `nnx.Variable`)."""
    wrapped = path and getattr(path[-1], "name", None) == "value"  # an attribute, not a key
    kinds = ("key", "name", "idx")
    return tuple(
        str(next((getattr(entry, kind) for kind in kinds if hasattr(entry, kind)), entry))
        for entry in (path[:-1] if wrapped else path)
    )


def like(name: str, tree: Any, reference_name: str, reference: Any) -> Any:
    """`tree` in the structure of `reference`, if both have the same leaves of the same shapes.

    Wrappers may differ (a dict of arrays fits an `nnx.State`, Variables fit bare arrays). Raises
    ValueError if a leaf is missing, is too many, or has another shape.
    """
    found, expected = jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(reference)
    one, two = ({names_of(path): leaf for path, leaf in side} for side in (found, expected))
    here, there = ({"/".join(k): np.shape(v) for k, v in side.items()} for side in (one, two))
    require(here == there, f"{name}: expected the arrays of {reference_name}, {there}, got {here}; "
            "make it by jax.tree.map from the same params")  # fmt: skip
    return jax.tree.structure(reference).unflatten([one[names_of(path)] for path, _ in expected])


def labels(value: Any, classes: int | None = None, name: str = "labels") -> None:
    """Raise unless `value` is an array of integers, each from 0 to ``classes - 1`` if given."""
    found = getattr(value, "dtype", type(value).__name__)
    integers = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)
    require(integers, f"{name}: expected an array of integers, got {found}; for one-hot labels "
            "take the argmax", TypeError)  # fmt: skip
    if classes is not None and not is_traced(value) and value.size:
        low, high = int(here(value).min()), int(here(value).max())
        require(low >= 0 and high < classes, f"{name}: found {low} to {high}, classes: {classes}; "
                "number them from 0, or make a wider last layer")  # fmt: skip


def examples(value: Any) -> None:
    """Raise unless `value` holds n > 0 images (uint8 or finite floats) and n integer labels."""
    images, classes = getattr(value, "images", None), getattr(value, "labels", None)
    require(hasattr(images, "dtype") and hasattr(classes, "dtype"), "examples: expected "
            f"Examples(images, labels) of arrays, got {type(value).__name__}; pass for instance "
            "load_mnist().train", TypeError)  # fmt: skip
    alike = images.ndim > 1 and classes.ndim == 1 and len(images) == len(classes) > 0
    require(alike, "examples: expected images [n, ...] and labels [n], n > 0, got "
            f"{images.shape} and {classes.shape}; cut both alike")  # fmt: skip
    labels(classes, name="examples.labels")
    real = getattr(value, "real", None)
    good = real is None or (real.dtype == bool and np.shape(real) == np.shape(classes))
    require(good, "examples.real: expected a boolean for each label; let data.place make it")
    if images.dtype == np.uint8:
        return
    require(jnp.issubdtype(images.dtype, jnp.floating), "examples.images: expected uint8 (0 to "
            f"255) or floats (0 to 1), got {images.dtype}; convert them", TypeError)  # fmt: skip
    finite("examples.images", images)
    few = np.zeros(1) if is_traced(images) else here(images[:100]).astype(np.float32)
    require(few.max(initial=0) <= 1.5 or (few != np.round(few)).any(), "examples.images: found "
            f"whole numbers up to {few.max(initial=0):.0f} as floats, which would be taken as they "
            "are; divide grey values by 255, or pass uint8")  # fmt: skip


def logits(shape: Any, examples: Any) -> None:
    """Raise unless what a network returns for two images has the form and type of logits."""
    good = hasattr(shape, "dtype") and jnp.issubdtype(shape.dtype, jnp.floating)
    require(good and shape.shape[:-1] == (2,), f"network: apply must return float logits "
            f"[n, classes], got {shape} for two images; end it with one row for each")  # fmt: skip
    labels(examples.labels, shape.shape[1], "examples.labels")


def network(value: Any) -> Callable:
    """``value.apply``, or `value` itself if it is a function ``(params, images) -> logits``."""
    apply = getattr(value, "apply", value)
    require(callable(apply), "network: expected a function (params, images) -> logits, or one with "
            f"such an apply, got {type(value).__name__}; pass models.mlp()", TypeError)  # fmt: skip
    return apply


def percent(value: Any) -> Fraction:
    """A percentage from 0 to 100, exactly: 0.1 is meant as a tenth, not as the nearest double."""
    try:
        exact = Fraction(-1) if np.ndim(value) or isinstance(value, str) else Fraction(str(value))
    except ValueError:
        exact = Fraction(-1)
    require(0 <= exact <= 100, f"percent: expected the share to prune, 0 to 100, got {value!r}")
    return exact


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(integer and value >= least, f"{name}: expected an integer of at least {least}, got "
            f"{value!r}")  # fmt: skip


def seeds(value: Any) -> tuple[int, ...]:
    """The seeds as a tuple of distinct integers, or an error that says what to pass instead."""
    found = list(value) if isinstance(value, Iterable) else [None]
    integers = all(isinstance(s, int | np.integer) and not isinstance(s, bool) for s in found)
    good = found and integers and len(set(found)) == len(found)
    require(good, f"seeds: expected distinct integers, got {value!r}; pass range(5), or [5] "
            "for that one")  # fmt: skip
    return tuple(int(seed) for seed in found)


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the `known` names; the message lists them."""
    good = isinstance(value, str) and value in known
    require(good, f"{name}: {value!r} is unknown; choose one of {sorted(known)}")
