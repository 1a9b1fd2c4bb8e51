"""Grouped linear layer for a CPU: a loop over experts, the rows of each in one product.

Axes: N rows sorted by expert, L layers, E experts, C channels in, D channels out.

Kernels are read, and their gradients written, in the stack of all layers, an expert at a time
(models/gradients_in_place.py).

Source: FastMoE (arXiv 2103.13262); docs/reference.md#vmoe-experts.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from m2mkd_jax.models.gradients_in_place import LayerArray, as_mapped
from m2mkd_jax.models.products import transposed_product

# Sizes that a chunk may have; the largest holds twice an expert's even share of the rows. Each is
# compiled apart, which for small layers costs more than padding.
CHUNK_SIZES, FEW_SIZES = 25, 3
SMALL_LAYER = 1 << 18  # weights of an expert's layer

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
Gradients = tuple[jax.Array, None, jax.Array, None, None, jax.Array]


def _chunk_sizes(rows: int, kernel: tuple[int, ...]) -> list[int]:
    """The sizes that a chunk may have: multiples of the smallest, at most all rows.

    Args:
        rows: N.
        kernel: shape (E, C, D).
    """
    experts, c, d = kernel
    sizes = FEW_SIZES if c * d < SMALL_LAYER else CHUNK_SIZES
    smallest = -(-2 * rows // (experts * sizes * 16)) * 16 or 16
    return [min(smallest * (i + 1), rows) for i in range(min(sizes, -(-rows // smallest)))]


def _size_index(left: jax.Array, sizes: list[int]) -> jax.Array:
    """Index of the size of the chunk that holds `left` rows; the largest, if none does."""
    return jnp.clip((left + sizes[0] - 1) // sizes[0] - 1, 0, len(sizes) - 1)


def _place(at: jax.Array, size: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """The first row of the chunk whose own rows start at `at`, and its row numbers (size, 1).

    A chunk that would reach beyond the last row begins before `at`.
    """
    begin = jnp.minimum(at, rows - size)
    return begin, begin + jnp.arange(size)[:, None]


def _read(rows: jax.Array, at: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, at, size)


def _write(rows: jax.Array, values: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, values.astype(rows.dtype), at, 0)


def _block(y: jax.Array, begin: jax.Array, at: jax.Array, size: int, rows: int) -> jax.Array:
    """The rows `y` from `begin` on, in a block of `size` rows that `_write_block` puts at `at`.

    What a branch of a conditional writes into a larger array XLA writes into a copy of it.
    """
    if len(y) == size:
        return y
    block = jnp.zeros((size, y.shape[1]), y.dtype)
    return _write(block, y, begin - _place(at, size, rows)[0])


def _write_block(rows: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    """Writes a block's rows from `at` on; behind an expert's own others overwrite them."""
    begin, number = _place(at, len(block), len(rows))
    return _write(rows, jnp.where(number < at, _read(rows, begin, len(block)), block), begin)


def chunked_linear(
    rows: jax.Array, kernel: jax.Array | LayerArray, bias: jax.Array, sizes: jax.Array
) -> jax.Array:
    """`grouped.grouped_linear` by the method 'chunks'."""

    def product(stack: jax.Array, carried: jax.Array, layer: jax.Array) -> tuple[Any, Any]:
        return _chunks(rows, stack, bias, sizes, layer, carried)

    if isinstance(kernel, LayerArray):
        return kernel.read(product)
    # The kernel itself: so there are second derivatives too, for which the first one reads it.
    return product(kernel[None], kernel[None], jnp.int32(0))[0]


def _chunks_vjp(
    rows: jax.Array,
    stack: jax.Array,
    bias: jax.Array,
    sizes: jax.Array,
    layer: jax.Array,
    carried: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    """The rows' results and `carried`, see gradients_in_place.py; and what the gradient needs.

    Args:
        rows: (N, C).
        stack: kernels of all layers (L, E, C, D), which get no first derivative here.
        bias: (E, D).
        sizes: (E,).
        layer: index of the layer.
        carried: the stack, which gets it.
    """
    residuals = (rows, stack, bias, sizes, layer)
    return (_chunks_forward(*residuals), as_mapped(carried, *residuals)), residuals


def _chunks_pullback(residuals: Residuals, grads: tuple[jax.Array, jax.Array]) -> Gradients:
    d_rows, d_bias, d_stack = _chunks_backward(*residuals, *grads)
    return d_rows, None, d_bias, None, None, d_stack


def _read_expert(stack: jax.Array, layer: jax.Array, e: jax.Array) -> jax.Array:
    """An expert's kernel: (L, E, C, D) -> (C, D)."""
    zero = jnp.int32(0)
    return jax.lax.dynamic_slice(stack, (layer, e, zero, zero), (1, 1, *stack.shape[2:]))[0, 0]


