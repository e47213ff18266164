"""The pictures of the series: one style, one colour for each criterion, one function a figure.

Every figure is saved beside the CSV it was drawn from: ``figures/result.png`` and
``figures/result.csv``.
"""

import csv
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from prunelib import checks

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
    TypeError
        If `figure` is no Matplotlib figure.
    ValueError
        If `name` is no plain name, `table` is empty or its columns differ in length.
    FloatingPointError
        If a number in `table` is NaN or infinite.
    """
    if not hasattr(figure, "savefig"):
        raise TypeError(
            f"figure: expected a Matplotlib figure, got {type(figure).__name__}; "
            "pass the first of what figures.new returns"
        )
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name: expected a plain name such as 'result', got {name!r}")
    lengths = {column: len(values) for column, values in table.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            f"table: columns must have one length, more than 0, got {lengths}; "
            "give one value of each column for each row"
        )
    columns = {column: [np.asarray(value) for value in values] for column, values in table.items()}
    for column, values in columns.items():
        if any(value.ndim for value in values):
            raise ValueError(
                f"table: column {column!r} has arrays in its rows; give a column for each place"
            )
        numbers = [value for value in values if jnp.issubdtype(value.dtype, jnp.floating)]
        checks.finite(f"table: column {column!r}", np.array(numbers, float))
    FOLDER.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        if note:
            file.write(f"# {note}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*(map(_text, column) for column in columns.values()), strict=True))


def _text(value):
    return f"{value:.6g}" if jnp.issubdtype(value.dtype, jnp.floating) else value.item()


def _columns(names, rows):
    """The table that `save` takes, from its rows."""
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


# Notebook 02 -------------------------------------------------------------------------------------


def digits(images, labels, columns: int = 10):
    """The first two rows of a data set's pictures, ``[n, 784]``; returns a figure and its table."""
    figure, axes = new(2, columns, (7.5, 1.9))
    for ax, image, label in zip(axes.flat, images, labels, strict=False):
        ax.imshow(np.reshape(image, (28, 28)), cmap="gray_r")
        ax.set_title(f"{label}", fontsize=10, pad=2)
        ax.axis("off")
    count = 2 * columns
    return figure, {
        "place": list(range(count)),
        "label": [int(label) for label in labels[:count]],
        "mean_grey": [float(np.mean(image)) for image in images[:count]],
    }


RECIPES = {
    "plain": ("plain", COLOURS["obd"], "-"),
    "fair_dropout": ("fair dropout", COLOURS["dropout"], "-"),
    "plain_2016": ("plain, 2016", COLOURS["accent"], "--"),
    "dropout_2016": ("dropout, 2016", COLOURS["other"], ":"),
    "slow_2016": ("plain, 2016, low rate", COLOURS["accent"], ":"),
    "fast_dropout_2016": ("dropout, 2016, high rate", COLOURS["other"], "--"),
    "short_2016": ("cut short, no dropout", COLOURS["published"], ":"),
}


def learning_curves(runs: dict):
    """Training loss and accuracy of each recipe's `Runs` by step: mean and range over seeds."""
    figure, (above, below) = new(2, 1, (7.5, 5.5), sharex=True)
    table = {"recipe": [], "seed": [], "step": [], "loss": [], "accuracy": []}
    for name, run in runs.items():
        label, colour, line = RECIPES[name]
        for ax, field in ((above, "loss"), (below, "accuracy")):
            band(ax, run.history["step"], run.history[field], label, colour, line)
        for seed, losses, rights in zip(
            run.seeds, run.history["loss"], run.history["accuracy"], strict=True
        ):
            for row in zip(run.history["step"], losses, rights, strict=True):
                for column, value in zip(table, (name, seed, *row), strict=True):
                    table[column].append(value)
    above.set(yscale="log", ylabel="training loss (nats)")
    below.set(ylim=(0, 1.02), ylabel="training accuracy", xlabel="step (batches of 64)")
    _legend_below(figure, above)
    return figure, table


# Notebook 03 -------------------------------------------------------------------------------------


def matrices(named: dict, title: str):
    """Square matrices as pictures, red for positive and blue for negative entries."""
    figure, axes = new(1, len(named), (7.5, 3.2))
    table = {"matrix": [], "row": [], "column": [], "value": []}
    for ax, (name, values) in zip(axes, named.items(), strict=True):
        values = np.asarray(values)
        limit = np.abs(values).max()
        ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set(title=f"{name}  ({len(values)}×{len(values)})", xticks=[], yticks=[])
        ax.grid(False)
        row, column = np.indices(values.shape).reshape(2, -1).tolist()
        new_rows = ([name.replace("$", "")] * values.size, row, column, values.ravel().tolist())
        for key, rows in zip(table, new_rows, strict=True):
            table[key] += rows
    figure.suptitle(title)
    return figure, table


def along_one_weight(values, logits, losses, current: float):
    """Logits ``[v, classes]`` and loss ``[v]`` of one example as one weight takes `values`."""
    figure, (left, right) = new(1, 2, (7.5, 3.6))
    left.plot(values, logits, lw=1.2, color=COLOURS["magnitude"], alpha=0.7)
    left.set(
        xlabel="value of one weight", ylabel="logits", title="Logits: straight lines and kinks"
    )
    right.plot(values, losses, color=COLOURS["obd"])
    right.set(
        xlabel="value of one weight", ylabel="loss (nats)", title="Loss: smooth between the kinks"
    )
    for ax in (left, right):
        ax.axvline(current, color=COLOURS["random"], lw=1)
    logits = np.asarray(logits)
    table = {f"logit_{c}": logits[:, c].tolist() for c in range(logits.shape[1])}
    return figure, {"weight": np.asarray(values).tolist()} | table | {
        "loss": np.asarray(losses).tolist()
    }


