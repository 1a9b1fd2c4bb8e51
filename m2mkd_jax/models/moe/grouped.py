"""Grouped linear layer: rows sorted by expert, each multiplied by its own expert's weights.

Axes: N rows sorted by expert, E experts, C channels in, D channels out, T rows of a tile.

Source: FastMoE (arXiv 2103.13262); docs/reference.md#vmoe-experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m2mkd_jax.models import backend

METHODS = ("ragged", "tiles", "batched")
SMALLEST_TILE, LARGEST_TILE = 16, {"tiles": 256, "batched": 1024}


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
        tiles       for a CPU: a loop over experts and tiles of their rows, in place
        batched     for a GPU: rows are padded to tiles of one expert each, and every tile gets a
                    copy of its expert's weights: one batched product, no loop

    Args:
        rows: (N, C), sorted by expert.
        kernel: (E, C, D).
        bias: (E, D).
        sizes: (E,), rows per expert; they sum to N.
        method: one of METHODS; None chooses by backend.

    Returns:
        (N, D).
    """
    if method is None:
        method = {"cpu": "tiles", "tpu": "ragged"}.get(backend.platform(), "batched")
    if method == "tiles":
        return _tiles(rows, kernel, bias, sizes)
    if method == "batched":
        return _batched(rows, kernel, bias, sizes)
    owner = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(rows))
    # A product, exact at this precision: the gradient of indexing would be a scatter of N rows.
    own_bias = jnp.matmul(
        jax.nn.one_hot(owner, len(sizes), dtype=bias.dtype), bias, precision="highest"
    )
    return jax.lax.ragged_dot(rows, kernel, sizes) + own_bias


