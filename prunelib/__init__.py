"""Optimal Brain Damage in JAX: the helper package of the notebooks.

Read in this order: `checks`, `store`, `data`, `passes`, `models`, `training`, `linearity`,
`chains`, `gauss_newton`, `curvature`, `units`, `pruning`, `taylor`, `surgeon`, `retraining`,
`streaming`, `study2016`, `experiments`; and `figures`. Each is imported by name
(``from prunelib import pruning``).
"""

__version__ = "2.0.0"
