"""Grouped linear layer: rows sorted by expert, each multiplied by its own expert's weights.

Axes: N rows sorted by expert, E experts, C channels in, D channels out, T rows of a tile.

Source: FastMoE (arXiv 2103.13262); docs/reference.md#vmoe-experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m2mkd_jax.models.gradients_in_place import LayerArray
from m2mkd_jax.models.moe.chunks import chunked_linear
from m2mkd_jax.parallel import backend

METHODS = ("ragged", "chunks", "batched")
MOST_TILES = 4  # per expert; on an H100 tiles half as large and twice as large took longer
SMALLEST_TILE = 16


def grouped_linear(
    rows: jax.Array,
    kernel: jax.Array | LayerArray,
    bias: jax.Array,
    sizes: jax.Array,
    method: str | None = None,
) -> jax.Array:
    """Multiplies each row by its own expert's kernel and adds its bias.

    Three methods compute the same:

        ragged      XLA's grouped matrix product, one kernel on a TPU. On a CPU it computes every
                    row with every expert, and on an H100 it takes 3.6 times as long as 'batched'
                    (benchmarks/RESULTS.md)
        chunks      for a CPU: a loop over experts. An expert's rows are one product of the smallest
                    of 25 sizes that holds them; more than the largest holds take several
        batched     for a GPU: rows are padded to tiles of one expert each for one batched product,
                    without a loop. A dispatch that keeps its rows in tiles from layer to layer
                    calls `tile_linear` itself

    Args:
        rows: (N, C), sorted by expert.
        kernel: (E, C, D); 'chunks' reads that of a layer in its stack.
        bias: (E, D).
        sizes: (E,), rows per expert; they sum to N.
        method: one of METHODS; None chooses by backend.

    Returns:
        (N, D).
    """
    method = method or default_method()
    if method == "chunks":
        return chunked_linear(rows, kernel, bias, sizes)
    assert not isinstance(kernel, LayerArray)
    if method == "batched":
        own = tiles(sizes, len(rows))
        x = jnp.take(rows, own.source, axis=0, mode="fill", fill_value=0)
        y = tile_linear(x, kernel, bias, own, len(rows))
        return y.reshape(-1, y.shape[-1])[own.place]
    owner = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(rows))
    # A product, exact at this precision: the gradient of indexing would be a scatter of N rows.
    own_bias = jnp.matmul(
        jax.nn.one_hot(owner, len(sizes), dtype=bias.dtype), bias, precision="highest"
    )
    return jax.lax.ragged_dot(rows, kernel, sizes) + own_bias


def default_method() -> str:
    """The method for the backend."""
    return {"cpu": "chunks", "tpu": "ragged"}.get(backend.platform(), "batched")


def _tile(rows: int, experts: int) -> tuple[int, int]:
    """Tiles per expert, where all have as many, and rows per tile.

    All tiles together hold any sizes: with T rows per tile the E sizes need (N + E (T - 1)) / T of
    them at most. Where these are four per expert, a quarter of the places is empty, and all experts
    have as many unless one has more than 1.3 times the even share of rows.
    """
    each = min(1 + -(-rows // (SMALLEST_TILE * experts)), MOST_TILES)
    least = max(rows - experts, 0) // (experts * (each - 1) + 1) + 1
    unit = max((1 << (least.bit_length() - 1)) // 8, SMALLEST_TILE)
    return each, -(-least // unit) * unit


def _count(size: jax.Array, tile: int) -> jax.Array:
    """Number of tiles that `size` rows need."""
    return (size + tile - 1) // tile


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

# The number of rows with padding is known only at run time, and padding is not useful work. So
# evaluate/flops.py counts these functions by their FLOPs per row and weight. The rows are those of
# the first argument with two axes or, of the batched ones, the number at the end of the name.
LOOP_FLOPS = {
    "_chunks_forward": 2,
    "_chunks_backward": 4,
    "_batched_forward": 2,
    "_batched_backward": 4,
}


class Tiles(NamedTuple):
    """Rows sorted by expert, laid out in tiles of one expert each.

    As many tiles as the worst case needs, hence mostly with empty places at the end of an expert's
    last tile and in the last tiles of all.

    Attributes:
        owner: the expert of each tile, (tiles,).
        source: the row in each place of each tile, (tiles, T); N for an empty place.
        place: the place of each row, (N,).
        even: whether every expert has as many tiles as any other, a scalar.
    """

    owner: jax.Array
    source: jax.Array
    place: jax.Array
    even: jax.Array


def tiles(sizes: jax.Array, rows: int) -> Tiles:
    """Lays rows out in tiles.

    Args:
        sizes: (E,), rows per expert; they sum to N.
        rows: N.
    """
    each, tile = _tile(rows, len(sizes))
    ends, needed = jnp.cumsum(sizes), _count(sizes, tile)
    even = needed.max() <= each
    owned = jnp.where(even, each, needed)
    tile_ends = jnp.cumsum(owned)
    number = jnp.arange(each * len(sizes))
    owner = jnp.searchsorted(tile_ends, number, side="right").clip(max=len(sizes) - 1)
    # Place within the expert's rows, counted from its first.
    inside = (number - (tile_ends - owned)[owner])[:, None] * tile + jnp.arange(tile)[None]
    starts = ends - sizes
    source = jnp.where(inside < sizes[owner, None], starts[owner, None] + inside, rows)
    row = jnp.arange(rows)
    own = jnp.searchsorted(ends, row, side="right")
    return Tiles(owner, source, (tile_ends - owned)[own] * tile + row - starts[own], even)


def tile_linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, own: Tiles, rows: int
) -> jax.Array:
    """Multiplies each tile by its expert's kernel and adds its bias: one batched product.

    Where all experts have equally many tiles, it is a product per expert. Elsewhere every tile gets
    a copy of its expert's weights.

    Args:
        x: (tiles, T, C). What is in empty places does not matter, as long as their results are not
            used: then their gradients are zero.
        kernel: (E, C, D).
        bias: (E, D).
        own: the tiles.
        rows: how many places are not empty, for evaluate/flops.py.

    Returns:
        (tiles, T, D).
    """
    return _batched(rows)(x, kernel, bias, own.owner, own.even)


@functools.cache
def _batched(rows: int) -> Callable[..., jax.Array]:
    """`tile_linear` of a number of rows, which its functions' names tell evaluate/flops.py."""
    forward, backward = (
        jax.jit(_renamed(f, f"{f.__name__}_{rows}")) for f in (_batched_forward, _batched_backward)
    )
    product = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    product.defvjp(forward, backward)
    return product


