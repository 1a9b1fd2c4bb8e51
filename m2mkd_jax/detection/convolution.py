"""Convolutions of pyramid and heads, and LayerNorm over channels.

Axes: B batch, H height, W width, C channels in, D channels out.

Source: docs/detection.md#pyramid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.models.layers import Initialiser

NORM_EPS = 1e-6

# Kaiming normal by the fan-out of a ReLU.
kaiming_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nnx.Module):
    """Convolution with odd kernel, stride 1, zero padding: (B, H, W, C) -> (B, H, W, D)."""

    def __init__(
        self,
        c: int,
        d: int,
        size: int,
        *,
        bias: bool = True,
        kernel_init: Initialiser = layers.torch_init,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, c, d), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        if kernel.shape[:2] == (1, 1):
            y = jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])
        else:
            names = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)
        return y if self.bias is None else y + layers.align_rank(self.bias[...], y)


class ConvNorm(nnx.Module):
    """Convolution without bias, then LayerNorm over the channels of each position."""

    def __init__(
        self,
        c: int,
        d: int,
        size: int,
        *,
        kernel_init: Initialiser = layers.torch_init,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(c, d, size, bias=False, kernel_init=kernel_init, rngs=rngs)
        self.norm = layers.layer_norm(d, NORM_EPS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Upsample(nnx.Module):
    """Transposed convolution, kernel 2, stride 2: (B, H, W, C) -> (B, 2H, 2W, D).

    The outputs of two positions do not overlap, so that it is a linear layer C -> 2 x 2 x D.
    """

    def __init__(
        self,
        c: int,
        d: int,
        *,
        kernel_init: Initialiser | None = None,
        rngs: nnx.Rngs,
    ):
        # PyTorch takes the fan-in of the transposed layer's weight (C, D, 2, 2): 4 D.
        init = kernel_init or layers.torch_bias_init(4 * d)
        self.kernel = nnx.Param(init(rngs.params(), (c, 2, 2, d), jnp.float32))
        start = jnp.zeros((d,)) if kernel_init else init(rngs.params(), (d,), jnp.float32)
        self.bias = nnx.Param(start)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum("bhwc,cpqd->bhpwqd", x, self.kernel[...])
        y = rearrange(y, "b h p w q d -> b (h p) (w q) d")
        return y + layers.align_rank(self.bias[...], y)


def max_pool(x: jax.Array) -> jax.Array:
    """Maxima of 2 x 2 positions; an odd last row or column is left out.

    The gradient goes to the one that is chosen. That of jnp.max divides by the number of entries
    that equal the maximum, which is 0 where XLA computes the entries once more, rounded otherwise.
    """
    h, w = x.shape[1] // 2, x.shape[2] // 2
    x = rearrange(x[:, : 2 * h, : 2 * w], "b (h p) (w q) c -> (p q) b h w c", p=2, q=2)
    top, bottom = (jnp.where(x[i] >= x[i + 1], x[i], x[i + 1]) for i in (0, 2))
    return jnp.where(top >= bottom, top, bottom)