def two_way_street(widths, title: str = ""):
    """How `gauss_newton` goes through a network of these widths: values forward, signals back."""
    figure, ax = new(size=(7.5, 3.0))
    layers = len(widths) - 1
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.3"}
    arrow = {"arrowstyle": "-|>", "lw": 2, "shrinkA": 0, "shrinkB": 0}
    for place, width in enumerate(widths):
        what = "pixels" if place == 0 else "logits" if place == layers else "units"
        ax.text(place, 0, f"{width}\n{what}", ha="center", va="center", fontsize=10, bbox=box)
    for place in range(layers):
        ends = np.array([place + 0.27, place + 0.73])
        ax.annotate("", (ends[1], 0.14), (ends[0], 0.14),
                    arrowprops=arrow | {"color": COLOURS["magnitude"]})  # fmt: skip
        if place:  # no signal goes back to the pixels
            ax.annotate("", (ends[0], -0.14), (ends[1], -0.14),
                        arrowprops=arrow | {"color": COLOURS["obd"], "lw": 3})  # fmt: skip
        ax.text(place + 0.5, 0.27, f"$W_{place + 1}$", ha="center", fontsize=11)
    note = {"fontsize": 10.5, "ha": "center"}
    ax.text(layers / 2, 0.68, "forward, once: the inputs $a$ of each layer",
            color=COLOURS["magnitude"], **note)  # fmt: skip
    ax.text((layers + 1) / 2, -0.58, "back, ten times, one for each class: the signals $u_c$, from "
            "$r_c=\\sqrt{p_c}(e_c-p)$", color=COLOURS["obd"], **note)  # fmt: skip
    ax.text(layers / 2, -1.15, "for each layer, one matrix product:   $h_{ij}=\\frac{1}{N}\\,"
            "\\sum_n\\, a_{ni}^2\\; \\sum_c u_{ncj}^2$", fontsize=13, ha="center")  # fmt: skip
    ax.set(xlim=(-0.5, layers + 0.5), ylim=(-1.35, 0.85), title=title)
    ax.axis("off")
    sizes = itertools.pairwise(widths)
    rows = [(number, *size, size[0] * size[1]) for number, size in enumerate(sizes, 1)]
    return figure, _columns(("layer", "inputs", "units", "weights"), rows)


def probe_errors(probes, errors, claimed, ranked):
    """Error of random probes against their number; beside it, how good they are as a ranking."""
    figure, (left, right) = new(1, 2, (7.5, 3.6))
    left.loglog(probes, errors, "o-", color=COLOURS["other"], label="error")
    left.loglog(probes, claimed, "s:", color=COLOURS["magnitude"], label="standard error")
    guide = errors[0] * np.sqrt(probes[0] / np.array(probes))
    left.loglog(probes, guide, "--", color=COLOURS["random"], lw=1, label="1/√m")
    left.set(xlabel="probes m", ylabel="relative error", title="Halved by four times the probes")
    left.set_yticks([0.5, 1, 2, 4, 8], [0.5, 1, 2, 4, 8])
    left.legend()
    for (share, found), line in zip(ranked.items(), ("o-", "^--", "s:"), strict=False):
        missed = 100 * (1 - np.array(found))
        right.semilogx(probes, missed, line, color=COLOURS["other"], label=f"lowest {share:.0%}")
    right.legend(loc="upper right")
    right.set(xlabel="probes m", ylabel="missed (%)", ylim=(-0.4, 12))
    right.set(title="As a ranking, four do as well as 256")
    for ax in (left, right):
        ax.set_xticks(probes, probes)
        ax.minorticks_off()
    table = {"probes": probes, "error": errors, "standard_error": claimed}
    return figure, table | {f"found_{share}": found for share, found in ranked.items()}


def pixel_maps(named: dict, title: str):
    """28×28 maps side by side, each with its own scale, from zero."""
    figure, axes = new(1, len(named), (7.5, 3.1))
    for ax, (name, values) in zip(axes, named.items(), strict=True):
        shown = ax.imshow(np.asarray(values), vmin=0)
        figure.colorbar(shown, ax=ax, shrink=0.7)
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=10)
        ax.grid(False)
    figure.suptitle(title)
    row, column = np.indices((28, 28)).reshape(2, -1).tolist()
    columns = {name: np.asarray(values).ravel().tolist() for name, values in named.items()}
    return figure, {"row": row, "column": column} | columns


def saliency_histograms(saliencies: dict, zeros: dict):
    """log10 of the saliencies of each layer, exact zeros counted in the legend."""
    figure, ax = new(size=(7.5, 4.2))
    edges = np.arange(-16, -0.99, 0.5)  # what is smaller goes into the first bin
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(saliencies)))
    table = {"log10_from": edges[:-1].tolist()}
    for (name, values), colour in zip(saliencies.items(), colours, strict=True):
        values = np.asarray(values).ravel()
        counts, _ = np.histogram(np.log10(values[values > 0]).clip(edges[0], edges[-1]), edges)
        share = counts / values.size
        label = f"{name} ({values.size:,} weights, {zeros[name]:.0%} exact zeros)"
        ax.stairs(share, edges, color=colour, lw=2, label=label)
        table[name] = share.tolist()
    ax.set(ylabel="share of the layer's weights")
    ax.set_xlabel("log10 of the saliency (nats); the first bin holds all that is smaller")
    ax.set_title("A weight of the first layer matters least, one of the last layer most")
    ax.legend(fontsize=9, loc="upper left")
    return figure, table


# Notebook 04 -------------------------------------------------------------------------------------

PUBLISHED = {
    ("magnitude", "all"): "magnitude_all_layers",
    ("magnitude", "layer"): "magnitude_layerwise",
    ("obd", "all"): "obd_all_layers",
    ("obd", "layer"): "obd_layerwise",
    ("dropout", "all"): "obd_all_layers_dropout",
}
CRITERIA = {**NAMES, "dropout": "OBD with dropout"}


def remaining_axis(axes, upto: float) -> None:
    """What remains, in percent, falling to the right, from 100 to 100 - `upto`."""
    axes.set_xlim(100, 100 - upto)
    axes.set_xticks(range(100, round(100 - upto) - 1, -5 if upto <= 20 else -10))
    axes.set_xlabel("weights and biases remaining (%)")


def pruning_curves(axes, curves: dict, field: str, upto: float, published: dict | None = None):
    """One line for each ``(criterion, scope): Curve`` (arrays ``[seeds, levels]``), with its band.

    `published` (from `data.published_2016`) is drawn thin, in the same colours. Returns the table.
    """
    table = {"criterion": [], "scope": [], "percent_remaining": [], "seed": [], field: []}

    def add(key, percents, values, seed):
        for percent, value in zip(percents, values, strict=True):
            row = (*key, 100 - percent, seed, value)
            for column, entry in zip(table, row, strict=True):
                table[column].append(entry)

    for (criterion, scope), curve in curves.items():
        shown = curve.percents[0] <= upto
        x, y = curve.percents[0][shown], getattr(curve, field)[:, shown]
        label = f"{CRITERIA[criterion]}, {SCOPE_NAMES[scope]}"
        width = 1.3 if criterion == "random" else 2
        band(axes, 100 - x, y, label, COLOURS[criterion], LINES[scope], linewidth=width)
        for seed, values in enumerate(y):
            add((criterion, scope), x, values, seed)
    for key in PUBLISHED if published else ():
        percents, values = published[PUBLISHED[key]]
        shown = percents <= upto
        style = dict(color=COLOURS[key[0]], linestyle=LINES[key[1]], linewidth=0.9, alpha=0.7)
        axes.plot(100 - percents[shown], values[shown], marker=".", markersize=3, **style)
        add(key, percents[shown], values[shown], "published 2016")
    remaining_axis(axes, upto)
    return table


