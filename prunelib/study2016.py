"""What belongs to the pruning study of 2016: the accuracies it published."""

from pathlib import Path

import pandas as pd

# experiment: its criterion and scope, as published
EXPERIMENTS = {
    "magnitude_all_layers": ("magnitude", "all"),
    "magnitude_layerwise": ("magnitude", "layer"),
    "obd_all_layers": ("obd", "all"),
    "obd_layerwise": ("obd", "layer"),
    "obd_all_layers_dropout": ("obd", "all"),
}


def published() -> pd.DataFrame:
    """The test accuracies that the study published, without retraining.

    Returns
    -------
    DataFrame
        One row a point: `experiment` (a key of `EXPERIMENTS`), `criterion` and `scope` as
        published, `remaining` and `percent` pruned (both in percent), and `accuracy` in [0, 1].
    """
    table = pd.read_csv(Path(__file__).with_name("published_2016.csv"), comment="#")
    table = table.rename(
        columns={"percent_remaining": "remaining", "test_accuracy": "accuracy"}
    )
    names = table.experiment.map(EXPERIMENTS)
    return table.assign(criterion=names.str[0], scope=names.str[1], percent=100 - table.remaining)
