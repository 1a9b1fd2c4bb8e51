"""What all images of a batch share, and the sum over images that is its gradient.

Axes: B batch.

XLA's CPU compiler takes 30 to 60 times as long for a sum over the leading axis as for the additions
written out (8 x 320 x 384: 32 against 0.5 ms; benchmarks/RESULTS.md), and with the modulations of a
NAC such sums are a fifth of a step.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from m2mkd_jax.parallel import backend

# Most images whose additions are written out; more are a product with ones.
WRITTEN_OUT = 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def for_each_image(x: jax.Array, batch: int) -> jax.Array:
    """The same array for every image: (...) -> (B, ...).

    Args:
        x: any shape.
        batch: B.
    """
    return jnp.broadcast_to(x, (batch, *x.shape))


def _forward(x: jax.Array, batch: int) -> tuple[jax.Array, None]:
    return for_each_image(x, batch), None


def _backward(batch: int, residuals: None, grad: jax.Array) -> tuple[jax.Array]:
    del batch, residuals
    return (sum_over_images(grad),)


for_each_image.defvjp(_forward, _backward)


def sum_over_images(x: jax.Array) -> jax.Array:
    """Sum over the leading axis, in float32: (B, ...) -> (...)."""
    if backend.platform() != "cpu" or not len(x):
        return x.sum(0)
    wide = x.astype(jnp.float32)
    if len(x) > WRITTEN_OUT:
        ones = jnp.ones((1, len(x)), jnp.float32)
        total = (ones @ wide.reshape(len(x), -1)).reshape(x.shape[1:])
    else:
        total = functools.reduce(jnp.add, list(wide))
    return total.astype(x.dtype)


@jax.custom_vjp
def add_to_images(x: jax.Array, shared: jax.Array) -> jax.Array:
    """x (B, ...) + shared (1, ...).

    On accelerators the gradient of what is shared is a product with ones: for a sum over images XLA
    lays out all that is computed around it with the images innermost, and transposes it back.
    """
    return x + shared


def _add_forward(x: jax.Array, shared: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x + shared, shared


def _add_backward(shared: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    if backend.platform() == "cpu" or not len(grad):
        return grad, grad.sum(0, keepdims=True).astype(shared.dtype)
    ones, rows = jnp.ones((1, len(grad)), grad.dtype), grad.reshape(len(grad), -1)
    # By default an NVIDIA GPU rounds float32 to 11 bits first. 16-bit numbers asked for more
    # precision than that would be summed by XLA after all.
    precision = jax.lax.Precision.HIGHEST if grad.dtype.itemsize == 4 else None
    total = jnp.dot(ones, rows, precision=precision, preferred_element_type=jnp.float32)
    return grad, total.reshape(shared.shape).astype(shared.dtype)


add_to_images.defvjp(_add_forward, _add_backward)