def _legend_below(figure, axes, published: bool = False):
    handles, labels = axes.get_legend_handles_labels()
    if published:
        handles.append(plt.Line2D([], [], color="0.3", linewidth=0.9, marker=".", markersize=3))
        labels.append("thin: published in 2016")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9.5, frameon=False)


def result(curves: dict, published: dict, upto: float = 20):
    """The study's first figure: test accuracy to 20 % pruned, and its top part enlarged."""
    figure, (whole, top) = new(2, 1, (7.5, 7.2), height_ratios=[3, 2])
    table = pruning_curves(whole, curves, "accuracy", upto, published)
    whole.set(ylim=(0, 1), ylabel="test accuracy", xlabel="")
    pruning_curves(top, curves, "accuracy", upto, published)
    top.set(ylim=(0.96, 0.98), ylabel="test accuracy, enlarged")
    _legend_below(figure, whole, published=True)
    return figure, table


def to_the_end(curves: dict, field: str, title: str):
    """Test accuracy or training loss (`field`) as far as 99 % pruned; a figure and its table."""
    figure, ax = new(size=(7.5, 5.2))
    table = pruning_curves(ax, curves, field, 99)
    if field == "loss":
        ax.set(yscale="log", ylabel="training loss (nats)", title=title)
    else:
        ax.set(ylim=(0, 1), ylabel="test accuracy", title=title)
    _legend_below(figure, ax)
    return figure, table


def closer_look(title: str, confusion, survivors, images, captions):
    """What pruning left: a confusion matrix, the weights of each pixel, and digits that flipped.

    Parameters
    ----------
    title : str
        Which network this is, and how good.
    confusion : int array [10, 10]
        Counts of test images, by label (row) and answer (column).
    survivors : int array [28, 28]
        How many of the weights that leave each pixel are kept.
    images, captions : array [k, 28, 28] and list of k strings
    """
    figure = plt.figure(figsize=(7.5, 3.7), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[3, 3, 1.2])
    figure.suptitle(title)
    ax = left.add_subplot(title="answers by label (log scale)")
    ax.imshow(np.log1p(confusion), cmap="Blues")
    ax.set(xlabel="answer", ylabel="label", xticks=range(10), yticks=range(10))
    ax = middle.add_subplot(title="weights left at each pixel")
    shown = ax.imshow(survivors, vmin=0, vmax=50)
    ax.set(xticks=[], yticks=[])
    middle.colorbar(shown, ax=ax, orientation="horizontal", label="of 50", shrink=0.8)
    for ax, image, caption in zip(right.subplots(2, 1), images, captions, strict=False):
        ax.imshow(image, cmap="gray_r")
        ax.set_title(caption, fontsize=9)
        ax.axis("off")
    return figure


# Notebook 05 -------------------------------------------------------------------------------------


def result2(curves: dict, published: dict, upto: float = 99):
    """The study's second figure: all-layer OBD on each recipe's networks, to heavy pruning.

    `curves` is ``{recipe: Curve}`` with arrays ``[seeds, levels]``; returns a figure and its table.
    """
    figure, ax = new(size=(7.5, 5.6))
    table = {"recipe": [], "percent_remaining": [], "seed": [], "accuracy": []}

    def add(name, percents, values, seed):
        for percent, value in zip(percents, values, strict=True):
            for column, entry in zip(table, (name, 100 - percent, seed, value), strict=True):
                table[column].append(entry)

    for name, curve in curves.items():
        label, colour, line = RECIPES[name]
        band(ax, 100 - curve.percents[0], curve.accuracy, label, colour, line)
        for seed, values in enumerate(curve.accuracy):
            add(name, curve.percents[0], values, seed)
    for name, like in (("obd_all_layers", "plain"), ("obd_all_layers_dropout", "fair_dropout")):
        percents, values = published[name]
        colour = RECIPES[like][1]
        ax.plot(100 - percents, values, color=colour, linewidth=0.9, marker=".", markersize=4)
        add(f"published: {name}", percents, values, "published 2016")
    remaining_axis(ax, upto)
    ax.set(ylim=(0, 1), ylabel="test accuracy")
    _legend_below(figure, ax, published=True)
    return figure, table


def two_by_two(accuracies: dict, title: str = ""):
    """Test accuracy of the four ways to combine two changes, a dot for each network.

    `accuracies` is ``{label of the first: {label of the second: array [seeds]}}``; lines join the
    means.
    """
    figure, ax = new(size=(7.5, 3.8))
    rows = []
    colours = (COLOURS["accent"], COLOURS["other"])
    for number, ((one, cases), colour) in enumerate(zip(accuracies.items(), colours, strict=True)):
        places = np.arange(len(cases)) + 0.06 * (number - 0.5)
        means = [values.mean() for values in cases.values()]
        ax.plot(places, means, "D-", color=colour, label=f"{one} (mean)", ms=8)
        for place, (other, values) in zip(places, cases.items(), strict=True):
            ax.plot(np.full(len(values), place), values, "o", color=colour, alpha=0.6, ms=5)
            rows += [(one, other, seed, value) for seed, value in enumerate(values)]
    ax.set_xticks(range(len(cases)), cases)
    ax.set(xlim=(-0.5, len(cases) - 0.5), ylabel="test accuracy, unpruned", title=title)
    ax.legend(loc="lower left")
    return figure, _columns(("first", "second", "seed", "accuracy"), rows)


def paired_difference(differences: dict, percents, title: str = "", enlarged=None):
    """Differences of test accuracy, seed by seed, ``{name: (array [seeds, levels], colour)}``.

    `enlarged`, if given, is the part of the first that is drawn again below: its limits, percent
    remaining (from, to) and difference (from, to).
    """
    rows = 1 if enlarged is None else 2
    figure, axes = new(rows, 1, (7.5, 1 + 3.4 * rows), squeeze=False)
    table = {"comparison": [], "percent_remaining": [], "seed": [], "difference": []}
    left = 100 - np.asarray(percents)
    for number, (name, (runs, colour)) in enumerate(differences.items()):
        for ax in axes[: 2 if number == 0 else 1, 0]:
            band(ax, left, runs, name, colour)
            ax.plot(left, np.transpose(runs), color=colour, linewidth=0.6, alpha=0.6)
        for seed, values in enumerate(runs):
            for row in zip(left, values, strict=True):
                for column, entry in zip(table, (name, row[0], seed, row[1]), strict=True):
                    table[column].append(entry)
    for ax in axes[:, 0]:
        ax.axhline(0, color="0.3", linewidth=0.8)
        remaining_axis(ax, 100 - left.min())
        ax.set(ylabel="accuracy with dropout\nminus accuracy without")
    axes[0, 0].set_title(title)
    if enlarged is not None:
        axes[0, 0].set_xlabel("")
        axes[1, 0].set(xlim=enlarged[0], ylim=enlarged[1])
        axes[1, 0].set_title(f"{next(iter(differences))}, enlarged")
        axes[1, 0].set_xticks(range(*enlarged[0], -2))
    _legend_below(figure, axes[0, 0])
    return figure, table


