"""Softmax attention: by cuDNN on a GPU that has it, else written out.

Axes: B batch, N tokens, U queries, V keys, H heads, C channels of a head.

`written_out` is our own, though `jax.nn.dot_product_attention` exists: it reads and writes the
weights of all heads fewer times, and computes the scores again in the backward pass instead of
keeping them. On a CPU it takes 0.55 to 0.8 of the time (benchmarks/RESULTS.md).

Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1; the backward pass is that of Dao et
al. 2022 (arXiv 2205.14135), appendix B.2, without its tiles.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from m2mkd_jax.models import layers
from m2mkd_jax.models.batching import sum_over_images
from m2mkd_jax.parallel import backend

Implementation = Literal["xla", "cudnn"]

# Fewest tokens for which fused attention is worth its launch.
SHORTEST = 64


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """jax.nn.dot_product_attention, also under strict dtype promotion.

    It relies on implicit promotion itself: of 16-bit inputs to float32 scores.

    Args:
        q, k, v: (B, N, H, C) each.
        options: of jax.nn.dot_product_attention.

    Returns:
        (B, N, H, C).
    """
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, **options)


def self_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v, softmax in float32.

    Uses cuDNN's fused attention where it is available: about 2.3 times as fast on an H100
    (benchmarks/RESULTS.md).

    Args:
        q, k, v: (B, N, H, C) each.

    Returns:
        (B, N, H, C).
    """
    if not fits_cudnn(q, k):
        return written_out(q, k, v)
    return padded_attention(q, k, v, "cudnn")


def padded_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: Implementation
) -> jax.Array:
    """`self_attention` with N padded to an even number, as cuDNN's backward pass requires.

    The padding token is masked. With a class token N is odd in every published transformer.

    Args:
        q, k, v: (B, N, H, C) each.
        implementation: of jax.nn.dot_product_attention.

    Returns:
        (B, N, H, C).
    """
    b, n = q.shape[:2]
    if n % 2 == 0:
        return dot_product_attention(q, k, v, implementation=implementation)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full((b,), n, jnp.int32)
    x = dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return x[:, :n]


def fits_cudnn(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN's fused attention, forward and backward, takes (B, N, H, C)."""
    n, c = q.shape[1], q.shape[3]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return (
        half and min(n, k.shape[1]) >= SHORTEST and c % 8 == 0 and c <= 128 and has_tensor_cores()
    )


def has_tensor_cores() -> bool:
    """Whether the device is an NVIDIA GPU from Ampere (compute capability 8) on."""
    if backend.platform() != "gpu":
        return False
    major = backend.compute_capability().partition(".")[0]
    return major.isdigit() and int(major) >= 8


@jax.custom_vjp
def written_out(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(C) + bias) v, softmax in float32.

    A bias of -inf excludes a key; a query whose keys are all excluded gets zeros, with finite
    gradients. There is no forward-mode derivative (`jax.jvp`).

    Args:
        q: (B, U, H, C).
        k, v: (B, V, H, C).
        bias: (B or 1, H or 1, U, V), with U and V in full, or None.

    Returns:
        (B, U, H, C).
    """
    return _forward(q, k, v, bias)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    scores, scale = _scores(q, k, bias)
    highest = scores.max(-1, keepdims=True)
    if bias is not None:
        highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp((scores - highest) * scale)
    total = weights.sum(-1, keepdims=True)
    if bias is not None:
        total = jnp.where(total == 0.0, 1.0, total)
    mean = _product("bhuv,bhvc->bhuc", weights.astype(v.dtype), _heads_first(v)) / total
    # Two numbers for a row: the logarithm of their product would lose the sum to a large maximum.
    highest, total = (checkpoint_name(x, layers.KEPT) for x in (highest, total))
    message = checkpoint_name(_heads_last(mean).astype(v.dtype), layers.KEPT)
    return message, (q, k, v, bias, message, highest, total)


def _backward(
    residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    q, k, v, bias, message, highest, total = residuals
    scores, scale = _scores(q, k, bias)
    weights = jnp.exp((scores - highest) * scale) * (1.0 / total)
    inner = (grad.astype(jnp.float32) * message.astype(jnp.float32)).sum(-1)
    inner = rearrange(inner, "b u h -> b h u 1")
    grad = _heads_first(grad)
    of_v = _product("bhuv,bhuc->bhvc", weights.astype(v.dtype), grad)
    of_scores = weights * (_product("bhuc,bhvc->bhuv", grad, _heads_first(v)) - inner)
    narrow, root = of_scores.astype(q.dtype), q.shape[-1] ** -0.5
    of_q = _product("bhuv,bhvc->bhuc", narrow, _heads_first(k)) * root
    of_k = _product("bhuv,bhuc->bhvc", narrow, _heads_first(q)) * root
    of_inputs = ((of_q, q), (of_k, k), (of_v, v))
    of_q, of_k, of_v = (_heads_last(g).astype(x.dtype) for g, x in of_inputs)
    return of_q, of_k, of_v, None if bias is None else _summed(of_scores, bias)


written_out.defvjp(_forward, _backward)


def _scores(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, float]:
    """Scores (B, H, U, V) in float32, and the factor that the caller multiplies them by."""
    scale = q.shape[-1] ** -0.5
    scores = _product("bhuc,bhvc->bhuv", _heads_first(q), _heads_first(k))
    if bias is None:
        return scores, scale
    return scores * scale + bias.astype(jnp.float32), 1.0


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _heads_first(x: jax.Array) -> jax.Array:
    return rearrange(x, "b n h c -> b h n c")


def _heads_last(x: jax.Array) -> jax.Array:
    return rearrange(x, "b h n c -> b n h c")


def _summed(grad: jax.Array, bias: jax.Array) -> jax.Array:
    """The gradient of a bias: summed over the heads and images that share it."""
    if bias.shape[1] == 1:
        grad = sum_over_images(grad.swapaxes(0, 1))[:, None]
    if bias.shape[0] == 1:
        grad = sum_over_images(grad)[None]
    return grad.astype(bias.dtype)
