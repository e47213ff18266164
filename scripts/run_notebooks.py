"""Execute the notebooks in place, two at a time, and store them in their tidy form.

    python scripts/run_notebooks.py [--fresh] [--tidy] [NOTEBOOK ...]

Each has half of the processor cores; the longest start first. An output that agrees with the
committed one to rounding is left as it is (agreement.py says when), so that a run which finds
nothing new changes no notebook; ``--fresh`` stores everything as it comes. A notebook that fails
is kept as it was; the rest still run, and the exit status is 1. Once all have run, seconds and
peak memory are in notebooks/measured.csv, from which README.md's table is made.
"""

import argparse
import asyncio
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import agreement
import compiled
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbclient.output_widget import OutputWidget

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What the kernel used at most, and the largest of its child processes: kB on Linux, bytes on macOS.
PEAK = "max(__import__('resource').getrusage(who).ru_maxrss for who in (0, -1))"
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024
AT_ONCE = 2  # notebooks
PROMISED_SECONDS = 480  # for the series, on two cores
MEASURED = NOTEBOOKS / "measured.csv"
SERIES = "all"  # measured.csv's row for the whole


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keep, in place, only what a reader needs: no timing, no widget state, no editor's notes."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("jupyter", "tags") if cell.metadata.get(key)}
        )
        for output in cell.get("outputs", []):
            if output.get("data", {}).pop(WIDGET, None):  # its id means nothing without a kernel
                output.data["text/plain"] = "(With a kernel running: a slider.)"


def committed(path: Path) -> nbformat.NotebookNode | None:
    """The notebook as last committed, or None: not in git yet, or no git here."""
    try:
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return nbformat.reads(shown.stdout.decode(), as_version=4)


def store(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook whole or, if killed in the middle, not at all; only if it differs."""
    text = nbformat.writes(notebook) + "\n"
    if text != path.read_text(encoding="utf-8"):
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
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
    note: str = ""


async def run(notebook: nbformat.NotebookNode, folder: Path, cores: set[int] | None) -> Measured:
    """Run a notebook's cells in a fresh kernel, on these processor cores."""
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1200,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=CRITICAL"],  # of its end, on the terminal
        resources={"metadata": {"path": str(folder)}},
    )
    client.widget_registry["@jupyter-widgets/output"]["OutputModel"] = Output
    start = time.perf_counter()
    async with client.async_setup_kernel():
        # Ctrl-C ends this script, and all kernels with it; the client's own handler ends one.
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        if cores and hasattr(os, "sched_setaffinity"):
            client.kc.execute(f"__import__('os').sched_setaffinity(0, {cores})", silent=True)
        for index, cell in enumerate(notebook.cells):
            count = client.code_cells_executed + 1
            await client.async_execute_cell(cell, index, execution_count=count)
        request = client.kc.execute("", silent=True, user_expressions={"peak": PEAK})
        reply = await client.async_wait_for_reply(request)
    peak = int(reply["content"]["user_expressions"]["peak"]["data"]["text/plain"])
    return Measured(start, time.perf_counter(), peak * PEAK_UNIT / 1e6)


async def execute(path: Path, cores: set[int] | None = None, fresh: bool = False) -> Measured:
    """Run one notebook, and store what it gives: see the top of this file."""
    notebook = nbformat.read(path, as_version=4)
    stored = None if fresh else committed(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    names = [name for source in code for name in agreement.saved_figures(source)]
    files = [path.parent.parent / "figures" / f"{n}.{end}" for n in names for end in ("png", "csv")]
    figures = {file: file.read_bytes() for file in files if file.exists()}
    took = await run(notebook, path.parent, cores)
    tidy(notebook)
    if stored is not None:
        drawn = {f.stem for f in files if f.exists() and f.read_bytes() != figures.get(f)}
        measured, rounded = agreement.keep_what_agrees(notebook, stored, frozenset(drawn))
        for file in figures:
            if file.stem in measured:
                file.write_bytes(figures[file])
        if rounded:
            took = took._replace(note=f"; outputs kept that differ in rounding: {rounded}")
    store(notebook, path)
    return took


async def execute_all(
    paths: list[Path], fresh: bool = False
) -> tuple[dict[str, Measured], list[str]]:
    """Run notebooks, `AT_ONCE` at a time; returns what they took, and those that failed."""
    before = read_measured()
    waiting = sorted(paths, key=lambda p: float(before.get(p.stem, {}).get("seconds", "inf")))
    took, failed = {}, []

    async def worker(cores):
        while waiting:
            path = waiting.pop()  # the longest one, or one that has never run
            try:
                took[path.stem] = one = await execute(path, cores, fresh)
                outcome = f"{one.end - one.start:.1f} s{one.note}"
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                failed.append(path.stem)
                outcome = f"failed\n{error}"
            print(f"[{len(took) + len(failed)}/{len(paths)}] {path.stem}: {outcome}", flush=True)

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    at_once = min(AT_ONCE, len(paths), len(cores) or AT_ONCE)
    async with asyncio.TaskGroup() as workers:
        for place in range(at_once):
            workers.create_task(worker(set(cores[place::at_once])))
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
    parser.add_argument("--fresh", action="store_true", help="store every output as it comes")
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

    os.environ |= compiled.environment()
    took, failed = asyncio.run(execute_all(paths, arguments.fresh))
    rows = table(took) if took else []
    width = max(len(path.stem) for path in paths)
    print(f"\n{'notebook':<{width}}  seconds  peak memory")
    for stem, seconds, peak in rows:
        print(f"{stem:<{width}}  {seconds:7.1f}  {peak:8.0f} MB")
    if failed:
        print(f"Failed, and kept as they were: {', '.join(failed)}", file=sys.stderr)
    elif {path.resolve() for path in paths} == set(series):
        kept = "kept" if rows[-1][1] <= PROMISED_SECONDS else "NOT kept in this run"
        print(f"Promised for the series on two cores: {PROMISED_SECONDS} s; {kept}.")
        record(rows)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