# Notebook 06 -------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One curve of `accuracy_panels`: accuracy (a fraction) against percent pruned.

    `accuracy` is ``[levels]``, or ``[seeds, levels]`` to be drawn as a mean and a range; `colour`
    is a key of COLOURS. A `faint` curve draws each seed as a thin line instead.
    """

    label: str
    percents: np.ndarray
    accuracy: np.ndarray
    colour: str
    line: str = "-"
    faint: bool = False


def accuracy_panels(panels: dict[str, list[Line]], title: str = "", size=(7.5, 4.6)):
    """Side by side, what was published, what the same program gives here, and the correction.

    Parameters
    ----------
    panels : dict
        Panel title -> its lines. Labels that panels share stand in the legend once.

    Returns
    -------
    figure, array of axes, table
        The table is long: one row for each panel, curve and level, with mean, min and max.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        rows, handles = [], {}
        for ax, (name, lines) in zip(axes[0], panels.items(), strict=True):
            for line in lines:
                _panel_line(ax, line)
                runs = np.atleast_2d(line.accuracy)
                points = np.transpose([line.percents, runs.mean(0), runs.min(0), runs.max(0)])
                rows += [(name, line.label, *point) for point in points.tolist()]
            ax.set(title=name, xlabel="percent pruned", ylim=(0, 1))
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        axes[0, 0].set_ylabel("test accuracy")
        columns = 2 if len(handles) > 3 else 3
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
        figure.suptitle(title)
    names = ("panel", "curve", "percent_pruned", "accuracy", "lowest", "highest")
    return figure, axes[0], _columns(names, rows)


def _panel_line(ax, line):
    colour = COLOURS[line.colour]
    if line.faint:
        labels = [line.label] + [None] * (len(line.accuracy) - 1)
        for label, run in zip(labels, line.accuracy, strict=True):
            ax.plot(line.percents, run, line.line, color=colour, lw=0.9, alpha=0.8, label=label)
    elif np.ndim(line.accuracy) == 2:
        band(ax, line.percents, line.accuracy, line.label, colour, line.line)
    else:
        ax.plot(line.percents, line.accuracy, line.line, marker="o", ms=3.5, lw=1.2, color=colour,
                label=line.label)  # fmt: skip


def pixel_shares(shares: dict[str, np.ndarray], title: str = ""):
    """Pictures of the input pixels: which share of each pixel's weights went.

    Parameters
    ----------
    shares : dict
        Caption -> array ``[28, 28]`` in [0, 1].

    Returns
    -------
    figure, table
        The table has one row for each pixel.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, -(-len(shares) // 2), figsize=(7.5, 6.8), squeeze=False)
        for ax, (caption, share) in zip(axes.ravel(), shares.items(), strict=True):
            picture = ax.imshow(100 * share, vmin=0, vmax=100, cmap="magma")
            ax.set_title(caption)
            ax.set(xticks=[0, 9, 18, 27], yticks=[0, 9, 18, 27])
            ax.grid(False)
        figure.colorbar(picture, ax=axes, label="percent", shrink=0.6)
        figure.suptitle(title)
    row, column = np.divmod(np.arange(784), 28)
    return figure, {"row": row, "column": column} | {k: np.ravel(v) for k, v in shares.items()}


def leak(lines: list[Line], lost: np.ndarray, title: str = ""):
    """What a restore that restores other weights does: accuracy, and the weights lost for good.

    Parameters
    ----------
    lines : list of Line
        The left panel.
    lost : int array [seeds, levels]
        Weights that differ from the trained ones after each level's restore; levels as in lines[0].
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 4.8))
        for line in lines:
            _panel_line(left, line)
        left.set(title="Accuracy", xlabel="percent pruned", ylabel="test accuracy", ylim=(0, 1))
        figure.legend(loc="outside lower center", ncols=2)
        levels = lines[0].percents
        band(right, levels, lost, "lost", COLOURS["other"])
        right.set(title="Weights not restored", xlabel="percent pruned", ylim=(0, None))
        right.set(ylabel="weights that differ from the trained ones")
        figure.suptitle(title)
    columns = {f"lost_seed_{seed}": run for seed, run in enumerate(lost)}
    for line in lines:
        for name, at in (("mean", np.mean), ("lowest", np.min), ("highest", np.max)):
            columns[f"{line.label}, {name}"] = at(np.atleast_2d(line.accuracy), 0)
    return figure, {"percent_pruned": levels} | columns


# Notebooks 08 and 09 -----------------------------------------------------------------------------


class Trail(NamedTuple):
    """One line of `kept_panels`: a value against percent kept, for each seed.

    `values` is ``[seeds, levels]``; `colour` is a key of COLOURS.
    """

    label: str
    kept: np.ndarray
    values: np.ndarray
    colour: str
    line: str = "-"


def kept_panels(panels: dict[str, list[Trail]], ylabel: str, size=(7.5, 7.6), **limits):
    """Curves against the percentage of parameters kept, on a log axis that shrinks to the right.

    `panels` has one entry for each panel, from the top: its title and its lines. `limits` are
    passed to each axes. Returns the figure, its axes, and a long table.
    """
    figure, axes = new(len(panels), 1, size, sharex=True, squeeze=False)
    rows = []
    for ax, (title, trails) in zip(axes[:, 0], panels.items(), strict=True):
        for trail in trails:
            band(ax, trail.kept, trail.values, trail.label, COLOURS[trail.colour], trail.line,
                 marker="o", markersize=3)  # fmt: skip
            for seed, values in enumerate(trail.values):
                points = zip(trail.kept, values, strict=True)
                rows += [(title, trail.label, seed, *point) for point in points]
        ax.set(title=title, xscale="log", ylabel=ylabel, **limits)
        ax.legend(fontsize=9.5)
    ax.set_xlabel("parameters kept (%)")
    ax.set_xlim(100, ax.get_xlim()[0])
    ticks = [tick for tick in (100, 50, 20, 10, 5, 2, 1, 0.5) if tick > ax.get_xlim()[1]]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    names = ("panel", "curve", "seed", "percent_kept", "value")
    return figure, axes[:, 0], _columns(names, rows)


