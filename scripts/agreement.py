"""Does a cell's new output say the same as the stored one? Then the stored one is kept.

So a run on another processor, whose last digits differ, leaves the checkout clean, and whatever
has really changed stands out in `git diff`.
"""

import ast
import base64
import configparser
import io
import math
import re
from pathlib import Path

import numpy as np
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# Numbers with a point or an exponent may differ by this much, relative to the larger one: two
# processors' sums of float32 differ by less, what a reader would call another result by more.
RELATIVE = 1e-3
# Mean over all pixels, of the full range. Noise of 1e-5 in what is drawn changes less; one other
# digit in a label changes more, a curve that moves by its own width a hundred times as much.
PIXELS = 3e-5
MEASURED = "nbval-ignore-output"  # the tag of cells whose outputs no two runs share
NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?")


def sanitizers() -> list[tuple[str, str]]:
    """What nbval replaces before it compares: pairs of a pattern and its replacement."""
    config = configparser.RawConfigParser()
    config.read(ROOT / "tests" / "nbval_sanitize.cfg", encoding="utf-8")
    return [(config[name]["regex"], config[name]["replace"]) for name in config.sections()]


SANITIZERS = sanitizers()


def sanitized(text: str) -> str:
    """A text as nbval compares it."""
    for pattern, replacement in SANITIZERS:
        text = re.sub(pattern, replacement, text)
    return text


def same_number(one: str, other: str) -> bool:
    """Whether two numbers are equal, or nearly: a whole number is a count, and must be equal."""
    a, b = (float(number.replace(",", "").replace("−", "-")) for number in (one, other))
    counts = not re.search("[.e]", one + other)
    return a == b if counts else math.isclose(a, b, rel_tol=RELATIVE)


def same_text(one: str, other: str, numbers: bool = True) -> bool:
    """Whether two texts or HTML tables have the same words and, unless told otherwise, numbers."""
    one, other = sanitized(one), sanitized(other)
    if one == other:
        return True
    words = [" ".join(NUMBER.sub("0", text).split()) for text in (one, other)]
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=False)
    return words[0] == words[1] and (not numbers or all(same_number(*pair) for pair in pairs))


def same_picture(one: str, other: str) -> bool:
    """Whether two PNG files, in base64, show nearly the same."""
    if one == other:
        return True
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA"), np.int16)
        for png in (one, other)
    ]
    if pictures[0].shape != pictures[1].shape:
        return False
    return float(np.abs(pictures[0] - pictures[1]).mean()) <= 255 * PIXELS


def texts(outputs: list[NotebookNode]) -> list[str]:
    """What outputs show as text, as nbval compares it."""
    shown = [{"text": output.get("text", ""), **output.get("data", {})} for output in outputs]
    return [sanitized(str(one[kind])) for one in shown for kind in one if kind != "image/png"]


def same_outputs(stored: list[NotebookNode], new: list[NotebookNode], measured=False) -> bool:
    """Whether a cell's outputs agree: as many, of the same kinds, showing the same.

    Of measured ones neither the numbers nor the pictures count, only the words and the kinds.
    """
    if len(stored) != len(new):
        return False
    for one, other in zip(stored, new, strict=True):
        shown = [{"text": o.get("text", ""), **o.get("data", {})} for o in (one, other)]
        if one.output_type != other.output_type or shown[0].keys() != shown[1].keys():
            return False
        if one.get("metadata") != other.get("metadata"):  # an alternative text, say
            return False
        for kind, value in shown[0].items():
            pair = value, shown[1][kind]
            if kind == "image/png":
                if not (measured or same_picture(*pair)):
                    return False
            elif not isinstance(value, str):  # JSON
                if pair[0] != pair[1]:
                    return False
            elif not same_text(*pair, numbers=not measured):
                return False
    return True


def saved_figures(source: str) -> list[str]:
    """The names under which code saves figures, ``figures.save(figure, "name", table)``."""
    if "figures.save(" not in source:
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    saves = [call for call in calls if ast.unparse(call.func) == "figures.save"]
    return [call.args[1].value for call in saves if isinstance(call.args[1], ast.Constant)]


def keep_what_agrees(
    new: NotebookNode, stored: NotebookNode, rewritten: frozenset[str] = frozenset()
) -> tuple[list[str], int]:
    """Give the cells of a notebook, in place, their stored outputs where those agree.

    A cell with another source than before always gets its new outputs, and so does one that saved
    a figure that is `rewritten`, whose table has changed. A measured output (its cell says so by
    its tag) never agrees, and is no result: it's stored anew only when the code up to it, or an
    output before it, has changed. Returns the measured figures that thus stay as they were, and how
    many cells keep an output from which the new one differs in its last digits.
    """
    before = [cell for cell in stored.cells if cell.cell_type == "code"]
    cells = [cell for cell in new.cells if cell.cell_type == "code"]
    by_source = {cell.source: cell for cell in reversed(before)}
    unchanged, figures, rounded = True, [], 0
    for place, cell in enumerate(cells):
        unchanged &= place < len(before) and before[place].source == cell.source
        old = before[place] if unchanged else by_source.get(cell.source)
        measured = MEASURED in cell.metadata.get("tags", [])
        names = saved_figures(cell.source)
        agree = old is not None and (
            unchanged and same_outputs(old.outputs, cell.outputs, measured=True)
            if measured
            else same_outputs(old.outputs, cell.outputs) and rewritten.isdisjoint(names)
        )
        if agree:
            rounded += not measured and texts(old.outputs) != texts(cell.outputs)
            cell.outputs = old.outputs
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = cell.execution_count
            figures += names if measured else []
        unchanged &= agree
    return figures, rounded
