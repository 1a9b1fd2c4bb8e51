"""A depthwise convolution that is fast on a CPU.

Axes: B batch, H height, W width, C channels, K kernel.

Source: docs/reference.md#nac-tokenizer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.models.products import has_placed_axes
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
    (benchmarks/RESULTS.md), so there it is written out in one of two ways.

    Args:
        x: (B, H, W, C).
        kernel: (K, K, C) with K odd.
        method: 'native', XLA's convolution; 'positions', a product with one banded matrix over all
            positions; 'shifts', the sum over the kernel's entries of x shifted (without a
            forward-mode derivative, but in `jax.shard_map` and on meshes with explicit axes);
            None chooses by backend, images and their size.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: the kernel is not square or not odd.
    """
    h, w, channels = x.shape[1:]
    size = kernel.shape[0]
    if kernel.shape[1] != size or size % 2 == 0:
        raise ValueError(f"kernel of {size} x {kernel.shape[1]}: expected K x K with K odd")
    if method is None:
        if backend.platform() != "cpu":
            method = "native"
        else:
            # All positions: (H W)^2 entries of a band per channel, however few images.
            method = "positions" if h * w <= min(64, 4 * len(x)) else "shifts"
    if method == "native":
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None, :],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
    if method == "shifts":
        dtype = jnp.result_type(x, kernel)
        # There the types of our own gradients would have to say where their axes lie.
        placed = has_placed_axes(x) or has_placed_axes(kernel)
        return (_shifts if placed else _sum_of_shifts)(x.astype(dtype), kernel.astype(dtype))
    across, across_inside = _band(w, size)
    down, down_inside = _band(h, size)
    band = kernel[down[:, None, :, None], across[None, :, None, :]]
    inside = down_inside[:, None, :, None] & across_inside[None, :, None, :]
    band = band * inside[..., None].astype(kernel.dtype)
    band = band.reshape(h * w, h * w, channels)
    rows = x.reshape(x.shape[0], h * w, channels)
    return jnp.einsum("bvc,uvc->buc", rows, band).reshape(x.shape)


def _shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One pass over the output: XLA fuses all K^2 terms, which never leave the registers."""
    h, w = x.shape[1:3]
    padded, factors = _pad(x, kernel), layers.widened(kernel)
    terms = [
        layers.widened(padded[:, i : i + h, j : j + w]) * factors[None, None, None, i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


_sum_of_shifts = jax.custom_vjp(_shifts)


def _pad(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H + K - 1, W + K - 1, C)."""
    border = (kernel.shape[0] // 2,) * 2
    return jnp.pad(x, ((0, 0), border, border, (0, 0)))


Operands = tuple[jax.Array, jax.Array]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Operands]:
    return _sum_of_shifts(x, kernel), (x, kernel)


def _backward(saved: Operands, grad: jax.Array) -> Operands:
    """A correlation of `grad` with the kernel, and of x with `grad`, one entry after the other."""
    x, kernel = saved
    padded, wide = _pad(x, kernel), layers.widened(grad)

    def entry(at: jax.Array) -> jax.Array:
        shifted = jax.lax.dynamic_slice(padded, (0, *divmod(at, kernel.shape[1]), 0), x.shape)
        # Summed over images outside the loop: they may lie on several devices.
        return (layers.widened(shifted) * wide).sum((1, 2))

    entries = jnp.arange(kernel.shape[0] * kernel.shape[1])
    of_kernel = jax.lax.map(entry, entries).sum(1).reshape(kernel.shape)
    return _sum_of_shifts(grad, kernel[::-1, ::-1]), of_kernel.astype(kernel.dtype)


_sum_of_shifts.defvjp(_forward, _backward)


def _band(length: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Index of the kernel entry for each (output, input) position, and whether there is one."""
    position = jnp.arange(length)
    offset = position[None, :] - position[:, None] + size // 2
    return jnp.clip(offset, 0, size - 1), (offset >= 0) & (offset < size)