def survivors(masks: dict[str, dict[float, np.ndarray]], title: str = ""):
    """How many first-layer weights are left at each pixel, as the network shrinks.

    `masks` has one row of pictures for each entry: a caption, and percent kept -> bool
    ``[784, units]``. Returns the figure and a table with one row for each pixel.
    """
    columns = max(map(len, masks.values()))
    figure, axes = new(len(masks), columns, (7.5, 1.9 * len(masks) + 0.6), squeeze=False)
    row, column = np.divmod(np.arange(784), 28)
    table = {"row": row, "column": column}
    for line, (caption, levels) in zip(axes, masks.items(), strict=True):
        for ax, (kept, mask) in zip(line, levels.items(), strict=True):
            left = mask.sum(1)
            shown = ax.imshow(left.reshape(28, 28), vmin=0, cmap="magma")
            ax.set_title(f"{kept:g} % kept, {left.sum():,} left", fontsize=8.5)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            figure.colorbar(shown, ax=ax, shrink=0.75).ax.tick_params(labelsize=7)
            table[f"{caption} {kept:g}"] = left
        line[0].set_ylabel(caption)
    figure.suptitle(f"{title}\n(weights left at each pixel; each picture has its own scale)")
    return figure, table


def filters(kernels: dict[str, np.ndarray], title: str = "", columns: int = 4):
    """Convolution kernels ``[height, width, units]`` as pictures, a panel for each entry.

    Grey is a weight of exactly zero, red is positive, blue negative. Returns the figure and a
    long table.
    """
    figure, axes = new(1, len(kernels), (7.5, 3.6), squeeze=False)
    limit = max(np.abs(kernel).max() for kernel in kernels.values())
    colours = plt.get_cmap("RdBu_r").with_extremes(bad="0.35")
    rows = []
    for ax, (caption, kernel) in zip(axes[0], kernels.items(), strict=True):
        height, width, units = kernel.shape
        lines = -(-units // columns)
        picture = np.full((lines * (height + 1) + 1, columns * (width + 1) + 1), np.inf)
        for unit in range(units):
            top, left = 1 + (height + 1) * (unit // columns), 1 + (width + 1) * (unit % columns)
            one = kernel[..., unit]
            picture[top : top + height, left : left + width] = np.where(one == 0, np.nan, one)
            rows += [(caption, unit, *place, one[place]) for place in np.ndindex(one.shape)]
        between = np.isinf(picture)
        ax.imshow(np.where(between, 0, picture), cmap=colours, vmin=-limit, vmax=limit)
        ax.imshow(np.where(between, 1.0, np.nan), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[], title=caption)
        ax.grid(False)
    figure.suptitle(title, fontsize=12)
    names = ("network", "filter", "row", "column", "weight")
    return figure, _columns(names, rows)


def kept_by_layer(kept: dict[str, dict[str, float]], xlabel: str, title: str = ""):
    """Bars: the share of each layer that is kept, in percent (criterion -> layer -> share)."""
    figure, ax = new(size=(7.5, 3.6))
    layers = list(next(iter(kept.values())))
    height = 0.8 / len(kept)
    for number, (criterion, shares) in enumerate(kept.items()):
        places = np.arange(len(layers)) + (number - (len(kept) - 1) / 2) * height
        style = dict(color=COLOURS[criterion], label=NAMES[criterion])
        bars = ax.barh(places, shares.values(), height, **style)
        ax.bar_label(bars, fmt="%.1f", fontsize=8.5, padding=2)
    ax.set_yticks(range(len(layers)), layers)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, title=title)
    ax.legend(fontsize=9.5)
    rows = [(c, layer, share) for c, s in kept.items() for layer, share in s.items()]
    names = ("criterion", "layer", "percent_kept")
    return figure, _columns(names, rows)


def against_truth(true: np.ndarray, tries: dict[str, np.ndarray], title: str = ""):
    """Curvatures computed in several ways against the true ones, weight by weight, on log axes.

    Returns the figure and a table with one row for each weight.
    """
    figure, ax = new(size=(7.5, 4.2))
    limits = [0.5 * float(true.min()), 2 * float(true.max())]
    ax.plot(limits, limits, color="0.5", linewidth=1)
    styles = [("obd", "o"), ("other", "s"), ("light", "x")]
    for (name, found), (colour, marker) in zip(tries.items(), styles, strict=False):
        ax.plot(np.ravel(true), np.ravel(found), marker, color=COLOURS[colour], label=name)
    ax.set(xscale="log", yscale="log", title=title, ylabel="computed (nats per squared weight)")
    ax.set_xlabel("truth: the diagonal of jax.hessian (nats per squared weight)")
    ax.legend()
    return figure, {"truth": np.ravel(true)} | {n: np.ravel(f) for n, f in tries.items()}


# Notebook 01 -------------------------------------------------------------------------------------

PRUNING_STEPS = {"w1": COLOURS["other"], "w2": COLOURS["other"], "both": COLOURS["published"]}
PRICE_TAGS = {  # alignment, and offset from the arrow's tip in points
    "w1": ("right", "bottom", (4, 7)),
    "w2": ("left", "top", (2, -4)),
    "both": ("right", "top", (-2, -4)),
}
RISES = np.array([0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8])  # of the contours, in nats


def _valley(ax, one, two, rise, w, prune, labels):
    """Contours of the rise of a loss in a plane of two weights, and pruning steps with prices."""
    greys = plt.cm.Greys(np.linspace(0, 0.55, len(RISES) + 1))
    ax.contourf(one, two, rise, [0, *RISES, 9], colors=greys)
    ax.contour(one, two, rise, RISES, colors="0.5", linewidths=0.8)
    for name, delta in prune.items():
        colour, end = PRUNING_STEPS[name], np.asarray(w + delta)
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, np.asarray(w), arrowprops=arrow)
        ha, va, offset = PRICE_TAGS[name]
        tag = ax.annotate(labels[name], end, offset, textcoords="offset points", ha=ha, va=va)
        tag.set(fontsize=10, fontweight="bold")
        tag.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    ax.plot(*np.asarray(w), "ko")
    ax.set(xlabel="weight $w_1$")
    ax.grid(False)


