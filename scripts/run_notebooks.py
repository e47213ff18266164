"""Execute the notebooks in place, in reading order, and store them in their tidy form.

    python scripts/run_notebooks.py [--tidy] [NOTEBOOK ...]

A notebook that fails keeps its old outputs; the rest still run, and the exit status is 1.
"""

import argparse
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
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What the kernel used at most, and the largest of its child processes: kB on Linux, bytes on macOS.
PEAK = "max(__import__('resource').getrusage(who).ru_maxrss for who in (0, -1))"
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keep, in place, only what a reader needs: no timing, no widget state, no editor's notes."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("jupyter", "tags") if cell.metadata.get(key)}
        )
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # its id means nothing without a kernel


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
    nbformat.write(notebook, path)
    return seconds, peak * PEAK_UNIT / 1e6


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
            nbformat.write(notebook, path)
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

    print(f"\n{'notebook':<{width}}  seconds  peak memory")
    for stem, seconds, peak in rows:
        print(f"{stem:<{width}}  {seconds:7.1f}  {peak:8.0f} MB")
    print(f"{'all':<{width}}  {sum(row[1] for row in rows):7.1f}")
    if failed:
        print(f"Failed, and kept as they were: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
