"""One style for the pictures of the series, and keeping a picture with the table it shows.

What a figure shows is drawn in its notebook; here is only what they share.
"""

import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from prunelib import checks

# One colour, one meaning, safe for colour-blind readers (Okabe and Ito; recipes: Tol).
COLOURS = {
    "magnitude": "#0072B2",
    "obd": "#D55E00",
    "obs": "#009E73",
    "random": "#7F7F7F",
    "published": "#000000",
    # the terms of the Taylor expansion
    "first": "#CC79A7",
    "diagonal": "#E69F00",
    "cross": "#56B4E9",
    "higher": "#8C6D46",
    "actual": "#000000",
    # recipes
    "adam": "#332288",
    "adamw": "#6699CC",
    "sgd": "#117733",
    "sgd_decay": "#999933",
    "dropout": "#AA4499",
}
NAMES = {"magnitude": "magnitude", "obd": "OBD", "obs": "OBS", "random": "random"}
LINES = {"all": "-", "layer": "--"}  # one ranking over all layers, or one for each array
STYLE = {
    "figure.figsize": (7.5, 4.5),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
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


def lines(
    ax,
    table: pd.DataFrame,
    y: str = "accuracy",
    x: str = "remaining",
    by: str = "criterion",
    scale: float = 100,
    colours: dict[str, str] | None = None,
    names: dict[str, str] | None = None,
    ends: bool = True,
    **options,
) -> None:
    """For each value of column `by`, the mean over rows of the same x as a line, labelled at its
    end, and their range as a band. `y` is multiplied by `scale` (100: a fraction as a percentage).
    """
    colours, names = colours or COLOURS, names or NAMES
    for key, rows in table.groupby(by, sort=False):
        runs = scale * rows.groupby(x)[y].agg(["mean", "min", "max"]).sort_index(ascending=False)
        (line,) = ax.plot(
            runs.index, runs["mean"], color=colours.get(key), label=names.get(key, key), **options
        )
        ax.fill_between(
            runs.index, runs["min"], runs["max"], color=line.get_color(), alpha=0.2, linewidth=0
        )
    if ends:
        label_ends(ax)


def remaining_axis(ax, low: float = 0, high: float = 100, log: bool = False) -> None:
    """The x axis of the series: weights remaining, in percent, falling to the right."""
    ax.set_xlabel("weights remaining (%)")
    if log:
        ax.set_xscale("log")
        ticks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5) if low <= t <= high]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    ax.set_xlim(high, low)


def label_ends(ax, space: float = 0.06) -> None:
    """Write each line's label at its right end, in its colour, kept `space` of the height apart."""
    right = ax.get_xlim()
    found = []
    for line in ax.get_lines():
        x, y = (np.asarray(d, float) for d in line.get_data())
        if len(x) < 2 or line.get_label().startswith("_"):
            continue
        inside = (x >= min(right)) & (x <= max(right)) & np.isfinite(y)
        if not inside.any():
            continue
        to_axes = ax.transData + ax.transAxes.inverted()
        points = to_axes.transform(np.column_stack([x[inside], y[inside]]))
        found.append([*points[points[:, 0].argmax()], line])
    found.sort(key=lambda entry: entry[1])
    for lower, upper in zip(found, found[1:], strict=False):
        upper[1] = max(upper[1], lower[1] + space)
    for x, y, line in found:
        ax.annotate(
            line.get_label(), (x, y), (4, 0), "axes fraction", textcoords="offset points",
            color=line.get_color(), va="center", fontsize=10, annotation_clip=False,
        )  # fmt: skip