def two_weights(loss, w, prune, hessian):
    """Contours of a loss of two weights and of its quadratic model, with the pruning steps."""
    one, two = np.linspace(-1.4, 2.1, 81), np.linspace(-0.9, 4.5, 57)
    grid = np.stack(np.meshgrid(one, two), axis=-1)
    step = grid - np.asarray(w)
    true = np.asarray(jax.vmap(jax.vmap(loss))(grid.astype(np.float32))) - float(loss(w))
    model = 0.5 * np.einsum("abi,ij,abj->ab", step, np.asarray(hessian), step)
    prices = {
        "The loss": {k: f"+{float(loss(w + d) - loss(w)):.3f}" for k, d in prune.items()},
        "Its quadratic model": {k: f"+{float(d @ hessian @ d / 2):.3f}" for k, d in prune.items()},
    }
    figure, axes = new(1, 2, (7.5, 5.6), sharey=True)
    for ax, rise, title in zip(axes, (true, model), prices, strict=True):
        _valley(ax, one, two, rise, w, prune, prices[title])
        ax.set(title=title, aspect="equal")
    axes[0].set_ylabel("weight $w_2$")
    figure.suptitle("A short step across the valley costs more than a long one along it")
    table = {"w1": grid[..., 0].ravel(), "w2": grid[..., 1].ravel()}
    return figure, table | {"rise": true.ravel(), "quadratic_rise": model.ravel()}


def two_slices(loss, w, hessian):
    """The loss and its parabola along each of two weights, the other one at its minimum."""
    figure, axes = new(1, 2, (7.5, 3.8), sharey=True)
    table = {"weight": [], "value": [], "loss": [], "quadratic": []}
    for k, ax in enumerate(axes):
        at, bend = float(w[k]), float(hessian[k, k])
        values = np.linspace(-0.3 * at, 2.3 * at, 81)
        true = np.asarray(jax.vmap(lambda value, k=k: loss(w.at[k].set(value)))(values))
        model = float(loss(w)) + 0.5 * bend * (values - at) ** 2
        _slice(ax, values, true, {"OBD's parabola": ("obd", model)}, at, float(loss(w)))
        ax.set(xlabel=f"weight $w_{k + 1}$", title=f"$w_{k + 1}$: curvature {bend:.3f}")
        for name, column in zip(table, ([k + 1] * 81, values, true, model), strict=True):
            table[name] += list(column)
    axes[0].set_ylabel("loss (nats)")
    axes[1].legend(loc="upper center", fontsize=9)
    figure.suptitle("Each parabola is right near the minimum, and too low at zero")
    return figure, table


def _slice(ax, values, true, models, at, loss):
    """A loss along one weight, models of it, and what each says at zero (the vertical line)."""
    ax.plot(values, true, color="black", label="loss")
    ax.axvline(0, color=COLOURS["random"], lw=1)
    ax.plot(0, np.interp(0, values, true), "o", color="black", ms=5)
    for label, (colour, model) in models.items():
        ax.plot(values, model, "--", color=COLOURS[colour], label=label)
        ax.plot(0, np.interp(0, values, model), "o", color=COLOURS[colour], ms=5)
    ax.plot(at, loss, "ko", ms=9)


def unfinished_slice(loss, w, gradient, hessian):
    """The loss along the first weight where training stopped too soon, and two models of it."""
    figure, ax = new(size=(7.5, 3.6))
    values = np.linspace(-0.1, 1.0, 81)
    true = np.asarray(jax.vmap(lambda value: loss(w.at[0].set(value)))(values))
    step = values - float(w[0])
    flat = float(loss(w)) + 0.5 * float(hessian[0, 0]) * step**2
    tilted = flat + float(gradient[0]) * step
    models = {"OBD's parabola: no slope": ("obd", flat), "with the slope": ("other", tilted)}
    _slice(ax, values, true, models, float(w[0]), float(loss(w)))
    ax.set(xlabel="weight $w_1$", ylabel="loss (nats)")
    ax.set_title("Stopped too soon, the loss still slopes, and OBD misses over half the price")
    ax.legend(fontsize=9)
    return figure, {"w1": values, "loss": true, "obd_parabola": flat, "with_slope": tilted}


def taylor_bars(cases, names):
    """Stacked Taylor terms of several loss changes; a black mark is the actual change."""
    figure, ax = new(size=(7.5, 4.2))
    colours = [COLOURS[c] for c in ("other", "obd", "magnitude", "light")]
    below, above = np.zeros(len(cases)), np.zeros(len(cases))
    for term, colour in enumerate(colours):
        values = np.array([case[term] for case in cases.values()])
        start = np.where(values < 0, below, above)
        ax.bar(range(len(cases)), values, 0.5, start, color=colour, label=names[term])
        below, above = below + np.minimum(values, 0), above + np.maximum(values, 0)
    actual = [case[4] for case in cases.values()]
    ax.hlines(actual, np.arange(len(cases)) - 0.35, np.arange(len(cases)) + 0.35, "black", lw=2.5,
              label="actual")  # fmt: skip
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks(range(len(cases)), cases)
    ax.set(ylabel="change of the loss (nats)", title="What OBD keeps (orange), and what it drops")
    ax.set_axisbelow(True)
    ax.legend(fontsize=9)
    table = {"case": [name.replace("$", "").replace("\n", " ") for name in cases]}
    return figure, table | {names[t]: [case[t] for case in cases.values()] for t in range(5)}


def twins(loss, w, pairs):
    """A loss in the plane of two of three weights, and what OBD and the loss say of each pair.

    `pairs` has, for each name, the sum of the saliencies and the actual rise.
    """
    figure, (left, right) = new(1, 2, (7.5, 4.2))
    one = two = np.linspace(-0.6, 1.6, 51)
    grid = np.stack([*np.meshgrid(one, two), np.full((51, 51), float(w[2]))], axis=-1)
    rise = np.asarray(jax.vmap(jax.vmap(loss))(grid.astype(np.float32))) - float(loss(w))
    prune = {"w1": -w.at[1:].set(0), "w2": -w.at[np.array([0, 2])].set(0), "both": -w.at[2].set(0)}
    prices = {name: f"+{float(loss(w + d) - loss(w)):.3f}" for name, d in prune.items()}
    _valley(left, one, two, rise, w[:2], {k: d[:2] for k, d in prune.items()}, prices)
    left.set(ylabel="weight $w_2$", aspect="equal", title="The valley of the twins")
    place = np.arange(len(pairs))
    sums, actual = np.array(list(pairs.values())).T
    right.bar(place - 0.2, sums, 0.38, color=COLOURS["obd"], label="OBD: sum of saliencies")
    right.bar(place + 0.2, actual, 0.38, color="black", label="actual")
    right.set_xticks(place, pairs)
    right.set(ylabel="rise of the loss (nats)", ylim=(0, 0.19), box_aspect=1)
    right.set(title="OBD's cheapest pair is the dearest")
    right.legend(fontsize=9, loc="upper right")
    right.set_axisbelow(True)
    names = [name.replace("$", "") for name in pairs]
    return figure, {"pair": names, "sum_of_saliencies": sums, "actual_rise": actual}


# Notebook 07 -------------------------------------------------------------------------------------

