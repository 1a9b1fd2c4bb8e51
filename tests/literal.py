"""Read-in attention and kernels as published: oracles for what is computed otherwise.

Axes: B batch, U receivers (input latents), V senders (tokens), T token channels, D state,
I = H*C inner channels, H heads, C head channels, S code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m2mkd_jax.models.nac.read_in import ReadInAttention


def _norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    scale, bias = (jnp.broadcast_to(a[...], x.shape) for a in (scale, bias))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


def _modulated(layer, x, codes):
    """W (x * m) + b with m = 1 + g * norm(S c): x (B, U, ..., C), codes (U, S)."""
    m = 1.0 + layer.gain[...] * _norm(codes @ layer.scale.kernel[...], jnp.ones(()), jnp.zeros(()))
    m = m.reshape(1, len(codes), *(1,) * (x.ndim - 3), -1)
    y = jnp.einsum("...c,cd->...d", x * m, layer.kernel[...])
    return y if layer.bias is None else y + jnp.broadcast_to(layer.bias[...], y.shape)


def read_in(attention: ReadInAttention, receivers, codes, tokens) -> jax.Array:
    """Keys and values exist for every pair of input latent and token.

    Receivers (B, U, D), codes (U, S), tokens (B, V, T) -> (B, U, D), with the parameters of
    `attention` and none of its code; published defaults of the modulation only.
    """
    spec = attention.spec
    assert spec.modulation == "layer_norm" and spec.add_one
    b, u, _ = receivers.shape
    v = tokens.shape[1]
    norm = attention.receiver_norm
    queries = _modulated(attention.query, _norm(receivers, norm.scale, norm.bias), codes)
    norm = attention.sender_norm
    senders = _norm(tokens, norm.scale, norm.bias)[:, None]
    pairs = jnp.broadcast_to(senders, (b, u, *senders.shape[2:]))
    keys = _modulated(attention.key, pairs, codes).reshape(b, u, v, spec.heads, spec.head_dim)
    values = _modulated(attention.value, pairs, codes).reshape(keys.shape)
    queries = queries.reshape(b, u, spec.heads, spec.head_dim)
    scores = jnp.einsum("buhc,buvhc->buhv", queries, keys) / spec.head_dim**0.5
    message = jnp.einsum("buhv,buvhc->buhc", jax.nn.softmax(scores), values).reshape(b, u, -1)
    message = attention.gamma[...][None, None] * _modulated(attention.exit, message, codes)
    return receivers + message if spec.read_in_residual else message


def normalised(log_kernel: jax.Array) -> jax.Array:
    """A log kernel (..., U, V) as published: minus its logsumexp over senders.

    A row of -inf stays -inf, without NaN in value or gradient.
    """
    empty = jnp.isneginf(log_kernel).all(-1, keepdims=True)
    filled = jnp.where(empty, 0.0, log_kernel)
    inside = ~jnp.isneginf(filled)
    highest = jax.lax.stop_gradient(jnp.where(inside, filled, -jnp.inf).max(-1, keepdims=True))
    shifted = jnp.where(inside, filled - highest, 0.0)
    total = jnp.where(inside, jnp.exp(shifted), 0.0).sum(-1, keepdims=True)
    return jnp.where(inside & ~empty, shifted - jnp.log(total), -jnp.inf)
