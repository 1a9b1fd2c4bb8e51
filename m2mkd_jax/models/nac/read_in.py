"""Read-in attention: input latents attend to image tokens, each with its own projections.

Axes: B batch, U input latents, V tokens, T token channels, D state, H heads, C head channels,
S code.

As published, input latent u modulates every token before the key and value projections:
k_uv = W_k (m_u * x_v). The modulation and the projections are linear, so

    q_u . k_uv            = (m_u * W_k^T q_u) . x_v
    sum_v a_uv W_v (m_u * x_v) = W_v (m_u * sum_v a_uv x_v)

and keys and values need not be computed for each pair (u, v). The numbers are the same; at the
ImageNet shape FLOPs and memory are lower by a factor of over fifty (benchmarks/RESULTS.md).
A bias on the keys shifts all scores of a query equally and cancels in the softmax; one on the
values passes through, since the weights sum to one. Modulated layers here have no activation and
no normalisation after the scale, either of which would break the identity.

Source: Weiss et al. 2022 (arXiv 2210.08031); docs/reference.md#nac-read-in.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.models.batching import for_each_image
from m2mkd_jax.models.nac.modulation import LAYER_NORM_EPS, ModulatedFFN, ModulatedLinear
from m2mkd_jax.models.nac.spec import NACSpec


class ReadInAttention(nnx.Module):
    """Cross-attention of input latents to tokens.

    Source: docs/reference.md#nac-read-in.
    """

    def __init__(self, spec: NACSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        d, t, inner = spec.state_dim, spec.token_dim, spec.inner_dim
        self.sender_norm = layers.layer_norm(t, LAYER_NORM_EPS, rngs=rngs)
        self.receiver_norm = layers.layer_norm(d, LAYER_NORM_EPS, rngs=rngs)
        self.query = ModulatedLinear(d, inner, spec, bias=spec.qkv_bias, rngs=rngs)
        self.key = ModulatedLinear(t, inner, spec, bias=spec.qkv_bias, rngs=rngs)
        self.value = ModulatedLinear(t, inner, spec, bias=spec.qkv_bias, rngs=rngs)
        self.exit = ModulatedLinear(inner, d, spec, rngs=rngs)
        self.gamma = nnx.Param(jnp.ones((d,)))

    def weights(self, receivers: jax.Array, codes: jax.Array, x: jax.Array) -> jax.Array:
        """Receivers (B, U, D), codes (U, S), normalised tokens (B, V, T) -> (B, U, H, V)."""
        h, count = self.spec.heads, x.shape[0]
        q = rearrange(self.query(self.receiver_norm(receivers), codes), "b u (h c) -> b u h c", h=h)
        k = rearrange(self.key.kernel[...], "t (h c) -> t h c", h=h)
        # All heads share the latent's modulation.
        key_scale = self.key.modulation(codes).astype(x.dtype)[:, None]
        folded = jnp.einsum("buhc,thc->buht", q, k) * for_each_image(key_scale, count)
        scores = jnp.einsum("buht,bvt->buhv", folded, x, preferred_element_type=jnp.float32)
        return jax.nn.softmax(scores / math.sqrt(self.spec.head_dim)).astype(x.dtype)

    def __call__(self, receivers: jax.Array, codes: jax.Array, tokens: jax.Array) -> jax.Array:
        """Receivers (B, U, D), codes (U, S), tokens (B, V, T) -> (B, U, D)."""
        h, count = self.spec.heads, tokens.shape[0]
        x = self.sender_norm(tokens)
        weights = self.weights(receivers, codes, x)
        v = rearrange(self.value.kernel[...], "t (h c) -> t h c", h=h)
        value_scale = self.value.modulation(codes).astype(x.dtype)[:, None]
        mean_token = jnp.einsum("buhv,bvt->buht", weights, x) * for_each_image(value_scale, count)
        message = jnp.einsum("buht,thc->buhc", mean_token, v)
        message = rearrange(message, "b u h c -> b u (h c)")
        if self.value.bias is not None:
            message = message + self.value.bias[...][None, None]
        message = self.gamma[...][None, None] * self.exit(message, codes)
        return receivers + message if self.spec.read_in_residual else message


class ReadIn(nnx.Module):
    """Read-in attention, then a modulated feed-forward network."""

    def __init__(self, spec: NACSpec, ffn_layer_scale: float, *, rngs: nnx.Rngs):
        self.attention = ReadInAttention(spec, rngs=rngs)
        self.ffn = ModulatedFFN(spec, ffn_layer_scale, rngs=rngs)

    def __call__(self, receivers: jax.Array, codes: jax.Array, tokens: jax.Array) -> jax.Array:
        """Receivers (B, U, D), codes (U, S), tokens (B, V, T) -> (B, U, D)."""
        return self.ffn(self.attention(receivers, codes, tokens), codes)