TERMS = {
    "first": ("first order", COLOURS["other"]),
    "diagonal": ("diagonal (kept by OBD)", COLOURS["obd"]),
    "cross": ("cross terms", COLOURS["magnitude"]),
    "higher": ("higher orders", COLOURS["light"]),
}


def term_shares(panels: dict, title: str = "", size=(7.5, 4.4), floor: float = 0.0):
    """What each loss change is made of: stacked bars of its terms over the sum of their sizes.

    Parameters
    ----------
    panels : dict
        Panel title -> {label under the bar: LossChange of floats}.
    floor : float
        Changes smaller than this are drawn as an empty place.
    """
    figure, axes = new(1, len(panels), size, sharey=True, squeeze=False)
    rows = []
    for ax, (panel, cases) in zip(axes[0], panels.items(), strict=True):
        for place, (case, change) in enumerate(cases.items()):
            values = np.array([getattr(change, term) for term in TERMS])
            name = str(case).replace("\n", " ")
            rows.append((panel, name, *map(float, values), float(change.actual)))
            if abs(change.actual) < floor:
                continue
            shares, edges = values / np.abs(values).sum(), [0.0, 0.0]
            for share, (_, colour) in zip(shares, TERMS.values(), strict=True):
                ax.bar(place, share, 0.85, edges[int(share < 0)], color=colour)
                edges[int(share < 0)] += share
        ax.set_xticks(range(len(cases)), cases, fontsize=9 if len(cases) > 6 else None)
        ax.set_xlim(-0.6, len(cases) - 0.4)  # where a bar is left out, too
        ax.axhline(0, color="black", lw=0.8)
        ax.set_title(panel)
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("share of the four terms")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in TERMS.values()]
    labels = [name for name, _ in TERMS.values()]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9.5)
    figure.suptitle(title)
    return figure, axes[0], _columns(("panel", "case", *TERMS, "actual"), rows)


def predicted_actual(changes: dict, levels, title: str = ""):
    """Predicted against actual rise of the loss, log-log; a thin line a seed, a dot a level.

    Beside it the actual rise by level, whatever was predicted: mean and range over the seeds.
    """
    figure, (ax, right) = new(1, 2, (7.5, 4.8), sharey=True, width_ratios=[3, 2])
    line = np.array([1e-6, 10])
    ax.fill_between(line, line / 2, line * 2, color="0.88", lw=0, label="right to a factor of 2")
    ax.plot(line, line, color="0.5", lw=1)
    rows = []
    for criterion, change in changes.items():
        colour = COLOURS[criterion]
        for seed, pair in enumerate(zip(change.diagonal, change.actual, strict=True)):
            ax.plot(*pair, "o-", color=colour, ms=3, lw=0.8)
            rows += [(criterion, seed, *row) for row in zip(levels, *pair, strict=True)]
        seen = np.maximum(change.actual, 1e-5)  # what is less is below the axis
        band(right, levels, seen, NAMES[criterion], colour, marker="o", markersize=3)
        for percent in () if criterion == "random" else (10, 30, 50, 70, 90):
            place = list(levels).index(percent)
            x, y = change.diagonal[0][place], change.actual[0][place]
            if x > 1e-6 and y > 1e-5:
                ax.annotate(f"{percent} %", (x, y), (-6, 6), textcoords="offset points", ha="right",
                            color=colour, fontsize=9)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(1e-6, 3), ylim=(1e-5, 5))
    ax.set(title="How much: too low", ylabel="actual rise of the loss (nats)")
    ax.set_xlabel("predicted rise, ½ Σ h δ² (nats)")
    ax.legend(loc="lower right", fontsize=9.5)
    right.set(title="In which order: right", xlabel="percent pruned")
    right.legend(loc="lower right", fontsize=9.5)
    figure.suptitle(title)
    return figure, _columns(("criterion", "seed", "percent", "predicted", "actual"), rows)


def cross_ratios(panels: dict, levels, title: str = ""):
    """Cross terms over diagonal along the path: panel title -> {recipe's name: [seeds, levels]}."""
    figure, axes = new(1, len(panels), (7.5, 4.6), sharey=True)
    rows = []
    for ax, (panel, ratios) in zip(axes, panels.items(), strict=True):
        for recipe, values in ratios.items():
            band(ax, levels, values, *RECIPES[recipe])
            for seed, row in enumerate(values):
                rows += [(panel, recipe, seed, *point) for point in zip(levels, row, strict=True)]
        ax.axhline(0, color="black", lw=0.8)
        ax.set_yscale("symlog", linthresh=1)
        ax.minorticks_off()
        ax.set(title=panel, xlabel="percent pruned", yticks=[-1, 0, 1, 3, 10, 30, 100],
               yticklabels=["-1", "0", "1", "3", "10", "30", "100"])  # fmt: skip
    axes[0].set_ylabel("cross terms / diagonal")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9.5)
    figure.suptitle(title)
    names = ("criterion", "recipe", "seed", "percent", "cross_over_diagonal")
    return figure, _columns(names, rows)


def stale_recomputed(percents, curves: dict, title: str = ""):
    """Test accuracy ``[seeds, levels]`` of each way of ranking, against percent pruned."""
    figure, ax = new()
    styles = {"stale": (COLOURS["obd"], "--"), "recomputed": (COLOURS["obd"], "-")}
    for name, runs in curves.items():
        colour, line = styles.get(name, (COLOURS.get(name, "black"), ":"))
        band(ax, percents, runs, name, colour, line)
    ax.set(ylim=(0, 1), xlabel="percent pruned", ylabel="test accuracy", title=title)
    ax.legend()
    columns = {f"{n}_seed_{s}": run for n, runs in curves.items() for s, run in enumerate(runs)}
    return figure, {"percent_pruned": list(percents)} | columns


def hessian_picture(scaled_hessian, edges, names, title: str = ""):
    """A whole Hessian as an image, scaled to ``h_jk / √(h_jj h_kk)``; lines where layers meet."""
    figure, ax = new(size=(5.4, 4.9))
    limit = float(np.abs(scaled_hessian).max())
    norm = plt.matplotlib.colors.SymLogNorm(0.03, vmin=-limit, vmax=limit)
    colours = plt.get_cmap("RdBu_r", 11)  # few colours keep the file small
    image = ax.imshow(scaled_hessian, cmap=colours, norm=norm, interpolation="nearest")
    middles = (np.array([0, *edges[:-1]]) + np.array(edges)) / 2
    for edge in edges[:-1]:
        ax.axhline(edge - 0.5, color="black", lw=0.8)
        ax.axvline(edge - 0.5, color="black", lw=0.8)
    ax.set_xticks(middles, names)
    ax.set_yticks(middles, names, rotation=90, va="center")
    ax.grid(False)
    ax.set_title(title)
    ticks = [-1, -0.1, 0, 0.1, 1]
    figure.colorbar(image, label="$h_{jk} / \\sqrt{h_{jj} h_{kk}}$", ticks=ticks, format="%g")
    strength = np.abs(scaled_hessian)
    starts = [0, *edges[:-1]]
    blocks = [(a, b) for a in range(len(edges)) for b in range(len(edges))]
    mean = [float(strength[starts[a] : edges[a], starts[b] : edges[b]].mean()) for a, b in blocks]
    return figure, {
        "row": [names[a] for a, _ in blocks],
        "column": [names[b] for _, b in blocks],
        "mean_size": mean,
    }