def _tile(rows: int, experts: int, method: str) -> int:
    """Rows per tile: a few tiles for an expert's even share, since its last one is part padding.

    Larger tiles, hence fewer, where each tile gets a copy of the weights.
    """
    share = max(rows // ((2 if method == "batched" else 4) * experts), 1)
    return min(max(1 << (share.bit_length() - 1), SMALLEST_TILE), LARGEST_TILE[method])


def _count(size: jax.Array, tile: int) -> jax.Array:
    """Number of tiles that `size` rows need."""
    return (size + tile - 1) // tile


def _padded(rows: jax.Array, tile: int) -> jax.Array:
    """Rows padded so that the last tile may reach beyond the end."""
    return jnp.pad(rows, ((0, tile), (0, 0)))


def _read(rows: jax.Array, at: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, at, tile)


def _write(rows: jax.Array, values: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, values.astype(rows.dtype), at, 0)


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Gradients = tuple[jax.Array, jax.Array, jax.Array, None]

# The number of tiles is known only at run time, and padding is not useful work. So
# evaluate/flops.py counts these functions by their FLOPs per row and weight.
LOOP_FLOPS = {
    "_tiles_forward": 2,
    "_tiles_backward": 4,
    "_batched_forward": 2,
    "_batched_backward": 4,
}


@jax.custom_vjp
def _tiles(rows: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: jax.Array) -> jax.Array:
    return _tiles_forward(rows, kernel, bias, sizes)[0]


@jax.jit
def _tiles_forward(
    rows: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, Residuals]:
    n, tile = len(rows), _tile(len(rows), len(sizes), "tiles")
    padded, ends = _padded(rows, tile), jnp.cumsum(sizes)

    def expert(e: jax.Array, out: jax.Array) -> jax.Array:
        weight, own_bias, start = kernel[e], bias[e], ends[e] - sizes[e]

        def one(i: jax.Array, out: jax.Array) -> jax.Array:
            at = start + i * tile
            # Rows of later experts that the tile reaches into are overwritten by their own tiles.
            return _write(out, _read(padded, at, tile) @ weight + own_bias[None], at)

        return jax.lax.fori_loop(0, _count(sizes[e], tile), one, out)

    out = jnp.zeros((n + tile, kernel.shape[-1]), rows.dtype)
    out = jax.lax.fori_loop(0, len(sizes), expert, out)
    return out[:n], (rows, kernel, bias, sizes)


@jax.jit
def _tiles_backward(residuals: Residuals, grad: jax.Array) -> Gradients:
    rows, kernel, bias, sizes = residuals
    n, tile = len(rows), _tile(len(rows), len(sizes), "tiles")
    padded, grad, ends = _padded(rows, tile), _padded(grad, tile), jnp.cumsum(sizes)

    def expert(e: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_rows, d_kernel, d_bias = carry
        weight, start = kernel[e].T, ends[e] - sizes[e]

        def one(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_rows, d_weight, d_own_bias = carry
            at = start + i * tile
            inside = jnp.arange(tile)[:, None] < ends[e] - at
            g = jnp.where(inside, _read(grad, at, tile), 0)
            d_rows = _write(d_rows, g @ weight, at)
            product = jnp.matmul(_read(padded, at, tile).T, g, preferred_element_type=jnp.float32)
            return d_rows, d_weight + product, d_own_bias + g.sum(0, dtype=jnp.float32)

        own = [jnp.zeros(a.shape[1:], jnp.float32) for a in (kernel, bias)]
        d_rows, *own = jax.lax.fori_loop(0, _count(sizes[e], tile), one, (d_rows, *own))
        return d_rows, _write(d_kernel, own[0][None], e), _write(d_bias, own[1][None], e)

    zeros = (jnp.zeros(padded.shape, rows.dtype), jnp.zeros_like(kernel), jnp.zeros_like(bias))
    d_rows, d_kernel, d_bias = jax.lax.fori_loop(0, len(sizes), expert, zeros)
    return d_rows[:n], d_kernel, d_bias, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _layout(sizes: jax.Array, rows: int, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Layout of rows in tiles of one expert each, as many as the worst case needs.

    Args:
        sizes: (E,), rows per expert.
        rows: N.
        tile: T.

    Returns:
        The expert of each tile, (tiles,); the row in each place of each tile, (tiles, T), N for an
        empty place; and the place of each row, (N,).
    """
    ends, needed = jnp.cumsum(sizes), _count(sizes, tile)
    tile_ends = jnp.cumsum(needed)
    number = jnp.arange((rows + len(sizes) * (tile - 1)) // tile)
    owner = jnp.searchsorted(tile_ends, number, side="right").clip(max=len(sizes) - 1)
    # Place within the expert's rows, counted from its first.
    inside = (number - (tile_ends - needed)[owner])[:, None] * tile + jnp.arange(tile)[None]
    starts = ends - sizes
    source = jnp.where(inside < sizes[owner, None], starts[owner, None] + inside, rows)
    row = jnp.arange(rows)
    own = jnp.searchsorted(ends, row, side="right")
    return owner, source, (tile_ends - needed)[own] * tile + row - starts[own]


def _rows_at(rows: jax.Array, source: jax.Array) -> jax.Array:
    """Rows (N, C) by index, zeros where the index is N."""
    return jnp.take(rows, source, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _batched(rows: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: jax.Array) -> jax.Array:
    return _batched_forward(rows, kernel, bias, sizes)[0]


@jax.jit
def _batched_forward(
    rows: jax.Array, kernel: jax.Array, bias: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, Residuals]:
    n, d = len(rows), kernel.shape[-1]
    owner, source, place = _layout(sizes, n, _tile(n, len(sizes), "batched"))
    out = jnp.matmul(_rows_at(rows, source), kernel[owner]) + bias[owner, None]
    return out.reshape(-1, d)[place], (rows, kernel, bias, sizes)


@jax.jit
def _batched_backward(residuals: Residuals, grad: jax.Array) -> Gradients:
    rows, kernel, bias, sizes = residuals
    n, c = rows.shape
    owner, source, place = _layout(sizes, n, _tile(n, len(sizes), "batched"))
    x, g = _rows_at(rows, source), _rows_at(grad, source)
    d_rows = jnp.einsum("tnd,tcd->tnc", g, kernel[owner]).reshape(-1, c)[place]
    parts = jnp.einsum("tnc,tnd->tcd", x, g, preferred_element_type=jnp.float32)
    # Sums over an expert's tiles, as products: no scatter, and a fixed order of summation.
    hot = jax.nn.one_hot(owner, len(sizes), axis=0)

    def total(parts: jax.Array) -> jax.Array:
        return jnp.tensordot(hot, parts, 1, precision="highest")

    d_kernel, d_bias = total(parts), total(g.sum(1, dtype=jnp.float32))
    return d_rows, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype), None


_batched.defvjp(_batched_forward, _batched_backward)
