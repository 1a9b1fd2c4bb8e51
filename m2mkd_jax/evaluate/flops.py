"""Counts FLOPs and the memory of activations from the jaxpr, without compiling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from m2mkd_jax.models.moe.grouped import LOOP_FLOPS

DRAW = 50  # as long to compile, about: twenty rounds of Threefry


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products and convolutions of a function, with all iterations of loops.

    Those of all devices together.

    A multiply-add counts as two. XLA's own analysis counts the body of a loop once. Loops whose
    length depends on data count once here too, except those of grouped.LOOP_FLOPS.

    Args:
        function: a traceable function.
        *args: its arguments: arrays or shapes (jax.ShapeDtypeStruct).
    """
    return flops_of(jax.make_jaxpr(function)(*args).jaxpr)


def _shape(variable: Any) -> tuple[int, ...]:
    """Shape of a variable of a jaxpr."""
    return variable.aval.shape


def flops_of(jaxpr: core.Jaxpr) -> int:
    """As `count_flops`, of a jaxpr and the jaxprs in it."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contract, _), _) = eqn.params["dimension_numbers"]
            lhs = _shape(eqn.invars[0])
            total += 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(lhs[i] for i in contract)
        elif eqn.primitive.name == "ragged_dot_general":
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            contract, _ = numbers.dot_dimension_numbers[0]
            lhs, sizes = _shape(eqn.invars[0]), _shape(eqn.invars[2])
            # A contracted ragged axis is divided among the groups of the result.
            groups = sizes[-1] if set(contract) & set(numbers.lhs_ragged_dimensions) else 1
            summed = math.prod(lhs[i] for i in contract)
            total += 2 * math.prod(_shape(eqn.outvars[0])) * summed // groups
        elif (loop := _loop(str(eqn.params.get("name")))) is not None:
            # Remat may split off parts of such a function that have no product.
            if any(flops_of(inner) for inner in _inner(eqn.params.values())):
                total += _loop_flops(eqn, *loop)
            continue
        elif eqn.primitive.name == "conv_general_dilated":
            total += 2 * _convolution(eqn)
        times = _times(eqn)
        total += times * sum(flops_of(inner) for inner in _inner(eqn.params.values()))
    return total


def _convolution(eqn: Any) -> int:
    """Multiply-adds of a convolution, with those of zeros beyond the border.

    Zeros between the inputs, as the gradient of a strided convolution has them, are not multiplied.
    """
    kernel, out = _shape(eqn.invars[1]), _shape(eqn.outvars[0])
    numbers = eqn.params["dimension_numbers"]
    batch, features, *places = numbers.out_spec
    total = out[batch] * out[features] * kernel[numbers.rhs_spec[1]]
    dilations = eqn.params["lhs_dilation"], eqn.params["rhs_dilation"]
    for place, at, stride, (low, _), between, apart in zip(
        places,
        numbers.rhs_spec[2:],
        eqn.params["window_strides"],
        eqn.params["padding"],
        *dilations,
        strict=True,
    ):
        starts = np.arange(out[place])[:, None] * stride - low
        total *= int(((starts + np.arange(kernel[at]) * apart) % between == 0).sum())
    return total


def equations_of(jaxpr: core.Jaxpr) -> int:
    """Equations of a jaxpr and the jaxprs in it, each once: the size of what is compiled.

    Drawing random numbers is one equation, but as much to compile as DRAW others.
    """
    total = 0
    for eqn in jaxpr.eqns:
        inner = list(_inner(eqn.params.values()))
        own = DRAW if eqn.primitive.name in ("random_bits", "threefry2x32") else 1
        total += sum(map(equations_of, inner)) if inner else own
    return total


def _times(eqn: Any) -> int:
    """How often the jaxprs in an equation run.

    The rounds of a scan, the devices of a shard_map, the programs of a kernel.
    """
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    if eqn.primitive.name == "scan":
        return int(eqn.params["length"])
    if eqn.primitive.name == "shard_map":  # its shapes are those of one device
        return math.prod(
            size for axis, size in eqn.params["mesh"].shape.items() if axis in _axes(eqn)
        )
    return 1


def _axes(eqn: Any) -> Any:
    """The axes that a shard_map cuts over; the parameter's name differs between versions of jax."""
    names = ("manual_axes", "newly_manual_axes")
    found = next((eqn.params[name] for name in names if eqn.params.get(name)), None)
    return found or eqn.params["mesh"].axis_names


def _loop(name: str) -> tuple[int, int | None] | None:
    """FLOPs per row and weight of a function of grouped.LOOP_FLOPS, and the rows in its name."""
    stem, _, number = name.rpartition("_")
    if name in LOOP_FLOPS:
        return LOOP_FLOPS[name], None
    if stem in LOOP_FLOPS and number.isdigit():
        return LOOP_FLOPS[stem], int(number)
    return None


def _loop_flops(eqn: Any, flops: int, rows: int | None) -> int:
    """FLOPs of a function of grouped.LOOP_FLOPS, given what `_loop` found in its name."""
    first, *others = (_shape(v) for v in eqn.invars)
    # It is given rows (N, C) or tiles (tiles, T, C) first, several of them if mapped over networks.
    mapped = len(first) - (2 if rows is None else 3)
    networks = first[0] if mapped else 1
    if rows is None:
        rows = first[-2]
    kernel = next(shape for shape in others if len(shape) >= 3)  # it comes before all others
    return flops * networks * rows * math.prod(kernel[-2:])


def _inner(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs in the parameters of an equation."""
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def kept_bytes(function: Callable[..., Any], trainable: Any, *args: Any) -> int:
    """Bytes saved by the forward pass for the backward pass, without the arguments.

    An upper bound: XLA may recompute or fuse some of it.

    Args:
        function: (trainable, *args) -> scalar.
        trainable: what to differentiate by: arrays or shapes.
        *args: arrays or shapes.
    """
    residuals = jax.eval_shape(
        lambda p, *a: jax.vjp(lambda p: function(p, *a), p)[1], trainable, *args
    )
    # Saved arguments appear among the residuals with their own shapes.
    arguments = Counter((a.shape, a.dtype) for a in jax.tree.leaves((trainable, *args)))
    kept = Counter((r.shape, r.dtype) for r in jax.tree.leaves(residuals)) - arguments
    return sum(n * math.prod(shape) * dtype.itemsize for (shape, dtype), n in kept.items())
