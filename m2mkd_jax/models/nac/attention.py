"""Attention between latents, with or without a kernel on their signatures.

Axes: B batch, U receivers, V senders, D state, H heads, C head channels, S code.

Source: Weiss et al. 2022 (arXiv 2210.08031);
docs/reference.md#nac-propagator, docs/reference.md#nac-kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.models import attention, layers
from m2mkd_jax.models.nac.modulation import LAYER_NORM_EPS, ModulatedFFN, ModulatedLinear
from m2mkd_jax.models.nac.spec import NACSpec

EXCLUDED = -(2.0**14)  # a bias that gives weight 0 and that float16 can represent


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_kernel: jax.Array | None = None,
    finite: bool = False,
) -> jax.Array:
    """Attention with a log kernel added to the scores of all heads.

    Entries of -inf are excluded; a receiver with only -inf receives zeros, with finite gradients.

    Source: docs/reference.md#nac-kernel.

    Args:
        q: (B, U, H, C).
        k, v: (B, V, H, C).
        log_kernel: (U, V) or (B, U, V); None for plain attention.
        finite: no entry is -inf, and the largest of a row is near zero: it is a log probability.
            Saves a GPU two passes over the kernel.

    Returns:
        (B, U, H, C).
    """
    if log_kernel is None:
        if q.shape[1] == k.shape[1]:
            return attention.self_attention(q, k, v)
        return attention.written_out(q, k, v)
    # With a bias cuDNN's backward pass requires even lengths.
    if attention.fits_cudnn(q, k) and q.shape[1] % 2 == k.shape[1] % 2 == 0:
        return library_attention(q, k, v, log_kernel, "cudnn", finite)
    return attention.written_out(q, k, v, _with_batch(log_kernel)[:, None])


def _with_batch(log_kernel: jax.Array) -> jax.Array:
    """Log kernel (U, V) or (B, U, V) -> (1 or B, U, V)."""
    return log_kernel[None] if log_kernel.ndim == 2 else log_kernel


def library_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_kernel: jax.Array,
    implementation: attention.Implementation,
    finite: bool = False,
) -> jax.Array:
    """`attend` by jax.nn.dot_product_attention.

    Its 'cudnn' never stores the weights of all heads; on an H100 that is 1.7 to 1.8 times as fast
    (benchmarks/RESULTS.md).

    Args:
        q, k, v, log_kernel: as for `attend`.
        implementation: of jax.nn.dot_product_attention.
        finite: as for `attend`.

    Returns:
        (B, U, H, C).
    """
    bias = _with_batch(log_kernel)[:, None]
    inside = ~jnp.isneginf(bias)
    if not finite:
        # A constant added to a row cancels in the softmax: with the row's largest entry at zero,
        # 16-bit floats are most precise where the weights are largest. cuDNN cannot subtract
        # infinities.
        bias = jnp.where(inside, bias - _highest(bias, inside), EXCLUDED)
    # cuDNN computes the gradient of a bias only if it has an entry for every image and head.
    shape = (q.shape[0], q.shape[2], *bias.shape[-2:])
    bias = jnp.broadcast_to(bias.astype(q.dtype), shape)
    message = attention.dot_product_attention(q, k, v, bias=bias, implementation=implementation)
    if finite:
        return message
    has_sender = rearrange(inside.any(-1), "b h u -> b u h 1")
    return jnp.where(has_sender, message, 0)


def _highest(scores: jax.Array, inside: jax.Array) -> jax.Array:
    """Largest entry of every row, (..., U, V) -> (..., U, 1), without gradient; 0 if excluded."""
    highest = jnp.where(inside, scores, -jnp.inf).max(-1, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), 0.0, highest))


class LatentAttention(nnx.Module):
    """Attention of receivers to senders, with all four projections modulated by codes.

    Source: docs/reference.md#nac-propagator.
    """

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
        self,
        receivers: jax.Array,
        receiver_codes: jax.Array,
        senders: jax.Array,
        sender_codes: jax.Array,
        log_kernel: jax.Array | None = None,
        rate: jax.Array | float | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the attention.

        Args:
            receivers: states (B, U, D).
            receiver_codes: (U, S), or (1, S) for one code of all.
            senders: states (B, V, D).
            sender_codes: (V, S) or (1, S).
            log_kernel: (U, V) or (B, U, V); None for none.
            rate, key: of drop-path; None for no drop-path.

        Returns:
            States (B, U, D).
        """
        u = self.receiver_norm(receivers)
        v = (self.sender_norm or self.receiver_norm)(senders)
        projections = (
            self.query(u, receiver_codes),
            self.key(v, sender_codes),
            self.value(v, sender_codes),
        )
        q, k, v = (rearrange(x, "b u (h c) -> b u h c", h=self.heads) for x in projections)
        # A kernel of each image is a sample, which is never zero.
        finite = log_kernel is not None and log_kernel.ndim == 3
        message = attend(q, k, v, log_kernel, finite)
        message = self.exit(rearrange(message, "b u h c -> b u (h c)"), receiver_codes)
        message = self.gamma[...][None, None] * message
        if not self.residual:
            return message
        return receivers + layers.drop_path(message, rate, key)


class LatentLayer(nnx.Module):
    """Latent attention followed by a modulated feed-forward network.

    A propagator shares one norm between receivers and senders and has a residual; a read-out has
    two norms and no residual. The students of both have no kernel.

    Source: docs/reference.md#nac-propagator, docs/reference.md#nac-read-out.
    """

    def __init__(
        self,
        spec: NACSpec,
        *,
        share_norm: bool,
        residual: bool,
        kernel: bool,
        ffn: bool = True,
        rngs: nnx.Rngs,
    ):
        self.attention = LatentAttention(
            spec, share_norm=share_norm, residual=residual, kernel=kernel, rngs=rngs
        )
        self.ffn = ModulatedFFN(spec, spec.layer_scale, rngs=rngs) if ffn else None

    def __call__(
        self,
        receivers: jax.Array,
        receiver_codes: jax.Array,
        senders: jax.Array,
        sender_codes: jax.Array,
        log_kernel: jax.Array | None = None,
        rate: jax.Array | float | None = None,
        key: jax.Array | None = None,
        ffn: ModulatedFFN | None = None,
    ) -> jax.Array:
        """Computes attention and feed-forward network.

        Args:
            receivers, receiver_codes, senders, sender_codes: as for `LatentAttention`.
            log_kernel, rate, key: as for `LatentAttention`.
            ffn: a feed-forward network shared between layers, in place of the layer's own.

        Returns:
            States (B, U, D).
        """
        keys = (None, None) if key is None else jax.random.split(key)
        states = self.attention(
            receivers, receiver_codes, senders, sender_codes, log_kernel, rate, keys[0]
        )
        ffn = ffn or self.ffn
        assert ffn is not None, "a layer without a feed-forward network needs a shared one"
        return ffn(states, receiver_codes, rate, keys[1])
