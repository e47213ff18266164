"""Where compiled programs are kept between runs, for the tests and the notebooks alike.

More than half of the tests' time goes into compiling. JAX can take a program that an earlier
process compiled from a folder; each is found there by its own text and options, so a changed
program is compiled again. The folder is build/compiled-KEY: another processor or another jaxlib
has a folder of its own.
"""

import atexit
import hashlib
import os
import platform
import re
import shutil
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2_000_000_000  # bytes; a folder that has grown beyond is begun again


def processor() -> str:
    """This processor's model, and the instructions that it has."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    told = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*", cpuinfo, re.MULTILINE)
    return "\n".join(sorted(set(told)))


def drop_damaged(folder: Path) -> None:
    """Delete the programs that a process was writing when it was killed.

    JAX would warn of each at every later run, and in the tests a warning is an error. A program
    is compressed by zlib, whose end has a checksum. Those that were whole are not read again.
    """
    stamp = folder / "checked"
    before = stamp.stat().st_mtime if stamp.exists() else 0
    stamp.touch()
    for path in folder.glob("*-cache"):
        try:
            if path.stat().st_mtime >= before:
                zlib.decompress(path.read_bytes())
        except (zlib.error, OSError):
            path.unlink(missing_ok=True)


def environment(root: Path = ROOT) -> dict[str, str]:
    """The variables that make JAX keep what it compiles, to be set before JAX is imported.

    A folder that is set already, by the reader or by the process that started this one, stays. A
    checkout that cannot be written gets a folder that lives as long as this process.
    """
    if not (place := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        key = hashlib.sha256(f"{processor()} {version('jaxlib')}".encode()).hexdigest()[:12]
        folder = root / "build" / f"compiled-{key}"
        try:
            if sum(path.stat().st_size for path in folder.glob("*-cache")) > LARGEST:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            drop_damaged(folder)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="compiled-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        place = str(folder)
    return {
        "JAX_COMPILATION_CACHE_DIR": place,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
