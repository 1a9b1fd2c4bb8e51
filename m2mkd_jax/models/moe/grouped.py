"""A linear layer in which consecutive rows belong to consecutive experts.

Axes: N rows sorted by expert, E experts, C channels in, D channels out, T rows of a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

METHODS = ("ragged", "tiles", "batched")
SMALLEST_TILE, LARGEST_TILE = 16, {"tiles": 256, "batched": 1024}


def grouped_linear(
    rows: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    sizes: jax.Array,
    method: str | None = None,
) -> jax.Array:
    """rows (N, C), kernel (E, C, D), bias (E, D) -> (N, D), each row by its own expert.

    The first sizes[0] rows belong to expert 0, the next sizes[1] to expert 1, and so on; sizes (E,)
    sum to N. Three methods compute the same:

        ragged      XLA's grouped matrix product, a kernel of its own on a TPU. On a CPU it computes
                    every row with every expert, and on an H100 it takes 3.6 times as long as
                    'batched' (benchmarks/RESULTS.md)
        tiles       for a CPU: the experts take turns, tile by tile, on the rows as they lie
        batched     for a GPU: rows are laid out in tiles of one expert each, padded, and every tile
                    gets a copy of its expert's weights: one batched product, no loop
    """
    if method is None:
        method = {"cpu": "tiles", "tpu": "ragged"}.get(jax.default_backend(), "batched")
    if method == "tiles":
        return _tiles(rows, kernel, bias, sizes)
    if method == "batched":
        return _batched(rows, kernel, bias, sizes)
    owner = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(rows))
    # A product, exact at this precision: the gradient of an index would be a scatter of N rows.
    own_bias = jnp.matmul(
        jax.nn.one_hot(owner, len(sizes), dtype=bias.dtype), bias, precision="highest"
    )
    return jax.lax.ragged_dot(rows, kernel, sizes) + own_bias


def _tile(rows: int, experts: int, method: str) -> int:
    """Rows per tile: a few tiles for an expert's even share, since its last one is part waste.

    Fewer where each tile gets a copy of the weights.
    """
    share = max(rows // ((2 if method == "batched" else 4) * experts), 1)
    return min(max(1 << (share.bit_length() - 1), SMALLEST_TILE), LARGEST_TILE[method])


def _count(size: jax.Array, tile: int) -> jax.Array:
    return (size + tile - 1) // tile


def _padded(rows: jax.Array, tile: int) -> jax.Array:
    """Room for the last tile to reach over the end."""
    return jnp.pad(rows, ((0, tile), (0, 0)))


def _read(rows: jax.Array, at: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, at, tile)


def _write(rows: jax.Array, values: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, values.astype(rows.dtype), at, 0)


# How many tiles a loop has is known at run time alone, and padding is no work done: FLOPs per row
# and weight of the functions below, by which evaluate/flops.py counts them.
LOOP_FLOPS = {
    "_tiles_forward": 2,
    "_tiles_backward": 4,
    "_batched_forward": 2,
    "_batched_backward": 4,
}


@jax.custom_vjp
def _tiles(rows, kernel, bias, sizes):
    return _tiles_forward(rows, kernel, bias, sizes)[0]


@jax.jit
def _tiles_forward(rows, kernel, bias, sizes):
    n, tile = len(rows), _tile(len(rows), len(sizes), "tiles")
    padded, ends = _padded(rows, tile), jnp.cumsum(sizes)

    def expert(e, out):
        weight, own_bias, start = kernel[e], bias[e], ends[e] - sizes[e]

        def one(i, out):
            at = start + i * tile
            # Where it reaches into later experts' rows, these are overwritten in their turn.
            return _write(out, _read(padded, at, tile) @ weight + own_bias, at)

        return jax.lax.fori_loop(0, _count(sizes[e], tile), one, out)

    out = jnp.zeros((n + tile, kernel.shape[-1]), rows.dtype)
    out = jax.lax.fori_loop(0, len(sizes), expert, out)
    return out[:n], (rows, kernel, bias, sizes)


@jax.jit
def _tiles_backward(residuals, grad):
    rows, kernel, bias, sizes = residuals
    n, tile = len(rows), _tile(len(rows), len(sizes), "tiles")
    padded, grad, ends = _padded(rows, tile), _padded(grad, tile), jnp.cumsum(sizes)

    def expert(e, carry):
        d_rows, d_kernel, d_bias = carry
        weight, start = kernel[e].T, ends[e] - sizes[e]

        def one(i, carry):
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
    """Tiles of one expert each, as many as the worst case needs.

    Returns the expert of each tile, (tiles,); the row in each place of each tile, (tiles, T), N for
    none; and the place of each row, (N,).
    """
    ends, needed = jnp.cumsum(sizes), _count(sizes, tile)
    tile_ends = jnp.cumsum(needed)
    number = jnp.arange((rows + len(sizes) * (tile - 1)) // tile)
    owner = jnp.searchsorted(tile_ends, number, side="right").clip(max=len(sizes) - 1)
    # Of an expert's rows, counted from its first.
    inside = (number - (tile_ends - needed)[owner])[:, None] * tile + jnp.arange(tile)
    starts = ends - sizes
    source = jnp.where(inside < sizes[owner, None], starts[owner, None] + inside, rows)
    row = jnp.arange(rows)
    own = jnp.searchsorted(ends, row, side="right")
    return owner, source, (tile_ends - needed)[own] * tile + row - starts[own]


def _rows_at(rows: jax.Array, source: jax.Array) -> jax.Array:
    return jnp.take(rows, source, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _batched(rows, kernel, bias, sizes):
    return _batched_forward(rows, kernel, bias, sizes)[0]


@jax.jit
def _batched_forward(rows, kernel, bias, sizes):
    n, d = len(rows), kernel.shape[-1]
    owner, source, place = _layout(sizes, n, _tile(n, len(sizes), "batched"))
    out = jnp.matmul(_rows_at(rows, source), kernel[owner]) + bias[owner, None]
    return out.reshape(-1, d)[place], (rows, kernel, bias, sizes)


@jax.jit
def _batched_backward(residuals, grad):
    rows, kernel, bias, sizes = residuals
    n, c = rows.shape
    owner, source, place = _layout(sizes, n, _tile(n, len(sizes), "batched"))
    x, g = _rows_at(rows, source), _rows_at(grad, source)
    d_rows = jnp.einsum("tnd,tcd->tnc", g, kernel[owner]).reshape(-1, c)[place]
    parts = jnp.einsum("tnc,tnd->tcd", x, g, preferred_element_type=jnp.float32)
    # Sums over an expert's tiles, as products: no scatter, and the same order every time.
    hot = jax.nn.one_hot(owner, len(sizes), axis=0)
    total = lambda parts: jnp.tensordot(hot, parts, 1, precision="highest")  # noqa: E731
    d_kernel, d_bias = total(parts), total(g.sum(1, dtype=jnp.float32))
    return d_rows, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype), None


_batched.defvjp(_batched_forward, _batched_backward)
