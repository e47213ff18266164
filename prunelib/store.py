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

import numpy as np

Arrays = dict[str, np.ndarray]
SHIPPED = Path(__file__).with_name("runs")


def cache_dir() -> Path:
    """Folder for what is worth keeping between runs; it may not exist yet.

    `$PRUNELIB_CACHE`, else ``prunelib`` in `$XDG_CACHE_HOME`, in ``~/.cache`` or, where no home is
    known, in the folder for temporary files.
    """
    if own := os.environ.get("PRUNELIB_CACHE"):
        return Path(own).expanduser()
    try:
        shared = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        shared = tempfile.gettempdir()
    return Path(shared, "prunelib")


def kept(name: str, settings: dict, make: Callable[[], Arrays]) -> Arrays:
    """What is kept under `name` with these (JSON-able) `settings`; else `make()`, kept from now on.

    Looked for among the shipped runs, then in `cache_dir()`, where new ones go. A file that is
    damaged, or was made with other settings, is passed over with a warning that says so.
    """
    wanted = json.loads(json.dumps(settings))
    for file in (SHIPPED / f"{name}.npz", cache_dir() / f"{name}.npz"):
        try:
            arrays, found = read(file)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:  # whatever is wrong with a kept copy, the remedy is a new one
            warn(f"{file} is damaged ({type(error).__name__}: {error}); making it anew")
            continue
        if found == wanted:
            return arrays
        other = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
        warn(f"{file} was made with another {', '.join(other)}; making it anew")
    arrays = make()
    keep(cache_dir() / f"{name}.npz", arrays, settings)
    return arrays


def keep(file: Path, arrays: Arrays, settings: dict) -> None:
    """`write`, or a warning where that cannot be done."""
    try:
        write(file, arrays, settings)
    except Exception as error:  # a full disk is not always an OSError
        warn(f"{file} cannot be kept ({type(error).__name__}: {error}); choose another folder")


def write(file: Path, arrays: Arrays, settings: dict) -> None:
    """Write `arrays` and `settings` to `file`; a reader sees the old file or the new, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = np.array(json.dumps(settings))
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".unfinished-") as folder:
        whole = Path(folder, "whole.npz")
        np.savez_compressed(whole, settings=text, **{f"array/{k}": v for k, v in arrays.items()})
        os.replace(whole, file)


def read(file: Path) -> tuple[Arrays, dict]:
    """The arrays and settings in `file`. Raises whatever is wrong; each array has a checksum."""
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
        names = [name for name in found.files if name != "settings"]
        arrays = {name.removeprefix("array/"): found[name] for name in names}
        return arrays, json.loads(str(found["settings"]))


def warn(message: str) -> None:
    """A warning that points at the caller of this package's function, or near."""
    warnings.warn(message, stacklevel=4)
