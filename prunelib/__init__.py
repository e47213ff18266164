"""Optimal Brain Damage in JAX: the helper package of the notebooks.

What it does, in the order in which the data flow:

- `prunelib.data`: MNIST through TensorFlow Datasets, without TensorFlow.
- `prunelib.models`: the 2016 network and a LeNet-5, as pure functions of a params pytree.
- `prunelib.training`: recipes, and whole runs, all seeds at once, in one compiled scan.
- `prunelib.curvature`: Hessian-vector products, and the diagonal of the Hessian five ways.
- `prunelib.pruning`: saliency, ranking, mask, accuracy curve.
- `prunelib.retraining`: pruning with retraining, and masks that no optimizer undoes.
- `prunelib.streaming`: the same passes over more examples than memory holds, resumable.
- `prunelib.taylor`: the terms of the loss change along a pruning path.
- `prunelib.figures`: every plot of the series, and saving it with its table.

Each module is imported by name (``from prunelib import pruning``); this file imports none.
"""

__version__ = "1.0.0"
