"""Counting floating-point operations and kept activations without compiling anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import jax
from jax.extend import core

from m2mkd_jax.models.moe.grouped import LOOP_FLOPS


def count_flops(function: Callable, *args) -> int:
    """FLOPs of the matrix products and convolutions of `function(*args)`, loops included.

    Args may be shapes (jax.ShapeDtypeStruct). A multiply-add counts as two. XLA's own analysis
    counts the body of a loop once, which is why this walks the jaxpr. A loop whose length only the
    data decide counts once too, but for those of models/moe/grouped.py.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contract, _), _) = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
        elif eqn.primitive.name == "ragged_dot_general":
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            contract, _ = numbers.dot_dimension_numbers[0]
            lhs, sizes = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
            # Ragged rows that are summed over are shared out among the groups of the result.
            groups = sizes[-1] if set(contract) & set(numbers.lhs_ragged_dimensions) else 1
            summed = math.prod(lhs[i] for i in contract)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * summed // groups
        elif eqn.params.get("name") in LOOP_FLOPS:
            # What rematerialisation cuts off such a function may hold no product at all.
            if any(_count(inner) for inner in _inner(eqn.params.values())):
                shapes = [v.aval.shape for v in eqn.invars]
                rows, kernel = (next(s for s in shapes if len(s) == n) for n in (2, 3))
                total += LOOP_FLOPS[eqn.params["name"]] * rows[0] * math.prod(kernel[1:])
            continue
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[out_axis]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * per_output
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += times * sum(_count(inner) for inner in _inner(eqn.params.values()))
    return total


def _inner(values):
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def kept_bytes(function: Callable, trainable, *args) -> int:
    """Bytes that a backward pass keeps from the forward pass, arguments left out.

    `function`: (trainable, *args) -> scalar, differentiated by `trainable`. An upper bound: XLA
    may recompute or fuse some of it away.
    """
    residuals = jax.eval_shape(
        lambda p, *a: jax.vjp(lambda p: function(p, *a), p)[1], trainable, *args
    )
    # An argument that is kept is among the residuals under its own shape.
    arguments = Counter((a.shape, a.dtype) for a in jax.tree.leaves((trainable, *args)))
    kept = Counter((r.shape, r.dtype) for r in jax.tree.leaves(residuals)) - arguments
    return sum(n * math.prod(shape) * dtype.itemsize for (shape, dtype), n in kept.items())
