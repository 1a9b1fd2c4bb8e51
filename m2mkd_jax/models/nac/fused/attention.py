"""Attention with a sampled kernel that all heads share, as GPU kernels.

Axes: B batch, U receivers, V senders, H heads, C head channels.

cuDNN's attention takes a bias for every head and gives a gradient for every head. These read the
kernel of an image once, as programs of one image run together and find it in the GPU's cache, and
sum its gradient over heads before they write it.

Source: Dao et al. 2022 (arXiv 2205.14135), algorithms 1 and 4.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from m2mkd_jax.models.nac.fused.choice import TILE
from m2mkd_jax.models.nac.fused.programs import call, once
from m2mkd_jax.parallel import backend

# Receivers of a tile where a program holds the queries' gradients of all heads, for the sum over
# heads that is the kernel's gradient.
NARROW = 32


@functools.partial(once, static=("heads",))
def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, log_kernel: jax.Array, *, heads: int
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(C) + log_kernel) v.

    Args:
        q: (B, U, HC), U a multiple of `TILE`.
        k, v: (B, V, HC), V a multiple of `TILE`.
        log_kernel: (B, U, V), finite.
        heads: H.

    Returns:
        (B, U, HC), and the logarithm of the sum of every row's exponentials (B, H, U), float32.
    """
    (b, u, width), n = q.shape, k.shape[1]
    c = width // heads

    def attention_forward(*refs: Any) -> None:
        q, k, v, log_kernel, message, log_sum = refs
        head, block, image = (pl.program_id(axis) for axis in range(3))
        rows, channels = pl.ds(block * TILE, TILE), pl.ds(head * c, c)
        queries = q[image, rows, channels]

        def one(tile: Any, carry: Any) -> Any:
            mean, highest, total = carry
            senders = pl.ds(tile * TILE, TILE)
            scores = _scores(queries, k[image, senders, channels], log_kernel[image, rows, senders])
            new = jnp.maximum(highest, scores.max(-1))
            weights, shrunk = jnp.exp(scores - new[:, None]), jnp.exp(highest - new)
            values = v[image, senders, channels]
            mean = mean * shrunk[:, None] + _product(weights.astype(values.dtype), values, 1, 0)
            return mean, new, total * shrunk + weights.sum(-1)

        nothing, zeros = jnp.zeros((TILE, c), jnp.float32), jnp.zeros((TILE,), jnp.float32)
        start = nothing, jnp.full_like(zeros, -jnp.inf), zeros
        mean, highest, total = jax.lax.fori_loop(0, n // TILE, one, start)
        message[image, rows, channels] = (mean / total[:, None]).astype(message.dtype)
        log_sum[image, head, rows] = highest + jnp.log(total)

    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((b, heads, u), jnp.float32),
    )
    grid = (heads, u // TILE, b)
    return tuple(call(attention_forward, "attention_forward", grid, shapes, q, k, v, log_kernel))


@functools.partial(once, static=("heads",))
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_kernel: jax.Array,
    message: jax.Array,
    log_sum: jax.Array,
    grad: jax.Array,
    *,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Backward pass of `forward`.

    Args:
        q, k, v, log_kernel, heads: as there.
        message, log_sum: its results.
        grad: of the message.

    Returns:
        Gradients of q, k, v and log_kernel.
    """
    residuals = (q, k, v, log_kernel, log_sum, grad)
    of_q, of_kernel, inner = _backward_receivers(*residuals, message, heads)
    of_k, of_v = _backward_senders(*residuals, inner, heads)
    return of_q, of_k, of_v, of_kernel


def _backward_receivers(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_kernel: jax.Array,
    log_sum: jax.Array,
    grad: jax.Array,
    message: jax.Array,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q and of the kernel; and sum(grad * message) of every row (B, H, U)."""
    (b, u, width), n = q.shape, k.shape[1]
    c = width // heads

    def attention_backward_receivers(*refs: Any) -> None:
        q, k, v, log_kernel, log_sum, grad, message, of_q, of_kernel, inner = refs
        block, image = pl.program_id(0), pl.program_id(1)
        rows = pl.ds(block * NARROW, NARROW)

        def channels(head: int) -> Any:
            return pl.ds(head * c, c)

        alongs = []
        for head in range(heads):
            at = (image, rows, channels(head))
            product = grad[at].astype(jnp.float32) * message[at].astype(jnp.float32)
            alongs.append(product.sum(-1))
            inner[image, head, rows] = alongs[head]

        def one(tile: Any, sums: Any) -> Any:
            senders = pl.ds(tile * TILE, TILE)
            bias = log_kernel[image, rows, senders]
            total, new = jnp.zeros((NARROW, TILE), jnp.float32), []
            for head in range(heads):
                at = (image, senders, channels(head))
                keys, of_message = k[at], grad[image, rows, channels(head)]
                scores = _scores(q[image, rows, channels(head)], keys, bias)
                weights = jnp.exp(scores - log_sum[image, head, rows][:, None])
                of_weights = _product(of_message, v[at], 1, 1)
                of_scores = weights * (of_weights - alongs[head][:, None])
                total += of_scores
                new.append(sums[head] + _product(of_scores.astype(keys.dtype), keys, 1, 0))
            of_kernel[image, rows, senders] = total.astype(of_kernel.dtype)
            return tuple(new)

        start = (jnp.zeros((NARROW, c), jnp.float32),) * heads
        sums = jax.lax.fori_loop(0, n // TILE, one, start)
        for head, of_queries in enumerate(sums):
            of_q[image, rows, channels(head)] = (of_queries * c**-0.5).astype(of_q.dtype)

    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(log_kernel.shape, log_kernel.dtype),
        jax.ShapeDtypeStruct(log_sum.shape, jnp.float32),
    )
    grid = (u // NARROW, b)
    arguments = (q, k, v, log_kernel, log_sum, grad, message)
    name, stages = "attention_backward_receivers", _stages(heads, c)
    kernel = attention_backward_receivers
    return tuple(call(kernel, name, grid, shapes, *arguments, warps=8, stages=stages))


def _stages(heads: int, channels: int) -> int:
    """Stages of the loop of `_backward_receivers`: two where shared memory has room for them.

    With two, Triton holds keys and values (TILE, C), queries and gradients (NARROW, C) in 16 bits
    and a number of each row for every head, and a tile of weights in 32 bits. One stage holds a
    head at a time.
    """
    of_head = 2 * channels * (2 * TILE + 2 * NARROW) + 4 * NARROW
    return 2 if heads * of_head + 4 * NARROW * TILE <= _shared_memory() else 1


def _shared_memory() -> int:
    """Bytes of shared memory that a program may take on the GPU that is traced for."""
    capability = backend.compute_capability()
    if capability in ("8.0", "8.7"):
        return 163 << 10
    return 227 << 10 if capability.partition(".")[0] in ("9", "10", "11") else 99 << 10


def _backward_senders(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_kernel: jax.Array,
    log_sum: jax.Array,
    grad: jax.Array,
    inner: jax.Array,
    heads: int,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of k and v."""
    (b, u, width), n = q.shape, k.shape[1]
    c = width // heads

    def attention_backward_senders(*refs: Any) -> None:
        q, k, v, log_kernel, log_sum, grad, inner, of_k, of_v = refs
        head, tile, image = (pl.program_id(axis) for axis in range(3))
        senders, channels = pl.ds(tile * TILE, TILE), pl.ds(head * c, c)
        keys, values = k[image, senders, channels], v[image, senders, channels]

        def one(block: Any, sums: Any) -> Any:
            of_keys, of_values = sums
            rows = pl.ds(block * TILE, TILE)
            queries, of_message = q[image, rows, channels], grad[image, rows, channels]
            scores = _scores(queries, keys, log_kernel[image, rows, senders])
            weights = jnp.exp(scores - log_sum[image, head, rows][:, None])
            of_values += _product(weights.astype(of_message.dtype), of_message, 0, 0)
            of_weights = _product(of_message, values, 1, 1)
            of_scores = weights * (of_weights - inner[image, head, rows][:, None])
            of_keys += _product(of_scores.astype(queries.dtype), queries, 0, 0)
            return of_keys, of_values

        start = (jnp.zeros((TILE, c), jnp.float32),) * 2
        of_keys, of_values = jax.lax.fori_loop(0, u // TILE, one, start)
        of_k[image, senders, channels] = (of_keys * c**-0.5).astype(of_k.dtype)
        of_v[image, senders, channels] = of_values.astype(of_v.dtype)

    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v))
    grid = (heads, n // TILE, b)
    arguments = (q, k, v, log_kernel, log_sum, grad, inner)
    name = "attention_backward_senders"
    return tuple(call(attention_backward_senders, name, grid, shapes, *arguments))


def _scores(queries: jax.Array, keys: jax.Array, bias: jax.Array) -> jax.Array:
    """(rows, C), (senders, C), (rows, senders) -> (rows, senders), float32."""
    scores = _product(queries, keys, 1, 1) * queries.shape[-1] ** -0.5
    return scores + bias.astype(jnp.float32)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Product of two matrices over an axis of each, in float32."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
