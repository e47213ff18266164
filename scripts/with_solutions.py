"""Copy the notebooks to a folder, with the solutions of their exercises as cells.

    python scripts/with_solutions.py PROJECT/notebooks

A solution is folded in the text: a ``<details>`` block with fenced Python. Run as a cell right
after that text, it is executed by the same check that compares the notebook's outputs. The figures
that these notebooks save go to PROJECT/figures.
"""

import argparse
import re
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
FENCED = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def with_solutions(notebook: nbformat.NotebookNode) -> int:
    """Insert, in place, each folded solution as a cell; returns how many there are."""
    cells, count = [], 0
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type != "markdown":
            continue
        for folded in FOLDED.findall(cell.source):
            for code in FENCED.findall(folded):
                count += 1
                tags = {"tags": ["nbval-ignore-output"]}
                cells.append(nbformat.v4.new_code_cell(code, metadata=tags))
    notebook.cells = cells
    return count


def main(folder: Path) -> None:
    if folder.resolve().parent == ROOT:
        raise ValueError(f"folder: {folder} would overwrite this project; name one in another")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ipynb"):
        old.unlink()
    (folder.parent / "pyproject.toml").write_text("# figures.save looks for this file\n")
    shutil.copytree(ROOT / "benchmarks", folder.parent / "benchmarks", dirs_exist_ok=True)
    (folder.parent / "figures").mkdir(exist_ok=True)
    for measured in (ROOT / "figures").glob("gpu_*.csv"):  # on a card, once
        shutil.copy(measured, folder.parent / "figures")
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        count = with_solutions(notebook)
        nbformat.write(notebook, folder / path.name)
        print(f"{path.stem}: {count} solutions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="PROJECT/notebooks, of another project than this")
    main(parser.parse_args().folder)