def pictures(named: dict[str, Any], columns: int | None = None, size: float = 2.0, **options):
    """Pixel maps ``[784]`` or ``[h, w]`` side by side, each under its name; a figure and its axes.

    `options` go to `imshow` (`cmap`, `vmin`, `vmax`, `norm`).
    """
    columns = columns or len(named)
    rows = -(-len(named) // columns)
    figure, axes = new(rows, columns, (size * columns, (size + 0.3) * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, pixels) in zip(axes.flat, named.items(), strict=False):
        pixels = np.asarray(pixels)
        pixels = pixels.reshape(28, 28) if pixels.size == 784 else pixels
        shown = ax.imshow(pixels, **{"cmap": "gray_r", **options})
        ax.set_title(name, fontsize=10, loc="center")
    figure.shown = shown
    return figure, axes


def stacked(ax, table: pd.DataFrame, names: dict[str, str] | None = None) -> None:
    """Horizontal bars, one a row of `table`, its columns stacked: negative ones to the left."""
    names = names or {}
    places = np.arange(len(table))[::-1]
    left, right = np.zeros(len(table)), np.zeros(len(table))
    for column in table:
        widths = table[column].to_numpy(float)
        starts = np.where(widths < 0, left, right)
        label = names.get(column, column)
        ax.barh(places, widths, 0.6, starts, color=COLOURS.get(column), label=label)
        left, right = left + np.minimum(widths, 0), right + np.maximum(widths, 0)
    ax.set_yticks(places, table.index)
    ax.axvline(0, color="black", linewidth=0.8)


def folder() -> Path:
    """``figures/`` of the project around the working folder; of the working folder if none is."""
    here = Path.cwd()
    project = (p for p in (here, *here.parents) if (p / "pyproject.toml").is_file())
    return next(project, here) / "figures"


def save(figure, name: str, table: pd.DataFrame) -> None:
    """Keep a picture and the table it shows: ``figures/<name>.png`` and ``<name>.csv``.

    The table is plain UTF-8, six digits, for `pandas.read_csv` without options. Where it agrees
    with the one stored, up to rounding, both files stay as they are. A folder that cannot be
    written warns, and ends nothing.

    Raises
    ------
    TypeError, ValueError
        If `figure` is no Matplotlib figure, `name` no plain name, or `table` no DataFrame with
        rows and plain columns.
    FloatingPointError
        If a number in the table is infinite.
    """
    if not hasattr(figure, "savefig"):
        raise TypeError(f"figure: expected a Matplotlib figure, got {type(figure).__name__}")
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name: expected a plain name such as 'result', got {name!r}")
    if not isinstance(table, pd.DataFrame) or table.empty or table.columns.nlevels > 1:
        raise ValueError("table: expected a DataFrame with rows and plain columns; see reset_index")
    numbers = table.select_dtypes("number").to_numpy(float)
    checks.finite(f"table of {name!r}", np.nan_to_num(numbers, posinf=np.inf, neginf=-np.inf))
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    picture, values = folder() / f"{name}.png", folder() / f"{name}.csv"
    try:
        if picture.exists() and values.exists() and _agree(values, text):
            return
        folder().mkdir(parents=True, exist_ok=True)
        _replace(values, lambda file: file.write_text(text, encoding="utf-8"))
        with plt.rc_context(STYLE):
            _replace(picture, lambda file: figure.savefig(file, dpi=130, metadata={"Software": None}))
    except OSError as error:
        warnings.warn(f"figure {name!r} is not kept: {error}", stacklevel=2)


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    unfinished = file.with_name(f".{file.stem}-unfinished{file.suffix}")
    write(unfinished)
    os.replace(unfinished, file)


def _agree(file: Path, text: str, tolerance: float = 1e-3) -> bool:
    """Whether a stored table is the new one, but for rounding and other processors' last digits."""
    old, new = pd.read_csv(file), pd.read_csv(io.StringIO(text))
    try:
        pd.testing.assert_frame_equal(old, new, rtol=tolerance, atol=1e-7)
    except AssertionError:
        return False
    return True


def show(figure, alt: str) -> None:
    """Display a figure with an alternative text: what it shows, for those who do not see it."""
    file = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=STYLE["figure.dpi"], metadata={"Software": None})
    plt.close(figure)
    picture = {"image/png": file.getvalue(), "text/plain": alt}
    display(picture, raw=True, metadata={"image/png": {"alt": alt}})
