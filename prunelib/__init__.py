"""Optimal Brain Damage in JAX: the helper package of the notebooks.

In the order in which they build on each other:

- `checks`, `store`: refusing bad input in words; keeping arrays by name.
- `data`: MNIST through TensorFlow Datasets, without TensorFlow.
- `passes`, `linearity`: one pass over the data; how weights enter the logits.
- `models`: the 2016 network and the two LeNets, as pure functions of a params pytree.
- `training`: recipes, and all seeds at once in one compiled scan.
- `curvature`: Hessian-vector products, and the diagonal of the Hessian.
- `pruning`: saliency, ranking, mask, accuracy curve.
- `taylor`, `retraining`, `streaming`: the terms of the loss change; prune, retrain, repeat; more
  examples than memory holds.
- `study2016`, `experiments`: what was published; every run and experiment of the series by name.
- `figures`: one style, and saving a picture with the table it shows.

Each module is imported by name (``from prunelib import pruning``); this file imports none.
"""

__version__ = "2.0.0"
