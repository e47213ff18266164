"""One style for the pictures of the series, and keeping a picture with the table it shows.

What a figure shows is drawn in its notebook; here is only what they share.
"""

import io
import os
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from prunelib import checks
from prunelib.checks import require

# One colour, one meaning, safe for colour-blind readers (Okabe and Ito; recipes: Tol).
COLOURS = {"magnitude": "#0072B2", "obd": "#D55E00", "obs": "#009E73", "random": "#7F7F7F"}
COLOURS |= {"published": "#000000", "actual": "#000000"}
COLOURS |= {"first": "#CC79A7", "diagonal": "#E69F00", "cross": "#56B4E9", "higher": "#8C6D46"}
COLOURS |= {"adam": "#332288", "adamw": "#6699CC", "sgd": "#117733", "sgd_decay": "#999933"}
COLOURS |= {"dropout": "#AA4499"}
NAMES = {"magnitude": "magnitude", "obd": "OBD", "obs": "OBS", "random": "random"}
LINES = {"all": "-", "layer": "--"}  # one ranking over all layers, or one for each array
STYLE = {"figure.figsize": (7.5, 4.5), "figure.dpi": 110, "figure.constrained_layout.use": True}
STYLE |= {"font.size": 11, "axes.titlesize": 12, "axes.axisbelow": True, "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"grid.alpha": 0.25, "lines.linewidth": 2}


def new(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **options):
    """A figure and its axes in the style of the series; `size` in inches, (width, height)."""
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=size or STYLE["figure.figsize"], **options)


def lines(
    ax, table, y="accuracy", x="remaining", by="criterion", scale=100, colours=COLOURS, names=NAMES,
    ends=True, **options,
) -> None:  # fmt: skip
    """For each value of `by`, the mean over rows of the same x as a line, labelled at its end, and
    their range as a band; `scale` times column `y` (100: a fraction as a percentage).
    """
    for key, rows in table.groupby(by, sort=False):
        runs = scale * rows.groupby(x)[y].agg(["mean", "min", "max"]).sort_index(ascending=False)
        style = {"color": colours.get(key), "label": names.get(key, key), **options}
        (line,) = ax.plot(runs.index, runs["mean"], **style)
        style = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
        ax.fill_between(runs.index, runs["min"], runs["max"], **style)
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
    low, high = sorted(ax.get_xlim())
    to_axes, found = ax.transData + ax.transAxes.inverted(), []
    for line in ax.get_lines():
        x, y = (np.asarray(d, float) for d in line.get_data())
        inside = (x >= low) & (x <= high) & np.isfinite(y)
        if len(x) > 1 and inside.any() and not line.get_label().startswith("_"):
            points = to_axes.transform(np.column_stack([x[inside], y[inside]]))
            found.append([*points[points[:, 0].argmax()], line])
    found.sort(key=lambda entry: entry[1])
    for lower, upper in pairwise(found):
        upper[1] = max(upper[1], lower[1] + space)
    style = {"textcoords": "offset points", "va": "center", "fontsize": 10}
    for x, y, line in found:
        place = {"xy": (x, y), "xytext": (4, 0), "xycoords": "axes fraction"}
        ax.annotate(line.get_label(), **place, **style, color=line.get_color())


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
        pixels = np.reshape(pixels, (28, 28)) if np.size(pixels) == 784 else np.asarray(pixels)
        ax.imshow(pixels, **{"cmap": "gray_r", **options})
        ax.set_title(name, fontsize=10, loc="center")
    return figure, axes


def stacked(ax, table: pd.DataFrame, names: dict[str, str] | None = None) -> None:
    """Horizontal bars, one a row of `table`, its columns stacked: negative ones to the left."""
    places = np.arange(len(table))[::-1]
    left, right = np.zeros(len(table)), np.zeros(len(table))
    for column in table:
        widths = table[column].to_numpy(float)
        starts = np.where(widths < 0, left, right)
        label = (names or {}).get(column, column)
        ax.barh(places, widths, 0.6, starts, color=COLOURS.get(column), label=label)
        left, right = left + np.minimum(widths, 0), right + np.maximum(widths, 0)
    ax.set_yticks(places, table.index)
    ax.axvline(0, color="black", linewidth=0.8)


def folder() -> Path:
    """``figures/`` of the project (a folder with ``notebooks`` and ``pyproject.toml``) around the
    working folder; of the working folder if there is none."""
    parts, around = ("notebooks", "pyproject.toml"), (Path.cwd(), *Path.cwd().parents)
    projects = (path for path in around if all((path / part).exists() for part in parts))
    return next(projects, Path.cwd()) / "figures"


def save(figure, name: str, table: pd.DataFrame) -> None:
    """Keep a picture and the table it shows: ``figures/<name>.png`` and ``<name>.csv``.

    The table is plain UTF-8, six digits, for `pandas.read_csv` without options. Where table and
    picture agree with those stored, but for rounding, both files stay as they are. A folder that
    cannot be written warns, and ends nothing. Raises TypeError or ValueError for what is no figure,
    no plain name, or no DataFrame with rows; FloatingPointError if a number is infinite.
    """
    kind = type(figure).__name__
    require(hasattr(figure, "savefig"), f"figure: expected Matplotlib's, got {kind}", TypeError)
    plain = re.fullmatch(r"[\w-]+", name)
    require(plain, f"name: expected a plain name such as 'result', got {name!r}")
    good = isinstance(table, pd.DataFrame) and not table.empty and table.columns.nlevels == 1
    require(good, "table: expected a DataFrame with rows and plain columns; see reset_index")
    numbers = table.select_dtypes("number").to_numpy(float)
    checks.finite(f"table of {name!r}", numbers[~np.isnan(numbers)])
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    picture, values = (folder() / f"{name}.{kind}" for kind in ("png", "csv"))
    try:
        if _agree(values, text, picture, content := _png(figure)):
            return
        folder().mkdir(parents=True, exist_ok=True)
        for file, new in ((values, text.encode()), (picture, content)):
            unfinished = file.with_name(f".{name}-unfinished")
            unfinished.write_bytes(new)
            os.replace(unfinished, file)
    except OSError as error:
        warnings.warn(f"figure {name!r} is not kept: {error}", stacklevel=2)

def _agree(values: Path, text: str, picture: Path, content: bytes) -> bool:
    """Whether what is stored differs by last digits only, and by less than a letter in a label."""
    try:
        old, new = pd.read_csv(values), pd.read_csv(io.StringIO(text))
        pd.testing.assert_frame_equal(old, new, rtol=1e-3, atol=1e-7)
        old, new = plt.imread(picture), plt.imread(io.BytesIO(content))
    except (AssertionError, ValueError, OSError, SyntaxError):  # the last is no PNG
        return False
    return old.shape == new.shape and float(np.abs(old - new).mean()) < 3e-5

def _png(figure) -> bytes:
    file = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.draw_without_rendering()  # the layout settles: a second picture is the same
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def show(figure, alt: str) -> None:
    """Display a figure with an alternative text: what it shows, for those who do not see it."""
    picture = {"image/png": _png(figure), "text/plain": alt}
    plt.close(figure)
    display(picture, raw=True, metadata={"image/png": {"alt": alt}})
