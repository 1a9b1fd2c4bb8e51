"""Attention between latents, with or without a kernel on their signatures.

Axes: B batch, U receivers, V senders, D state, H heads, C head channels, S code.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.models.nac.modulation import LAYER_NORM_EPS, ModulatedFFN, ModulatedLinear
from m2mkd_jax.models.nac.spec import NACSpec

EXCLUDED = -(2.0**14)  # a bias that leaves no weight, and that float16 can hold


def attend(q, k, v, log_kernel=None):
    """q (B, U, H, C), k and v (B, V, H, C), log kernel (U, V) or (B, U, V) -> (B, U, H, C).

    The kernel is added to the scores of all heads alike. -inf entries take no part; a receiver
    with nothing but -inf receives zeros (value and gradient finite).
    """
    if log_kernel is None:
        equally_long = q.shape[1] == k.shape[1]
        attention = layers.self_attention if equally_long else jax.nn.dot_product_attention
        return attention(q, k, v)
    # With a bias cuDNN's backward pass takes even lengths alone.
    if layers.fits_cudnn(q, k) and q.shape[1] % 2 == k.shape[1] % 2 == 0:
        return by_library(q, k, v, log_kernel, "cudnn")
    log_kernel = log_kernel[..., None, :, :]
    inside = ~jnp.isneginf(log_kernel)
    scores = jnp.einsum("buhc,bvhc->bhuv", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1]) + jnp.where(inside, log_kernel, 0.0)
    weights = jnp.where(
        inside, jnp.exp(jnp.where(inside, scores - _highest(scores, inside), 0.0)), 0.0
    )
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    return jnp.einsum("bhuv,bvhc->buhc", weights.astype(v.dtype), v)


def by_library(q, k, v, log_kernel, implementation: str):
    """`attend` by jax.nn.dot_product_attention; its 'cudnn' never keeps the weights of all heads.

    On an H100 that is 1.7 to 1.8 times as fast (benchmarks/RESULTS.md).
    """
    log_kernel = log_kernel[..., None, :, :]
    inside = ~jnp.isneginf(log_kernel)
    # What is the same for a whole row drops out of the softmax: near zero, where the weight is,
    # 16 bit lose the least. cuDNN cannot subtract infinities.
    bias = jnp.where(inside, log_kernel - _highest(log_kernel, inside), EXCLUDED)
    # cuDNN gives gradients for a bias of every image and head alone.
    shape = (q.shape[0], q.shape[2], *bias.shape[-2:])
    bias = jnp.broadcast_to(bias.astype(q.dtype), shape)
    message = jax.nn.dot_product_attention(q, k, v, bias=bias, implementation=implementation)
    heard = rearrange(inside.any(-1), "... h u -> ... u h 1")
    return jnp.where(heard, message, 0)


def _highest(scores, inside):
    """The largest of every row (..., U, V) -> (..., U, 1), without gradient; 0 of an empty one."""
    highest = jnp.where(inside, scores, -jnp.inf).max(-1, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), 0.0, highest))


class LatentAttention(nnx.Module):
    """Receivers listen to senders; queries, keys, values and exit are modulated by codes."""

    def __init__(
        self,
        spec: NACSpec,
        *,
        share_norm: bool,
        residual: bool,
        kernel: bool,
        layer_scale: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.heads, self.residual = spec.heads, residual
        d, inner = spec.state_dim, spec.inner_dim
        if kernel:
            self.bandwidth = nnx.Param(jnp.float32(1.0))
        self.receiver_norm = layers.layer_norm(d, LAYER_NORM_EPS, rngs=rngs)
        self.sender_norm = None if share_norm else layers.layer_norm(d, LAYER_NORM_EPS, rngs=rngs)
        self.query = ModulatedLinear(d, inner, spec, bias=spec.qkv_bias, rngs=rngs)
        self.key = ModulatedLinear(d, inner, spec, bias=spec.qkv_bias, rngs=rngs)
        self.value = ModulatedLinear(d, inner, spec, bias=spec.qkv_bias, rngs=rngs)
        self.exit = ModulatedLinear(inner, d, spec, rngs=rngs)
        scale = spec.layer_scale if layer_scale is None else layer_scale
        self.gamma = nnx.Param(jnp.full((d,), scale))

    def __call__(
        self, receivers, receiver_codes, senders, sender_codes, log_kernel=None, rate=None, key=None
    ):
        """Receivers (B, U, D), senders (B, V, D), codes (U, S) and (V, S) -> (B, U, D)."""
        u = self.receiver_norm(receivers)
        v = (self.sender_norm or self.receiver_norm)(senders)
        heads = lambda x: rearrange(x, "b u (h c) -> b u h c", h=self.heads)  # noqa: E731
        message = attend(
            heads(self.query(u, receiver_codes)),
            heads(self.key(v, sender_codes)),
            heads(self.value(v, sender_codes)),
            log_kernel,
        )
        message = self.exit(rearrange(message, "b u h c -> b u (h c)"), receiver_codes)
        message = self.gamma[...] * message
        if not self.residual:
            return message
        return receivers + layers.drop_path(message, rate, key)


class LatentLayer(nnx.Module):
    """Latent attention followed by a modulated feed-forward network.

    A propagator (one norm for receivers and senders, residual), a read-out (two norms, no
    residual) or, without kernel, what students of both are made of.
    """

    def __init__(self, spec: NACSpec, *, share_norm, residual, kernel, ffn=True, rngs: nnx.Rngs):
        self.attention = LatentAttention(
            spec, share_norm=share_norm, residual=residual, kernel=kernel, rngs=rngs
        )
        self.ffn = ModulatedFFN(spec, spec.layer_scale, rngs=rngs) if ffn else None

    def __call__(
        self,
        receivers,
        receiver_codes,
        senders,
        sender_codes,
        log_kernel=None,
        rate=None,
        key=None,
        ffn=None,
    ):
        """As LatentAttention; `ffn` replaces an own feed-forward network (shared ones)."""
        keys = (None, None) if key is None else jax.random.split(key)
        states = self.attention(
            receivers, receiver_codes, senders, sender_codes, log_kernel, rate, keys[0]
        )
        return (ffn or self.ffn)(states, receiver_codes, rate, keys[1])
