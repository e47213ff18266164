"""Draw the lessons' icons, figures/icons/NN.png: one idea each, to be read at 120 pixels.

    python scripts/make_icons.py
"""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "figures" / "icons"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
X = np.linspace(0, 1, 200)


def parabola(ax):
    ax.plot(X, 3.2 * (X - 0.45) ** 2 + 0.15, color=GREY)
    ax.plot([0.15, 0.85], [0.44, 0.66], "o", color=ORANGE)
    ax.annotate("", (0.78, 0.5), (0.5, 0.2), arrowprops={"arrowstyle": "->", "lw": 3})


def layers(ax):
    columns = [(x, np.linspace(0.15, 0.85, n)) for x, n in ((0.15, 5), (0.5, 4), (0.85, 3))]
    for (left, starts), (right, ends) in itertools.pairwise(columns):
        for y in starts:
            ax.plot([left, right], [np.full(len(ends), y), ends], color=GREY, lw=1.2, zorder=0)
    for x, ys in columns:
        ax.plot(np.full(len(ys), x), ys, "o", color=BLUE, ms=13)


def diagonal(ax):
    ax.imshow(np.full((6, 6), 0.15), cmap="Greys", vmin=0, vmax=1, extent=(0.1, 0.9, 0.1, 0.9))
    edges = np.linspace(0.1, 0.9, 7)
    for a, b, c in zip(edges, edges[1:], edges[::-1], strict=False):
        ax.fill([a, b, b, a], [c, c, c - 0.133, c - 0.133], color=ORANGE)


def estimates(ax):
    rng = np.random.default_rng(0)
    x = np.linspace(0.12, 0.9, 7)
    ax.plot(x, 0.75 / (1 + 5 * x) + 0.1 + 0.04 * rng.normal(size=7), "o", color=GREY, ms=12)
    ax.plot([0.16], [0.12], "*", color=ORANGE, ms=30)


def falls(ax):
    ax.plot(X, 0.85 / (1 + np.exp(14 * (X - 0.5))) + 0.08, color=BLUE)
    ax.plot(X, 0.85 / (1 + np.exp(18 * (X - 0.72))) + 0.08, color=ORANGE)


def dropped(ax):
    ax.plot([0.5] * 4, np.linspace(0.12, 0.88, 4), "o", color=BLUE, ms=18)
    ax.plot([0.5], [0.373], "x", color="white", ms=12, mew=4)
    ax.plot([0.5], [0.373], "o", color="none", mec=GREY, mew=4, ms=22)


def detective(ax):
    ax.add_patch(plt.Circle((0.42, 0.58), 0.3, fill=False, lw=6, color="black"))
    ax.plot([0.64, 0.9], [0.36, 0.1], color="black", lw=9)
    ax.text(0.42, 0.57, "NaN", ha="center", va="center", fontsize=19, color=ORANGE)


def terms(ax):
    for x, h, c in zip((0.2, 0.4, 0.6, 0.8), (0.15, 0.3, 0.35, 0.8),
                       ("#CC79A7", "#E69F00", "#56B4E9", "#8C6D46"), strict=True):  # fmt: skip
        ax.bar(x, h, 0.15, 0.08, color=c)


def ring(ax):
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    picture = np.exp(-((np.hypot(x, y) - 0.78) ** 2) / 0.02)
    ax.imshow(picture, cmap="Blues", extent=(0.05, 0.95, 0.05, 0.95))


def loop(ax):
    t = np.linspace(0.6, 2 * np.pi, 100)
    ax.plot(0.5 + 0.33 * np.cos(t), 0.5 + 0.33 * np.sin(t), color=GREEN)
    ax.annotate("", (0.84, 0.47), (0.82, 0.4), arrowprops={"arrowstyle": "-|>", "lw": 5,
                "color": GREEN, "mutation_scale": 34})  # fmt: skip
    ax.text(0.5, 0.5, "✂", ha="center", va="center", fontsize=34)


def shared(ax):
    for x, y in ((0.1, 0.55), (0.35, 0.3), (0.6, 0.05)):
        ax.fill([x, x + 0.3, x + 0.3, x], [y, y, y + 0.3, y + 0.3], color=ORANGE, alpha=0.75)
    ax.plot([0.08, 0.92, 0.92, 0.08, 0.08], [0.03, 0.03, 0.88, 0.88, 0.03], color=GREY, lw=3)


def moves(ax):
    ax.plot([0.3], [0.25], "o", color=GREY, ms=20)
    ax.plot([0.3], [0.25], "x", color="black", ms=12, mew=4)
    ax.annotate("", (0.7, 0.86), (0.7, 0.3), arrowprops={"arrowstyle": "-|>", "lw": 5,
                "color": GREEN, "mutation_scale": 30})  # fmt: skip
    ax.plot([0.7], [0.25], "o", color=GREEN, ms=20)


def smaller(ax):
    for x, y, side, colour in ((0.05, 0.2, 0.5, GREY), (0.68, 0.33, 0.25, BLUE)):
        ax.fill([x, x + side, x + side, x], [y, y, y + side, y + side], color=colour)
    ax.fill([0.25, 0.37, 0.37, 0.25], [0.2, 0.2, 0.7, 0.7], color=ORANGE)
    ax.annotate("", (0.67, 0.85), (0.2, 0.85), arrowprops={"arrowstyle": "-|>", "lw": 4,
                "color": "black", "mutation_scale": 24})  # fmt: skip


def devices(ax):
    for i in range(8):
        x, y = 0.14 + 0.24 * (i % 4), 0.3 + 0.4 * (i // 4)
        ax.plot([0.5, x], [0.5, y], color=GREY, lw=2, zorder=0)
        ax.plot([x], [y], "s", color=BLUE, ms=17)
    ax.plot([0.5], [0.5], "o", color=ORANGE, ms=17)


DRAWN = {1: parabola, 2: layers, 3: diagonal, 4: estimates, 5: falls, 6: dropped, 7: detective,
         8: terms, 9: ring, 10: loop, 11: shared, 12: moves, 13: smaller,
         14: devices}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, draw in DRAWN.items():
        with plt.rc_context({"lines.linewidth": 6}):
            figure, ax = plt.subplots(figsize=(2, 2))
            draw(ax)
            ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
            ax.axis("off")
            figure.savefig(FOLDER / f"{number:02}.png", dpi=120, metadata={"Software": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
