"""Refusing bad input, in words: each error names the argument, what was found, and the remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def finite(what: str, tree: Any) -> Any:
    """Return `tree` if all its numbers are finite.

    Raises
    ------
    FloatingPointError
        If not; the message says in which leaf, and how many. Traced values pass unseen.
    """
    if _is_traced(tree):
        return tree
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not bool(jnp.isfinite(leaf).all()):
            bad = int((~jnp.isfinite(leaf)).sum())
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
                f"got {dtype or type(leaf).__name__}"
            )
    finite(name, tree)


def examples(value: Any, classes: int | None = None) -> None:
    """Raise unless `value` holds n > 0 images (uint8 or float, finite) and n labels in range."""
    if not (hasattr(value, "images") and hasattr(value, "labels")):
        raise TypeError(
            f"examples: expected Examples(images, labels), got {type(value).__name__}; "
            "pass for instance load_mnist().train"
        )
    images, labels = value.images, value.labels
    for name, array in (("images", images), ("labels", labels)):
        if not hasattr(array, "dtype"):
            raise TypeError(f"examples.{name}: expected an array, got {type(array).__name__}")
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"examples: expected images [n, ...] and labels [n], got {images.shape} and "
            f"{labels.shape}"
        )
    if len(labels) == 0:
        raise ValueError("examples: there are none; pass at least one image and its label")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"examples.labels: expected integers, got {labels.dtype}")
    if images.dtype != np.uint8:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"examples.images: expected uint8 in 0 to 255 or floats, got {images.dtype}"
            )
        finite("examples.images", images)
    if classes is not None and not _is_traced(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"examples.labels: found {low} to {high}, but the network has {classes} classes "
                f"(0 to {classes - 1})"
            )


def network_inputs(network: Any, values: Any, data: Any, batch_size: int | None = None) -> None:
    """Raise unless network, params, examples and batch size fit together."""
    if not callable(getattr(network, "apply", None)):
        raise TypeError(
            f"network: {type(network).__name__} has no apply(params, images); "
            "pass a models.Network or an object with that method"
        )
    params(values)
    examples(data)
    if batch_size is not None and not (
        isinstance(batch_size, int | np.integer) and batch_size >= 1
    ):
        raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    two = jax.ShapeDtypeStruct((2, *data.images.shape[1:]), data.images.dtype)
    try:
        logits = jax.eval_shape(network.apply, values, two)
    except Exception as error:
        raise ValueError(
            f"network, params, examples: the network cannot take images of shape "
            f"{tuple(data.images.shape[1:])} with these params ({error})"
        ) from error
    if logits.ndim != 2 or logits.shape[0] != 2:
        raise ValueError(
            f"network: apply must return logits [n, classes], got {logits.shape} for two images"
        )
    examples(data, classes=logits.shape[1])
    if not _is_traced((values, data.images)):
        same = jnp.stack([jnp.asarray(data.images[0])] * 4)
        rows = network.apply(values, same)
        if not bool(jnp.allclose(rows, rows[:1], rtol=1e-3, atol=1e-3)):
            raise ValueError(
                "network: apply gives four copies of one image different logits; "
                "switch dropout off for measuring"
            )


def same_tree(name: str, tree: Any, reference_name: str, reference: Any) -> None:
    """Raise unless two pytrees agree in structure and in the shape of each leaf."""
    one, two = jax.tree.structure(tree), jax.tree.structure(reference)
    if one != two:
        raise ValueError(
            f"{name}: expected the structure of {reference_name}, {two}, got {one}"
        )
    for (path, a), b in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(reference), strict=True
    ):
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected shape {np.shape(b)} "
                f"as in {reference_name}, got {np.shape(a)}"
            )


def one_of(name: str, value: Any, known) -> None:
    """Raise unless `value` is one of the `known` ones; the message lists them."""
    if value not in known:
        raise ValueError(f"{name}: {value!r} is unknown; choose one of {sorted(known)}")
