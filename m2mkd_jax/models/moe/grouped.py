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

from m2mkd_jax.parallel import backend

METHODS = ("ragged", "chunks", "batched")
MOST_TILES = 4  # per expert; on an H100 tiles half as large and twice as large took longer
SMALLEST_TILE = 16
# Sizes that a chunk may have; the largest holds twice an expert's even share of the rows. Each is
# compiled apart, which for small layers costs more than padding.
CHUNK_SIZES, FEW_SIZES = 12, 3
SMALL_LAYER = 1 << 18  # weights of an expert's layer


def grouped_linear(
    rows: jax.Array,
    kernel: jax.Array,
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
                    of a dozen sizes that holds them; more than the largest holds take several
        batched     for a GPU: rows are padded to tiles of one expert each for one batched product,
                    without a loop. A dispatch that keeps its rows in tiles from layer to layer
                    calls `tile_linear` itself

    Args:
        rows: (N, C), sorted by expert.
        kernel: (E, C, D).
        bias: (E, D).
        sizes: (E,), rows per expert; they sum to N.
        method: one of METHODS; None chooses by backend.

    Returns:
        (N, D).
    """
    method = method or default_method()
    if method == "chunks":
        return _chunks(rows, kernel, bias, sizes)
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


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
BatchedResiduals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
Gradients = tuple[jax.Array, jax.Array, jax.Array, None]

# The number of rows with padding is known only at run time, and padding is not useful work. So
# evaluate/flops.py counts these functions by their FLOPs per row and weight. The rows are those of
# the first argument with two axes or, of the batched ones, the number at the end of the name.
LOOP_FLOPS = {
    "_chunks_forward": 2,
    "_chunks_backward": 4,
    "_batched_forward": 2,
    "_batched_backward": 4,
}


def _chunk_sizes(rows: int, kernel: jax.Array) -> list[int]:
    """The sizes that a chunk may have: multiples of the smallest, at most all rows."""
    experts, c, d = kernel.shape
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


def _contract(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, **options: Any) -> jax.Array:
    """Product of two matrices over an axis of each, without transposing a copy."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), **options)


@jax.custom_vjp
def _chunks(rows: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: jax.Array) -> jax.Array:
    return _chunks_forward(rows, kernel, bias, sizes)[0]


@jax.jit
def _chunks_forward(
    rows: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, Residuals]:
    chunk_sizes, ends = _chunk_sizes(len(rows), kernel), jnp.cumsum(sizes)

    def expert(e: jax.Array, out: jax.Array) -> jax.Array:
        weight, own_bias, end = kernel[e], bias[e], ends[e]

        def product(size: int, at: jax.Array, out: jax.Array) -> jax.Array:
            # Rows of later experts that the chunk reaches into are overwritten by their own.
            begin, number = _place(at, size, len(rows))
            y = _read(rows, begin, size) @ weight + own_bias[None]
            return _write(out, jnp.where(number < at, _read(out, begin, size), y), begin)

        products = [functools.partial(product, size) for size in chunk_sizes]

        def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            at, out = carry
            out = jax.lax.switch(_size_index(end - at, chunk_sizes), products, at, out)
            return at + chunk_sizes[-1], out

        start = (end - sizes[e], out)
        return jax.lax.while_loop(lambda carry: carry[0] < end, one, start)[1]

    out = jnp.zeros((len(rows), kernel.shape[-1]), rows.dtype)
    out = jax.lax.fori_loop(0, len(sizes), expert, out)
    return out, (rows, kernel, bias, sizes)


@jax.jit
def _chunks_backward(residuals: Residuals, grad: jax.Array) -> Gradients:
    rows, kernel, bias, sizes = residuals
    chunk_sizes, ends = _chunk_sizes(len(rows), kernel), jnp.cumsum(sizes)

    def expert(e: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_rows, d_kernel, d_bias = carry
        weight, end = kernel[e], ends[e]

        def product(size: int, at: jax.Array, d_rows: jax.Array) -> tuple[jax.Array, ...]:
            begin, number = _place(at, size, len(rows))
            g = jnp.where((number >= at) & (number < end), _read(grad, begin, size), 0)
            own_rows = _contract(g, weight, 1, 1)
            earlier = _read(d_rows, begin, size)
            d_rows = _write(d_rows, jnp.where(number < at, earlier, own_rows), begin)
            x = _read(rows, begin, size)
            d_weight = _contract(x, g, 0, 0, preferred_element_type=jnp.float32)
            return d_rows, d_weight, g.sum(0, dtype=jnp.float32)

        products = [functools.partial(product, size) for size in chunk_sizes]

        def one(at: jax.Array, d_rows: jax.Array) -> tuple[jax.Array, ...]:
            index = _size_index(end - at, chunk_sizes)
            return at + chunk_sizes[-1], *jax.lax.switch(index, products, at, d_rows)

        def another(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            at, d_rows, d_weight, d_own_bias = carry
            at, d_rows, more_weight, more_bias = one(at, d_rows)
            return at, d_rows, d_weight + more_weight, d_own_bias + more_bias

        # The first chunk, mostly the only one, adds to nothing.
        first = one(end - sizes[e], d_rows)
        _, d_rows, d_weight, d_own_bias = jax.lax.while_loop(lambda c: c[0] < end, another, first)
        return d_rows, _write(d_kernel, d_weight[None], e), _write(d_bias, d_own_bias[None], e)

    zeros = (jnp.zeros_like(rows), jnp.zeros_like(kernel), jnp.zeros_like(bias))
    return *jax.lax.fori_loop(0, len(sizes), expert, zeros), None


_chunks.defvjp(_chunks_forward, _chunks_backward)


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
) -> tuple[jax.Array, BatchedResiduals]:
    y = _product(even, owner, x, kernel)
    return y + bias[owner, None], (x, kernel, bias, owner, even)


def _batched_backward(residuals: BatchedResiduals, grad: jax.Array) -> tuple[Any, ...]:
    x, kernel, bias, owner, even = residuals
    d_x, d_kernel = _gradients(even, owner, grad, x, kernel)
    # No product: XLA would merge it with the others by copying all parts into one array.
    sums = grad.sum(1, dtype=jnp.float32)
    d_bias = jnp.where((owner[None] == jnp.arange(len(kernel))[:, None])[..., None], sums[None], 0)
    return d_x, d_kernel, d_bias.sum(1).astype(bias.dtype), None, None
