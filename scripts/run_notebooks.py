"""Execute the notebooks in place, two at a time, and store them in their tidy form.

    python scripts/run_notebooks.py [--tidy] [NOTEBOOK ...]

Each has half of the processor cores, and takes what another one has compiled from there. The
longest start first. A notebook that fails keeps its old outputs; the rest still run, and the exit
status is 1. Once all have run, seconds and peak memory are in notebooks/measured.csv, from which
README.md's table is made.
"""

import argparse
import asyncio
import csv
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbclient.output_widget import OutputWidget
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\d+%\|.*\| \d+/\d+ \[")  # what is left of a progress bar without its kernel
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What the kernel used at most, and the largest of its child processes: kB on Linux, bytes on macOS.
PEAK = "max(__import__('resource').getrusage(who).ru_maxrss for who in (0, -1))"
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024
AT_ONCE = 2  # notebooks
# Promised for the series on two cores. A test holds measured.csv to it; Binder has as much memory.
PROMISED_SECONDS, PROMISED_MB = 600, 2000
MEASURED = NOTEBOOKS / "measured.csv"
SERIES = "all"  # measured.csv's row for the whole


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keep, in place, only what a reader needs: no timing, no widget state, no editor's notes."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("jupyter", "tags") if cell.metadata.get(key)}
        )
        outputs = cell.get("outputs", [])
        for output in outputs:
            output.get("data", {}).pop(WIDGET, None)  # its id means nothing without a kernel
        if outputs:
            cell.outputs = [
                o for o in outputs if not BAR.search(str(o.get("data", {}).get("text/plain", "")))
            ]


def store(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook whole or, if killed in the middle, not at all."""
    unfinished = path.with_suffix(".unfinished")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, path)


class Output(OutputWidget):
    """What widgets draw is caught, but not told to the kernel, which nobody looks at.

    nbclient would send it on the socket on which it waits for the cell's end, and sometimes misses
    that end: github.com/jupyter/nbclient/issues/312.
    """

    def send(self, *args, **options) -> None:
        pass


class Measured(NamedTuple):
    """What a notebook took, on its share of the cores."""

    start: float  # seconds, by time.perf_counter
    end: float
    peak: float  # MB


async def execute(path: Path, cores: set[int] | None = None, place: int = 0) -> Measured:
    """Run one notebook in a fresh kernel, on these processor cores, and store it."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1200,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=CRITICAL"],  # of its end, on the terminal
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.widget_registry["@jupyter-widgets/output"]["OutputModel"] = Output
    start = time.perf_counter()
    async with client.async_setup_kernel():
        # Ctrl-C ends this script, and all kernels with it; the client's own handler ends one.
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        if cores and hasattr(os, "sched_setaffinity"):
            client.kc.execute(f"__import__('os').sched_setaffinity(0, {cores})", silent=True)
        # A bar while it runs, on a terminal only.
        label = f"{path.stem[:24]:<24}"
        cells = tqdm(notebook.cells, label, leave=False, unit="cell", disable=None, position=place)
        for index, cell in enumerate(cells):
            count = client.code_cells_executed + 1
            await client.async_execute_cell(cell, index, execution_count=count)
        request = client.kc.execute("", silent=True, user_expressions={"peak": PEAK})
        reply = await client.async_wait_for_reply(request)
    peak = int(reply["content"]["user_expressions"]["peak"]["data"]["text/plain"])
    tidy(notebook)
    store(notebook, path)
    return Measured(start, time.perf_counter(), peak * PEAK_UNIT / 1e6)


async def execute_all(paths: list[Path]) -> tuple[dict[str, Measured], list[str]]:
    """Run notebooks, `AT_ONCE` at a time; returns what they took, and those that failed."""
    before = read_measured()

    def last(path, column, unknown):
        return float(before.get(path.stem, {}).get(column, unknown))

    def room(path):  # within the promise, going by the last time; that varies by some percent
        together = (path, *(other for other, _ in running.values()))
        expected = sum(last(p, "peak_mb", 0.9 * PROMISED_MB / AT_ONCE) for p in together)
        return expected <= 0.95 * PROMISED_MB

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    at_once = min(AT_ONCE, len(paths), len(cores) or AT_ONCE)
    shares = [set(cores[place::at_once]) for place in range(at_once)]
    free, running, took, failed = list(range(at_once)), {}, {}, []
    waiting = sorted(paths, key=lambda path: -last(path, "seconds", PROMISED_SECONDS))
    while waiting or running:
        for path in list(waiting):
            if free and (not running or room(path)):
                place = free.pop(0)
                running[asyncio.create_task(execute(path, shares[place], place))] = path, place
                waiting.remove(path)
        for task in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
            path, place = running.pop(task)
            free.append(place)
            label = f"[{len(took) + len(failed) + 1}/{len(paths)}] {path.stem}"
            try:
                took[path.stem] = task.result()
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                failed.append(path.stem)
                tqdm.write(f"{label}: failed\n{error}")
            else:
                seconds = took[path.stem].end - took[path.stem].start
                tqdm.write(f"{label}: {seconds:.1f} s")
            sys.stdout.flush()
    return took, sorted(failed)


def read_measured() -> dict[str, dict[str, str]]:
    """The rows of measured.csv by notebook, and `SERIES`; none if there is no such file."""
    if not MEASURED.exists():
        return {}
    with MEASURED.open(newline="") as file:
        return {row["notebook"]: row for row in csv.DictReader(file)}


def table(took: dict[str, Measured]) -> list[tuple[str, float, float]]:
    """Seconds and peak memory (MB) of each notebook, and of the whole: by the clock, and together.

    Together is the largest sum of the peaks of those that ran at once; each counts for itself the
    libraries that they share.
    """
    each = [(stem, m.end - m.start, m.peak) for stem, m in sorted(took.items())]
    seconds = max(m.end for m in took.values()) - min(m.start for m in took.values())
    together = max(
        sum(m.peak for m in took.values() if m.start <= one.start < m.end) for one in took.values()
    )
    return [*each, (SERIES, seconds, together)]


def record(rows: list[tuple[str, float, float]]) -> None:
    """Write measured.csv."""
    with MEASURED.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("notebook", "seconds", "peak_mb"))
        writer.writerows((stem, f"{s:.1f}", f"{peak:.0f}") for stem, s, peak in rows)


def main() -> int:
    series = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--tidy", action="store_true", help="execute nothing, only tidy")
    arguments = parser.parse_args()
    paths = arguments.notebooks or series
    if not paths:
        print("No notebooks: notebooks/NN-*.ipynb matches nothing.", file=sys.stderr)
        return 1
    if arguments.tidy:
        for path in paths:
            notebook = nbformat.read(path, as_version=4)
            tidy(notebook)
            store(notebook, path)
        return 0

    with tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        took, failed = asyncio.run(execute_all(paths))
    rows = table(took) if took else []
    width = max(len(path.stem) for path in paths)
    print(f"\n{'notebook':<{width}}  seconds  peak memory")
    for stem, seconds, peak in rows:
        print(f"{stem:<{width}}  {seconds:7.1f}  {peak:8.0f} MB")
    if failed:
        print(f"Failed, and kept as they were: {', '.join(failed)}", file=sys.stderr)
    elif {path.resolve() for path in paths} == set(series):
        _, seconds, peak = rows[-1]
        kept = seconds <= PROMISED_SECONDS and peak <= PROMISED_MB
        print(
            f"Promised for the series on two cores: {PROMISED_SECONDS} s and {PROMISED_MB} MB; "
            + ("kept." if kept else "NOT kept in this run.")
        )
        record(rows)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
