"""The pictures of the series: one style, one colour for each criterion, one function a figure.

Every figure is saved beside the CSV it was drawn from: ``figures/result.png`` and
``figures/result.csv``.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "figures"

# Okabe and Ito's palette, safe for colour-blind readers. The same criterion has the same colour in
# every figure; a solid line ranks all layers together, a dashed one each layer by itself.
COLOURS = {
    "magnitude": "#0072B2",
    "obd": "#D55E00",
    "random": "#7F7F7F",
    "dropout": "#009E73",
    "published": "#000000",
    "other": "#CC79A7",
    "accent": "#E69F00",
    "light": "#56B4E9",
}
LINES = {"all": "-", "layer": "--"}
NAMES = {"magnitude": "magnitude", "obd": "OBD", "random": "random"}
SCOPE_NAMES = {"all": "all layers", "layer": "layer by layer"}
STYLE = {
    "figure.figsize": (7.5, 4.5),
    "figure.dpi": 110,
    "savefig.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "image.cmap": "viridis",
}


def new(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **options):
    """A figure and its axes in the style of the series; `size` in inches, (width, height)."""
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=size or STYLE["figure.figsize"], **options)


def band(axes, x, runs, label, colour, line="-", **options) -> None:
    """The mean over runs (the first axis of `runs`) as a line, their range as a band."""
    runs = np.asarray(runs)
    axes.plot(x, runs.mean(0), line, color=colour, label=label, **options)
    axes.fill_between(x, runs.min(0), runs.max(0), color=colour, alpha=0.2, linewidth=0)


def save(figure, name: str, table: dict[str, list], note: str = "") -> None:
    """Write ``figures/<name>.png``, and beside it ``<name>.csv`` with the columns of `table`.

    Raises
    ------
    ValueError
        If the columns of `table` differ in length.
    """
    lengths = {column: len(values) for column, values in table.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"table: columns must have one length, got {lengths}")
    FOLDER.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        if note:
            file.write(f"# {note}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*(map(_text, column) for column in table.values()), strict=True))


def _text(value):
    return f"{value:.6g}" if isinstance(value, float | np.floating) else value