def _write_expert(stack: jax.Array, values: jax.Array, layer: jax.Array, e: jax.Array) -> jax.Array:
    values, zero = values.astype(stack.dtype)[None, None], jnp.int32(0)
    return jax.lax.dynamic_update_slice(stack, values, (layer, e, zero, zero))


@jax.jit
def _chunks_forward(
    rows: jax.Array, stack: jax.Array, bias: jax.Array, sizes: jax.Array, layer: jax.Array
) -> jax.Array:
    chunk_sizes, ends = _chunk_sizes(len(rows), stack.shape[1:]), jnp.cumsum(sizes)

    def expert(e: jax.Array, out: jax.Array) -> jax.Array:
        weight, own_bias, end = _read_expert(stack, layer, e), bias[e], ends[e]

        def product(size: int, at: jax.Array) -> jax.Array:
            begin, _ = _place(at, size, len(rows))
            y = _read(rows, begin, size) @ weight + own_bias[None]
            return _block(y, begin, at, chunk_sizes[-1], len(rows))

        products = [functools.partial(product, size) for size in chunk_sizes]

        def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            at, out = carry
            block = jax.lax.switch(_size_index(end - at, chunk_sizes), products, at)
            return at + chunk_sizes[-1], _write_block(out, block, at)

        start = (end - sizes[e], out)
        return jax.lax.while_loop(lambda carry: carry[0] < end, one, start)[1]

    out = jnp.zeros((len(rows), stack.shape[-1]), rows.dtype)
    return jax.lax.fori_loop(0, len(sizes), expert, out)


@jax.jit
def _chunks_backward(
    rows: jax.Array,
    stack: jax.Array,
    bias: jax.Array,
    sizes: jax.Array,
    layer: jax.Array,
    grad: jax.Array,
    d_stack: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of rows and bias, and `d_stack` with the layer's gradient written."""
    chunk_sizes, ends = _chunk_sizes(len(rows), stack.shape[1:]), jnp.cumsum(sizes)

    def expert(e: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_rows, d_bias, d_stack = carry
        weight, end = _read_expert(stack, layer, e), ends[e]

        def product(size: int, at: jax.Array) -> tuple[jax.Array, ...]:
            begin, number = _place(at, size, len(rows))
            g = jnp.where((number >= at) & (number < end), _read(grad, begin, size), 0)
            own_rows = (g @ weight.T).astype(rows.dtype)
            x = _read(rows, begin, size)
            d_weight = transposed_product(x, g, preferred_element_type=jnp.float32)
            block = _block(own_rows, begin, at, chunk_sizes[-1], len(rows))
            return block, d_weight, g.sum(0, dtype=jnp.float32)

        products = [functools.partial(product, size) for size in chunk_sizes]

        def one(at: jax.Array, d_rows: jax.Array) -> tuple[jax.Array, ...]:
            index = _size_index(end - at, chunk_sizes)
            block, d_weight, d_own_bias = jax.lax.switch(index, products, at)
            return at + chunk_sizes[-1], _write_block(d_rows, block, at), d_weight, d_own_bias

        def another(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            at, d_rows, d_weight, d_own_bias = carry
            at, d_rows, more_weight, more_bias = one(at, d_rows)
            return at, d_rows, d_weight + more_weight, d_own_bias + more_bias

        # The first chunk, mostly the only one, adds to nothing.
        first = one(end - sizes[e], d_rows)
        _, d_rows, d_weight, d_own_bias = jax.lax.while_loop(lambda c: c[0] < end, another, first)
        d_stack = _write_expert(d_stack, d_weight, layer, e)
        return d_rows, _write(d_bias, d_own_bias[None], e), d_stack

    start = (jnp.zeros_like(rows), jnp.zeros_like(bias), d_stack)
    return jax.lax.fori_loop(0, len(sizes), expert, start)


_chunks = jax.custom_vjp(lambda *arguments: _chunks_vjp(*arguments)[0])
_chunks.defvjp(_chunks_vjp, _chunks_pullback)