def _renamed(function: Callable, name: str) -> Callable:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = name
    return call


def _if_even(by_expert: Callable, by_tile: Callable) -> Callable:
    """(even, owner, *arrays) -> by_expert or by_tile of (owner, *arrays), one of them computed.

    Mapped over several networks by `jax.vmap`, too, where a conditional would become a choice
    between both: there they are even together.
    """

    @jax.custom_batching.custom_vmap
    def choose(even: jax.Array, owner: jax.Array, *arrays: jax.Array) -> Any:
        return jax.lax.cond(even, by_expert, by_tile, owner, *arrays)

    @choose.def_vmap
    def _choose(count: int, mapped: list[bool], even: jax.Array, *arrays: jax.Array) -> Any:
        del count
        axes = [0 if one else None for one in mapped[1:]]
        branches = (jax.vmap(branch, in_axes=axes) for branch in (by_expert, by_tile))
        y = jax.lax.cond(even.all(), *branches, *arrays)
        return y, jax.tree.map(lambda _: True, y)

    return choose


def _of_experts(x: jax.Array, experts: int) -> jax.Array:
    """Tiles by expert: (tiles, T, C) -> (E, rows of an expert, C)."""
    return x.reshape(experts, -1, x.shape[-1])


def _product_by_expert(owner: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
    del owner
    y = jnp.matmul(_of_experts(x, len(kernel)), kernel)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product_by_tile(owner: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel[owner])


def _gradients_by_expert(
    owner: jax.Array, grad: jax.Array, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del owner
    own, own_grad = _of_experts(x, len(kernel)), _of_experts(grad, len(kernel))
    d_x = jnp.einsum("end,ecd->enc", own_grad, kernel)
    return d_x.reshape(x.shape), jnp.einsum("enc,end->ecd", own, own_grad)


def _gradients_by_tile(
    owner: jax.Array, grad: jax.Array, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    d_x = jnp.einsum("tnd,tcd->tnc", grad, kernel[owner])
    # Each tile's part is summed in float32 and rounded once, to the type of the gradient.
    parts = jnp.einsum("tnc,tnd->tcd", x, grad)
    # Sums over an expert's tiles, as a product: no scatter, and a fixed order of summation.
    hot = jax.nn.one_hot(owner, len(kernel), axis=0, dtype=parts.dtype)
    highest = "highest" if parts.dtype == jnp.float32 else None
    d_kernel = jnp.tensordot(hot, parts, 1, precision=highest, preferred_element_type=jnp.float32)
    return d_x, d_kernel.astype(kernel.dtype)


_product = _if_even(_product_by_expert, _product_by_tile)
_gradients = _if_even(_gradients_by_expert, _gradients_by_tile)


def _batched_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, owner: jax.Array, even: jax.Array
) -> tuple[jax.Array, Residuals]:
    y = _product(even, owner, x, kernel)
    return y + bias[owner, None], (x, kernel, bias, owner, even)


def _batched_backward(residuals: Residuals, grad: jax.Array) -> tuple[Any, ...]:
    x, kernel, bias, owner, even = residuals
    d_x, d_kernel = _gradients(even, owner, grad, x, kernel)
    # No product: XLA would merge it with the others by copying all parts into one array.
    sums = grad.sum(1, dtype=jnp.float32)
    d_bias = jnp.where((owner[None] == jnp.arange(len(kernel))[:, None])[..., None], sums[None], 0)
    return d_x, d_kernel, d_bias.sum(1).astype(bias.dtype), None, None
