"""Execute the notebooks in place, in reading order, and store them in their tidy form.

    python scripts/run_notebooks.py [--tidy] [NOTEBOOK ...]

A notebook that fails keeps its old outputs; the rest still run, and the exit status is 1.
Seconds and peak memory go to notebooks/measured.csv, from which README.md's table is made.
"""

import argparse
import csv
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
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
# Promised for the series on two cores: ten minutes if they are idle, and a third more for cores
# that are lent out elsewhere too. A test holds measured.csv to the memory; Binder allows 2 GB.
PROMISED_SECONDS, PROMISED_MB = 800, 1200
MEASURED = NOTEBOOKS / "measured.csv"


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


def execute(path: Path, label: str = "") -> tuple[float, float]:
    """Run one notebook in a fresh kernel and store it; returns seconds and peak memory in MB."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1200,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # the kernel's own, on the terminal
        resources={"metadata": {"path": str(path.parent)}},
    )
    start = time.perf_counter()
    with client.setup_kernel():
        # A bar while it runs, on a terminal only.
        cells = tqdm(notebook.cells, label, leave=False, unit="cell", disable=None)
        for index, cell in enumerate(cells):
            client.execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
        request = client.kc.execute("", silent=True, user_expressions={"peak": PEAK})
        reply = client.wait_for_reply(request)
    seconds = time.perf_counter() - start
    peak = int(reply["content"]["user_expressions"]["peak"]["data"]["text/plain"])
    tidy(notebook)
    store(notebook, path)
    return seconds, peak * PEAK_UNIT / 1e6


def record(stem: str, seconds: float, peak: float) -> None:
    """Set a notebook's row in measured.csv; a row whose notebook is gone is dropped."""
    rows = {}
    if MEASURED.exists():
        with MEASURED.open(newline="") as file:
            rows = {row["notebook"]: row for row in csv.DictReader(file)}
    rows[stem] = {"notebook": stem, "seconds": f"{seconds:.1f}", "peak_mb": f"{peak:.0f}"}
    with MEASURED.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[stem], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows) if (NOTEBOOKS / f"{key}.ipynb").exists())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all, in reading order")
    parser.add_argument("--tidy", action="store_true", help="execute nothing, only tidy")
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    if not paths:
        print("No notebooks: notebooks/NN-*.ipynb matches nothing.", file=sys.stderr)
        return 1
    if arguments.tidy:
        for path in paths:
            notebook = nbformat.read(path, as_version=4)
            tidy(notebook)
            store(notebook, path)
        return 0

    width = max(len(path.stem) for path in paths)
    rows, failed = [], []
    for number, path in enumerate(paths, start=1):
        label = f"[{number}/{len(paths)}] {path.stem:<{width}}"
        try:
            seconds, peak = execute(path, label)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed.append(path.stem)
            print(f"{label}  failed\n{error}", flush=True)
        else:
            rows.append((path.stem, seconds, peak))
            print(f"{label}  {seconds:7.1f} s", flush=True)
            if path.resolve().parent == NOTEBOOKS:
                record(*rows[-1])

    print(f"\n{'notebook':<{width}}  seconds  peak memory")
    for stem, seconds, peak in rows:
        print(f"{stem:<{width}}  {seconds:7.1f}  {peak:8.0f} MB")
    total, most = sum(row[1] for row in rows), max((row[2] for row in rows), default=0)
    print(f"{'all':<{width}}  {total:7.1f}  {most:8.0f} MB at most")
    kept = total <= PROMISED_SECONDS and most <= PROMISED_MB
    print(
        f"Promised for the series on two cores: {PROMISED_SECONDS} s, {PROMISED_MB} MB at most; "
        + ("kept." if kept else "NOT kept in this run.")
    )
    if failed:
        print(f"Failed, and kept as they were: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
