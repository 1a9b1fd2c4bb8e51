"""Matrix products whose gradients are as fast as they themselves on a CPU.

Axes: N rows, C channels in, D channels out.

XLA hands a product over to a CPU's fastest kernels if it sums over the last axis of its first
operand. The gradient of weights, x^T g, sums over the first axis of both, and another kernel takes
up to twice as long for it (benchmarks/RESULTS.md): here it is a product with a transposed copy of
x, which the barrier keeps the compiler from folding back into the product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType

from m2mkd_jax.parallel import backend


def transposed_product(x: jax.Array, g: jax.Array, **options: Any) -> jax.Array:
    """x^T g: (..., N, C), (..., N, D) -> (..., C, D); options of `jnp.matmul`."""
    # XLA would fuse the copy with all that computes x, which is then read by columns: four times
    # as slow (benchmarks/RESULTS.md). It fuses nothing across a call that is not inlined.
    with set_xla_metadata(inlineable="false"):
        x = _itself(x)
    return jnp.matmul(jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2)), g, **options)


@jax.jit
def _itself(x: jax.Array) -> jax.Array:
    return x


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel: (N, C), (C, D) -> (N, D).

    On a CPU that is the only device there is no forward-mode derivative (`jax.jvp`) of float32,
    but in `jax.shard_map` and on meshes with explicit axes.
    """
    alike = x.dtype == kernel.dtype == jnp.float32
    if backend.is_one_cpu() and alike and not (has_placed_axes(x) or has_placed_axes(kernel)):
        return _product(x, kernel)
    return x @ kernel


def has_placed_axes(a: jax.Array) -> bool:
    """Whether the type of `a` says where its axes lie, as its gradient's would have to."""
    return any(kind != AxisType.Auto for kind in jax.typeof(a).sharding.mesh.axis_types)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


Saved = tuple[jax.Array | None, jax.Array | None]


def _forward(x: Any, kernel: Any) -> tuple[jax.Array, Saved]:
    """The product, and what the gradients that are wanted need; weights may be frozen."""
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return x.value @ kernel.value, saved


def _backward(saved: Saved, grad: Any) -> Saved:
    if isinstance(grad, SymbolicZero):
        return None, None
    x, kernel = saved
    of_x = None if kernel is None else grad @ kernel.T
    return of_x, None if x is None else transposed_product(x, grad)


_product.defvjp(_forward, _backward, symbolic_zeros=True)
