"""Keeping arrays by name: one ``.npz`` file each, written whole or not at all.

A file holds named arrays and one text in JSON, the settings they were made with. Nothing is
recognised by its content: the name finds the file, and settings that differ are said aloud.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

Arrays = dict[str, np.ndarray]
SHIPPED = Path(__file__).with_name("runs")


def cache_dir() -> Path:
    """Folder for what is worth keeping between runs; it may not exist yet.

    `$PRUNELIB_CACHE`, else `$XDG_CACHE_HOME/prunelib`, else `~/.cache/prunelib`, else (where no
    home is known) a folder for temporary files.
    """
    if own := os.environ.get("PRUNELIB_CACHE"):
        return Path(own).expanduser()
    try:
        shared = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        shared = tempfile.gettempdir()
    return Path(shared, "prunelib")


def kept(name: str, settings: dict, make: Callable[[], Arrays]) -> Arrays:
    """What is kept under `name` with these `settings`; else what `make()` gives, kept from now on.

    Looked for among the shipped runs, then in `cache_dir()`, where new ones go. A file that is
    damaged, or was made with other settings, is passed over with a warning that says so.

    Parameters
    ----------
    name : str
    settings : dict
        What the arrays depend on; JSON-able.
    make : callable
        ``() -> {name: array}``; called only if nothing that fits is kept.
    """
    for folder in (SHIPPED, cache_dir()):
        try:
            arrays, found = read(folder / f"{name}.npz")
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever is wrong with a kept copy, the remedy is a new one
            _warn(f"{folder / name}.npz is damaged ({type(error).__name__}: {error}); making anew")
            continue
        wanted = json.loads(json.dumps(settings))
        if found == wanted:
            return arrays
        other = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
        _warn(f"{folder / name}.npz was made with another {', '.join(other)}; making it anew")
    arrays = make()
    try:
        write(cache_dir() / f"{name}.npz", arrays, settings)
    except Exception as error:  # a full disk is not always an OSError
        _warn(f"{name} cannot be kept in {cache_dir()} ({error}); set PRUNELIB_CACHE to another")
    return arrays


def write(file: Path, arrays: Arrays, settings: dict) -> None:
    """Write `arrays` and `settings` to `file`; a reader sees the old file or the new, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = np.array(json.dumps(settings))
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".unfinished-") as folder:
        whole = Path(folder, file.name)
        np.savez_compressed(whole, settings=text, **{f"array/{k}": v for k, v in arrays.items()})
        os.replace(whole, file)


def read(file: Path) -> tuple[Arrays, dict]:
    """The arrays and settings in `file`. Raises whatever is wrong; each array has a checksum."""
    with np.load(file, allow_pickle=False) as found:
        names = [name for name in found.files if name != "settings"]
        arrays = {name.removeprefix("array/"): found[name] for name in names}
        return arrays, json.loads(str(found["settings"]))


def flat(tree: Any, prefix: str = "") -> Arrays:
    """A pytree of nested dicts as ``{"prefix/layer/kernel": array}``."""
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join([prefix, *(e.key for e in path)]): np.asarray(a) for path, a in leaves}


def nested(arrays: Arrays, prefix: str = "") -> dict:
    """The inverse of `flat`: nested dicts, of the arrays whose names start with the prefix."""
    tree: dict = {}
    for name, array in arrays.items():
        first, *path, last = name.split("/")
        if first == prefix:
            place = tree
            for key in path:
                place = place.setdefault(key, {})
            place[last] = array
    return tree


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
