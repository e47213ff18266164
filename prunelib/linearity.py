"""Whether each weight enters the logits piecewise linearly: read off the network's own program.

Where it does, the Gauss-Newton diagonal *is* the Hessian's (Martens, JMLR 21, 2020, section 9).
It does not behind a smooth activation, nor where one array is used at several depths, so that it
multiplies itself.
"""

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

from prunelib.passes import Function

NONE, LINEAR, SHARED, SMOOTH = range(4)  # how a value depends on an array of parameters

# Linear in all their inputs together, or only choosing among them.
_LINEAR = {
    "add", "add_any", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy",
    "cummax", "cummin", "cumsum", "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather",
    "max", "min", "abs", "neg", "optimization_barrier", "pad", "reduce_max", "reduce_min",
    "reduce_precision", "reduce_sum", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "reshape", "rev", "scatter", "scatter-add", "select_and_gather_add",
    "select_and_scatter_add", "select_n", "sharding_constraint", "slice", "sort", "split",
    "squeeze", "stack", "sub", "tile", "top_k", "transpose", "unstack",
}  # fmt: skip
_PRODUCT = {"mul", "dot_general", "conv_general_dilated"}
# Constant almost everywhere.
_STEPS = {"eq", "ne", "lt", "le", "gt", "ge", "sign", "floor", "ceil", "round", "argmax", "argmin",
          "is_finite", "and", "or", "not"}  # fmt: skip


def dependence(forward: Function, params: Any) -> dict[str, int]:
    """How the logits depend on each array of `params`: NONE, LINEAR, SHARED or SMOOTH, by path.

    LINEAR is piecewise linear in each single weight. SHARED is an array that multiplies something
    that depends on it, SMOOTH one behind a function that bends. Where the program does not tell,
    the answer is the less favourable one.
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    found = {}
    for number, path in enumerate(paths):
        inputs = [LINEAR if i == number else NONE for i in range(len(paths) + 1)]  # and the images
        found[path] = max(_follow(forward.program, inputs))
    return found

def _follow(program: ClosedJaxpr, inputs: list[int]) -> list[int]:
    jaxpr = getattr(program, "jaxpr", program)
    kinds = dict.fromkeys(jaxpr.constvars, NONE) | dict(zip(jaxpr.invars, inputs, strict=True))

    def kind(value):
        return NONE if isinstance(value, Literal) else kinds[value]

    for equation in jaxpr.eqns:
        outputs = _through(equation, [kind(value) for value in equation.invars])
        kinds |= dict(zip(equation.outvars, outputs, strict=True))
    return [kind(value) for value in jaxpr.outvars]

def _through(equation, inputs: list[int]) -> list[int]:
    name, most, count = equation.primitive.name, max(inputs, default=NONE), len(equation.outvars)
    if most == NONE or name in _STEPS:
        return [NONE] * count
    if name in _LINEAR or (name == "div" and inputs[1] == NONE):
        return [most] * count
    if name in _PRODUCT:
        return [max(SHARED, most) if min(inputs) > NONE else most] * count
    inner = [v for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if (v := equation.params.get(key))]
    if name == "scan":  # what is carried may grow from step to step
        start = equation.params["num_consts"]
        place = slice(start, start + equation.params["num_carry"])
        while inputs[place] != (grown := list(map(max, inputs[place], _follow(inner[0], inputs)))):
            inputs[place] = grown
    if inner and len(getattr(inner[0], "jaxpr", inner[0]).invars) == len(inputs):
        return _follow(inner[0], inputs)
    return [SMOOTH] * count
