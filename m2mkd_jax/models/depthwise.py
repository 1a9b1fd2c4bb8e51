"""A depthwise convolution that is fast on a CPU.

Axes: B batch, H height, W width, C channels, K kernel.

Source: docs/reference.md#nac-tokenizer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.parallel import backend


class DepthwiseConv(nnx.Module):
    """Depthwise convolution with odd kernel, stride 1, zero padding: (B, H, W, C) -> same shape."""

    def __init__(self, c: int, size: int, *, kernel_init: layers.Initialiser, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, c), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return depthwise_conv(x, self.kernel[...]) + layers.align_rank(self.bias[...], x)


def depthwise_conv(x: jax.Array, kernel: jax.Array, method: str | None = None) -> jax.Array:
    """Convolves channel by channel with zero padding.

    XLA's own depthwise convolution is 10 to 100 times slower than needed on a CPU
    (benchmarks/RESULTS.md), so there it is computed as a product with banded matrices.

    Args:
        x: (B, H, W, C).
        kernel: (K, K, C) with K odd.
        method: 'native', XLA's convolution; 'positions', one banded matrix over all positions;
            'columns', banded matrices over the columns, one kernel row at a time; None chooses by
            backend, images and their size.

    Returns:
        (B, H, W, C).
    """
    h, w = x.shape[1:3]
    if method is None:
        if backend.platform() != "cpu":
            method = "native"
        else:
            # All positions: (H W)^2 entries of a band per channel, however few images.
            method = "positions" if h * w <= min(256, 4 * len(x)) else "columns"
    if method == "native":
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None, :],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
    size = kernel.shape[0]
    across, across_inside = _band(w, size)
    if method == "columns":
        rows = jnp.pad(x, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
        rows = jnp.stack([rows[:, i : i + h] for i in range(size)], axis=-2)
        band = kernel[:, across] * across_inside[None, :, :, None].astype(kernel.dtype)
        return jnp.einsum("bhwkc,kuwc->bhuc", rows, band)
    down, down_inside = _band(h, size)
    band = kernel[down[:, None, :, None], across[None, :, None, :]]
    inside = down_inside[:, None, :, None] & across_inside[None, :, None, :]
    band = band * inside[..., None].astype(kernel.dtype)
    band = band.reshape(h * w, h * w, -1)
    return jnp.einsum("bvc,uvc->buc", x.reshape(x.shape[0], h * w, -1), band).reshape(x.shape)


def _band(length: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Index of the kernel entry for each (output, input) position, and whether there is one."""
    position = jnp.arange(length)
    offset = position[None, :] - position[:, None] + size // 2
    return jnp.clip(offset, 0, size - 1), (offset >= 0) & (offset < size)
