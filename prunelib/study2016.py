"""What belongs to the pruning study of 2016: the accuracies it published."""

from pathlib import Path

import pandas as pd

EXPERIMENTS = {"magnitude_all_layers": ("magnitude", "all"), "obd_all_layers": ("obd", "all")}
EXPERIMENTS |= {"magnitude_layerwise": ("magnitude", "layer"), "obd_layerwise": ("obd", "layer")}
EXPERIMENTS |= {"obd_all_layers_dropout": ("obd", "all")}  # criterion and scope, as published


def published() -> pd.DataFrame:
    """The test accuracies that the study published, without retraining, one row a point.

    `experiment` (a key of EXPERIMENTS), `criterion` and `scope` as published, `remaining` and
    `percent` pruned (both in percent), and `accuracy` in [0, 1].
    """
    table = pd.read_csv(Path(__file__).with_name("published_2016.csv"), comment="#")
    table.columns = ["experiment", "remaining", "accuracy"]
    names = table.experiment.map(EXPERIMENTS)
    return table.assign(criterion=names.str[0], scope=names.str[1], percent=100 - table.remaining)
