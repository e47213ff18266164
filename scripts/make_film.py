"""Film where lesson 05's first-layer weights are left, figures/vanishing.gif.

    python scripts/make_film.py
"""

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import LinearSegmentedColormap, to_rgb

from prunelib import curvature, data, experiments, figures, models, pruning

# A frame to look at first, where only one is shown.
LEVELS = [80, 80, 80, 0, 0, 0, *range(0, 60, 3), *range(60, 99, 2), 99, 99, 99, 99]


def shades(colour):
    """From nearly white through a colour to a dark one."""
    colour = np.array(to_rgb(colour))
    return LinearSegmentedColormap.from_list("", [3 * [0.95], colour, 0.35 * colour])


def main():
    mnist, network = data.load_mnist(), models.mlp()
    params = experiments.trained("plain").select(0)
    h = curvature.hessian_diagonal(network, params, mnist.train)
    scores = {"magnitude": pruning.magnitude(params), "obd": pruning.obd_saliency(params, h)}
    rank = {c: np.asarray(pruning.ranks(s)["dense1"]["kernel"]) for c, s in scores.items()}
    curves = {c: pruning.accuracy_curve(network, params, s, mnist.test) for c, s in scores.items()}
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    fig, axes = figures.new(1, 3, (9, 3.5), width_ratios=[1, 1, 1.25])
    fig.suptitle("Where the first layer's weights are left, after training with Adam")

    def frame(percent):
        for ax in axes:
            ax.clear()
        for ax, (criterion, curve) in zip(axes, curves.items(), strict=False):
            left = (rank[criterion] >= size * percent // 100).sum(1).reshape(28, 28)
            colour, accuracy = figures.COLOURS[criterion], 100 * curve.accuracy
            ax.imshow(left, shades(colour), vmin=0, vmax=50)
            title = f"{figures.NAMES[criterion]}: accuracy {accuracy[percent]:.1f} %"
            ax.set_title(title, color=colour)
            ax.axis("off")
            axes[2].plot(curve.remaining, accuracy, color=colour, alpha=0.2)
            so_far = slice(0, percent + 1)
            axes[2].plot(curve.remaining[so_far], accuracy[so_far], color=colour, linewidth=2)
            end = {"color": colour, "markersize": 8, "clip_on": False}
            axes[2].plot(100 - percent, accuracy[percent], "o", **end)
        axes[2].set(ylim=(0, 103), title=f"{100 - percent} % remain", ylabel="test accuracy (%)")
        figures.remaining_axis(axes[2], low=1)

    film = figures.folder() / "vanishing.gif"
    FuncAnimation(fig, frame, LEVELS).save(film, PillowWriter(fps=5), dpi=100)


if __name__ == "__main__":
    main()
