"""What bends: whether the logits are piecewise linear in an array, read off their own program.

Where they are in each array of weights, the Gauss-Newton diagonal *is* the Hessian's (Martens,
JMLR 21, 2020, section 9). They are not behind a smooth activation, nor where one array is used at
several depths. JAX tells: it knows what has no derivative (a comparison, a choice, a rounding),
follows rules that a function brings along (`jax.custom_jvp`), and writes nothing for what is zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from prunelib.passes import Function, equations

_UNIT_BY_UNIT = {
    "abs", "add", "add_any", "and", "asinh", "atan", "atan2", "bitcast_convert_type",
    "broadcast_in_dim", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh",
    "custom_jvp_call", "custom_vjp_call", "div", "eq", "erf", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "jit", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "pjit",
    "polynomial", "pow", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh",
}  # fmt: skip


def bent(forward: Function, params: Any) -> dict[str, bool]:
    """For each array of `params`, by path, and "images": whether the logits bend along it.

    False is piecewise linear. In doubt (two columns of one array that are multiplied) it is True.
    """
    *weights, images = forward.program.in_avals
    dtype = jnp.float32 if images.dtype == jnp.uint8 else images.dtype  # to differentiate
    grey, structure = jax.ShapeDtypeStruct(images.shape, dtype), jax.tree.structure(params)

    def gradients(signal, *arrays):
        return jax.vjp(lambda *x: forward(structure.unflatten(x[:-1]), x[-1]), *arrays)[1](signal)

    program = jax.make_jaxpr(gradients)(*forward.program.out_avals, *weights, grey)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    run = jaxpr_as_fun(program)
    return {
        path: varies(lambda *x, k=k: run(*x)[k], program.in_avals, k + 1)
        for k, path in enumerate([*paths, "images"])
    }


def varies(function: Callable, inputs: Sequence[Any], at: int = 0) -> bool:
    """Whether a function has a derivative along input number `at`; inputs are shapes and dtypes."""

    def along(direction, *inputs):
        before, x, after = inputs[:at], inputs[at], inputs[at + 1 :]
        return jax.jvp(lambda x: function(*before, x, *after), (x,), (direction,))[1]

    program = jax.make_jaxpr(along)(inputs[at], *inputs).jaxpr
    reached = {program.invars[0]}
    for equation in program.eqns:
        if any(not isinstance(x, Literal) and x in reached for x in equation.invars):
            reached |= set(equation.outvars)
    return any(not isinstance(x, Literal) and x in reached for x in program.outvars)


def slope(function: Callable) -> Callable:
    """The derivative of a function that works unit by unit, by its own rules."""

    def derivative(z):
        out, pull = jax.vjp(function, z)
        return pull(jnp.ones_like(out))[0]

    return derivative


def is_unit_by_unit(function: Callable, units: int) -> bool:
    """Whether, of ``[n, units]``, each output and its derivatives follow from one input alone.

    Softmax or a norm do not. Where the program does not tell, the answer is no.
    """
    z = jax.ShapeDtypeStruct((2, units), jnp.float32)
    program = jax.make_jaxpr(slope(slope(function)))(z)
    return all(equation.primitive.name in _UNIT_BY_UNIT for equation in equations(program))
