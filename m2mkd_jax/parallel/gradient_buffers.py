"""Arrays for a step's largest gradients, which stay allocated from step to step.

For parameters that a CPU reads in their stacks (models/gradients_in_place.py): the experts' of a
V-MoE. XLA allocates what a program needs for itself at every call, and the system clears each page
of it when it is first touched: for these gradients that takes up to a tenth of a step
(benchmarks/RESULTS.md). Others are small beside the activations, which could not use their memory.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from m2mkd_jax import tree_paths
from m2mkd_jax.parallel import backend

# By the id of a parameter: the parameter, the array for its gradient, and its name.
_Buffers = dict[int, tuple[jax.Array, jax.Array, str]]
_BUFFERS: contextvars.ContextVar[tuple[_Buffers, set[str]] | None] = contextvars.ContextVar(
    "buffers", default=None
)


@contextlib.contextmanager
def writing_into(
    parameters: dict[str, jax.Array], arrays: dict[str, jax.Array], used: set[str]
) -> Iterator[None]:
    """While a loss is traced: the arrays that gradients are written into.

    What is in them does not matter. A parameter takes its array if it comes to a loop over layers
    as it is.

    Args:
        parameters: by name.
        arrays: by name, each with shape and type of its parameter.
        used: gets the names of those that are used.
    """
    known = {id(parameters[name]): (parameters[name], arrays[name], name) for name in arrays}
    token = _BUFFERS.set((known, used))
    try:
        yield
    finally:
        _BUFFERS.reset(token)


def buffer_of(parameter: jax.Array) -> jax.Array:
    """Where a parameter's gradient is written: its array, once, or zeros."""
    known, used = _BUFFERS.get() or ({}, set())
    if id(parameter) not in known:
        return jnp.zeros_like(parameter)
    _, array, name = known.pop(id(parameter))
    used.add(name)
    return array


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, tree_paths.names(path)))


def by_name(params: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


class GradientBuffers:
    """The arrays of one step, by the parameter's name.

    A step is traced with `shapes`, and its trace sets `used` to the names that it uses. Until
    `settle` says that these are all, it has to be traced again.

    Attributes:
        names: of the parameters that have an array; None before `shapes`.
        arrays: those that no program has taken over.
        used: by the last trace.
    """

    def __init__(self) -> None:
        self.names: set[str] | None = None
        self.arrays: dict[str, jax.Array] = {}
        self.used: set[str] = set()

    def shapes(self, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the arrays that a step with these parameters, or their shapes, may use."""
        if self.names is None:
            self.names = _candidates(params)
        named = {name: leaf for name, leaf in by_name(params).items() if name in self.names}
        return {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in named.items()}

    def settle(self) -> bool:
        """Keeps those alone that the trace has used; whether that is all of them."""
        settled = self.names == self.used
        self.names = set(self.used)
        return settled

    def take(self, params: Any) -> dict[str, jax.Array]:
        """Hands the arrays over to a program, which takes over their memory."""
        arrays, self.arrays = self.arrays, {}
        if arrays.keys() == self.names:
            return arrays
        shapes = self.shapes(params)
        zeros = lambda: {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        return backend.jit(zeros, once=True)()


def _candidates(params: Any) -> set[str]:
    if not backend.is_one_cpu():
        return set()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {_name(path) for path in paths if tree_paths.is_experts_kernel(tree_paths.names(path))}