def layer_blocks(panels: dict, names, title: str = ""):
    """Shares of the second-order term by pairs of layers: panel title -> matrix."""
    figure, axes = new(2, -(-len(panels) // 2), (7.5, 7.6))
    rows = []
    for ax, (panel, matrix) in zip(np.ravel(axes), panels.items(), strict=True):
        image = ax.imshow(100 * np.asarray(matrix), cmap="RdBu_r", vmin=-150, vmax=150)
        for (a, b), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.7 else "black"
            text = f"{round(100 * value)}"
            ax.text(b, a, text, ha="center", va="center", fontsize=9, color=colour)
            rows.append((panel, names[a], names[b], value))
        ax.set(title=panel, xlabel="layer", ylabel="layer")
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.grid(False)
    figure.colorbar(image, ax=axes, label="% of the diagonal term", shrink=0.5)
    figure.suptitle(title)
    return figure, _columns(("panel", "row", "column", "share"), rows)


def rank_scatter(places, rho, title: str = ""):
    """Ranks by magnitude against ranks by OBD (percentiles, two arrays), as a density."""
    figure, ax = new(size=(7, 5.2))
    counts, *_ = np.histogram2d(*places, bins=50, range=[[0, 100]] * 2)
    image = ax.imshow(np.log10(counts.T + 1), origin="lower", extent=(0, 100, 0, 100))
    ax.set(xlabel="rank by magnitude (percentile)", ylabel="rank by OBD (percentile)", title=title)
    ax.grid(False)
    figure.colorbar(image, label="log$_{10}$(weights + 1)")
    return figure, {"layer": list(rho), "spearman": [float(value) for value in rho.values()]}


# Notebook 10 -------------------------------------------------------------------------------------

PASSES = {
    "gauss_newton": ("exact, Gauss-Newton", COLOURS["obd"], "o-"),
    "sampled": ("sampled class", COLOURS["accent"], "s-"),
    "hutchinson": ("Hutchinson", COLOURS["other"], "^-"),
    "neuron": ("exact, per neuron", COLOURS["light"], "d-"),
}


def scaling_costs(panels: list, title: str = ""):
    """Seconds against what grows: panels of (axis, method -> (sizes, seconds)), from zero.

    Straight lines are fitted, but to `neuron`: its cost is no straight line.
    """
    figure, axes = new(2, 2, (7.5, 6.4))
    rows = []
    for ax, (grows, curves) in zip(axes.flat, panels, strict=True):
        for method, (sizes, seconds) in curves.items():
            label, colour, line = PASSES[method]
            ax.plot(sizes, seconds, line[0], color=colour, label=label)
            ends, values = sizes, seconds
            if method != "neuron":
                ends = np.array([0, max(sizes)])
                values = np.polyval(np.polyfit(sizes, seconds, 1), ends)
            ax.plot(ends, values, color=colour, lw=1)
            rows += [(grows, method, *row) for row in zip(sizes, seconds, strict=True)]
        ax.set(xlabel=grows, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        ax.legend(fontsize=9)
    figure.suptitle(title)
    return figure, _columns(("grows", "method", "size", "seconds"), rows)


def scaling_model(table: dict, rate: float, title: str = ""):
    """Measured seconds against counted operations (columns sweep, size, gflop, seconds)."""
    figure, ax = new()
    sweeps = dict(zip(dict.fromkeys(table["sweep"]), "os^d", strict=False))
    for (sweep, marker), colour in zip(sweeps.items(), COLOURS.values(), strict=False):
        chosen = [i for i, name in enumerate(table["sweep"]) if name == sweep]
        points = np.array([(table["gflop"][i], table["seconds"][i]) for i in chosen])
        ax.plot(*points.T, marker, color=colour, label=f"{sweep} grow", ms=7)
    ends = np.array([min(table["gflop"]), max(table["gflop"])])
    ax.plot(ends, ends / rate, color="0.4", lw=1, label=f"{rate:.0f} GFLOP/s")
    ax.set(xscale="log", yscale="log", xlabel="operations counted (GFLOP)", ylabel="seconds")
    ax.set_title(title)
    _plain_ticks(ax)
    ax.legend()
    return figure, table


def _plain_ticks(ax):
    """1, 2, 5 and their tens as plain numbers on log axes that span little more than a decade."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(plt.matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(plt.matplotlib.ticker.NullLocator())


def scaling_errors(curves: list, title: str = ""):
    """Relative error against draws or probes: (method, label, numbers, errors) for each curve."""
    figure, ax = new()
    rows = []
    for (method, n, numbers, errors), fill in zip(curves, ("full", "none", "full"), strict=False):
        label, colour, line = PASSES[method]
        ax.plot(numbers, errors, line, color=colour, fillstyle=fill, label=f"{label}, {n:,} images")
        rows += [(method, n, *row) for row in zip(numbers, errors, strict=True)]
    ax.set(xscale="log", yscale="log", xlabel="draws per example, or probes", title=title)
    ax.set_ylabel("relative error (2-norm)")
    _plain_ticks(ax)
    ax.legend()
    return figure, _columns(("method", "examples", "draws", "relative_error"), rows)


def affordable(parameters, seconds: dict, title: str = ""):
    """Time on paper against the number of parameters: label -> (seconds, colour, line)."""
    figure, ax = new(size=(7.5, 5))
    for label, (values, colour, line) in seconds.items():
        ax.plot(parameters, values, line, color=colour, label=label)
    for name, time in {"minute": 60, "day": 86400, "year": 3.16e7}.items():
        ax.axhline(time, color="0.7", lw=0.8, zorder=0)
        ax.text(parameters[-1], time * 1.15, name, fontsize=9, color="0.4", ha="right")
    ax.set(xscale="log", yscale="log", xlabel="parameters", ylabel="seconds", title=title)
    ax.legend(fontsize=9, loc="upper left")
    columns = {label: [float(v) for v in values] for label, (values, _, _) in seconds.items()}
    return figure, {"parameters": [float(p) for p in parameters]} | columns
