"""List the numbers in the notebooks' prose that nothing in the same notebook shows.

    python scripts/prose_numbers.py [NOTEBOOK ...]

Places to look at, not faults: a number that is quoted from a paper is fine, one that the code gave
before it was changed is not. Looked for are decimal numbers, percentages and factors; as shown
counts a number in the code or its outputs that gives the one in the text when it's rounded to as
many digits, as it stands or as a percentage.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
ANY = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
CLAIMED = re.compile(r"(?<![\w.,])(\d[\d,]*\.\d+|\d[\d,]*(?= ?(?:%|×|times\b|points?\b)))")
# Not claims: code, formulas, links, and the solutions of exercises, which have no outputs.
ASIDE = re.compile(
    r"<details>.*?</details>|```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\[[^]]*\]\([^)]*\)|<[^>]*>",
    re.DOTALL,
)


def value(number: str) -> float:
    return float(number.replace(",", ""))


def shown_numbers(notebook: nbformat.NotebookNode) -> list[float]:
    """The numbers in a notebook's code, and in what its cells print or display as text."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts.append(cell.source)
            for output in cell.outputs:
                data = output.get("data", {})
                texts += [output.get("text", ""), data.get("text/plain", "")]
                texts.append(data.get("text/markdown", ""))
    return [value(number) for text in texts for number in ANY.findall(text)]


def unshown(notebook: nbformat.NotebookNode) -> list[tuple[int, str]]:
    """The cell's index and the words around it, for each number that only the prose has."""
    shown, found = shown_numbers(notebook), []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        prose = ASIDE.sub(" ", cell.source)
        for match in CLAIMED.finditer(prose):
            number, digits = value(match[1]), len(match[1].partition(".")[2])
            half = 0.5 * 10.0**-digits * 1.001
            if not any(abs(s * of - number) <= half for s in shown for of in (1, 100, 0.01)):
                around = prose[max(0, match.start() - 40) : match.end() + 20]
                found.append((index, " ".join(around.split())))
    return found


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        for index, around in unshown(nbformat.read(path, as_version=4)):
            print(f"{path.name}, cell {index}, shown by no output: … {around} …")
