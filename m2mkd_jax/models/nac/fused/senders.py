"""LayerNorm of all senders and the modulations of query, key and value as one GPU kernel.

Axes: B batch, I input latents, U mediators, V = I + U senders, D channels.

A backward pass also gives the results again: they are operands of matrix products, which the
gradients of their weights need, and are not kept.

Source: docs/reference.md#nac-modulated-linear.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from m2mkd_jax.models.nac.fused.choice import LATENTS
from m2mkd_jax.models.nac.fused.programs import (
    Chunks,
    Norm,
    Rows,
    add,
    call,
    grid,
    like,
    mul,
    normalise,
    normalise_backward,
    once,
    sums_like,
    walk,
    write_channels,
)


class _Split:
    """A program's latents among inputs and mediators, which follow each other in V."""

    def __init__(self, inputs: int, channels: int):
        first = pl.program_id(0) * LATENTS
        self.is_input, self.is_mediator = first < inputs, first >= inputs
        self.senders = Rows(channels, first)
        self.inputs = Rows(channels, jnp.minimum(first, inputs - LATENTS))
        self.mediators = Rows(channels, jnp.maximum(first - inputs, 0))

    def read(self, inputs: Any, mediators: Any, image: Any) -> Chunks:
        return add(
            self.inputs.read(inputs, image, mask=self.is_input),
            self.mediators.read(mediators, image, mask=self.is_mediator),
        )


@functools.partial(once, static=("epsilon",))
def modulate_senders(
    inputs: jax.Array,
    mediators: jax.Array,
    norm: Norm,
    modulations: tuple[jax.Array, jax.Array, jax.Array],
    *,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """LayerNorm of all senders, times the modulations of query, key and value.

    Args:
        inputs: (B, I, D).
        mediators: (B, U, D).
        norm: of both.
        modulations: of query (U, D), of key and of value (V, D).
        epsilon: of the norm.

    Returns:
        Of query (B, U, D), of key and of value (B, V, D).
    """
    (b, i, d), u = inputs.shape, mediators.shape[1]
    blocks, parts = grid(b, i + u)

    def norm_and_modulate(*refs: Any) -> None:
        inputs, mediators, scale, bias, mq, mk, mv, xq, xk, xv = refs
        own = _Split(i, d)
        scales, biases = own.senders.shared(scale), own.senders.shared(bias)
        of_q, of_k, of_v = own.mediators.read(mq), own.senders.read(mk), own.senders.read(mv)

        def one(image: Any, sums: Any) -> Any:
            x, _ = normalise(own.read(inputs, mediators, image), epsilon)
            x = add(mul(x, scales), biases)
            own.mediators.write(xq, mul(x, of_q), image, mask=own.is_mediator)
            own.senders.write(xk, mul(x, of_k), image)
            own.senders.write(xv, mul(x, of_v), image)
            return sums

        walk(b // parts, one, 0)

    shapes = [like(inputs, b, n, d) for n in (u, i + u, i + u)]
    return tuple(
        call(
            norm_and_modulate,
            "norm_and_modulate",
            (blocks, parts),
            shapes,
            inputs,
            mediators,
            *norm,
            *modulations,
        )
    )


@functools.partial(once, static=("epsilon",))
def modulate_senders_backward(
    inputs: jax.Array,
    mediators: jax.Array,
    norm: Norm,
    modulations: tuple[jax.Array, jax.Array, jax.Array],
    grads: tuple[jax.Array, jax.Array, jax.Array],
    residual_grad: jax.Array,
    *,
    epsilon: float,
) -> tuple[Any, ...]:
    """Backward pass of `modulate_senders`.

    Args:
        inputs, mediators, norm, modulations, epsilon: as there.
        grads: of its three results.
        residual_grad: what the mediators get from elsewhere (B, U, D).

    Returns:
        The three results; gradients of inputs, of mediators with what they get from elsewhere, of
        norm and of modulations.
    """
    (b, i, d), u = inputs.shape, mediators.shape[1]
    v = i + u
    blocks, parts = grid(b, v)

    kernel = functools.partial(_norm_and_modulate_backward, images=b // parts, epsilon=epsilon)
    shapes = [like(inputs, b, n, d) for n in (u, v, v, i, u)]
    shapes += [sums_like(parts, n, d) for n in (u, v, v)] + [sums_like(blocks, parts, d)] * 2
    xq, xk, xv, of_inputs, of_mediators, *sums = call(
        kernel,
        "norm_and_modulate_backward",
        (blocks, parts),
        shapes,
        inputs,
        mediators,
        *norm,
        *modulations,
        *grads,
        residual_grad,
    )
    of_modulations = tuple(part.sum(0) for part in sums[:3])
    of_norm = Norm(*(part.sum((0, 1)) for part in sums[3:]))
    return (xq, xk, xv), of_inputs, of_mediators, of_norm, of_modulations


def _norm_and_modulate_backward(*refs: Any, images: int, epsilon: float) -> None:
    """Kernel of `modulate_senders_backward`; `images` of a group."""
    inputs, mediators, scale, bias, mq, mk, mv, gq, gk, gv, residual = refs[:11]
    xq, xk, xv, of_inputs, of_mediators, of_mq, of_mk, of_mv, of_scale, of_bias = refs[11:]
    _, i, d = inputs.shape
    own = _Split(i, d)
    scales, biases = own.senders.shared(scale), own.senders.shared(bias)
    q, k, v = own.mediators.read(mq), own.senders.read(mk), own.senders.read(mv)

    def one(image: Any, sums: Any) -> Any:
        sum_q, sum_k, sum_v, sum_scale, sum_bias = sums
        normal, inverse = normalise(own.read(inputs, mediators, image), epsilon)
        x = add(mul(normal, scales), biases)
        own.mediators.write(xq, mul(x, q), image, mask=own.is_mediator)
        own.senders.write(xk, mul(x, k), image)
        own.senders.write(xv, mul(x, v), image)
        grad_q = own.mediators.read(gq, image, mask=own.is_mediator)
        grad_k, grad_v = own.senders.read(gk, image), own.senders.read(gv, image)
        grad = add(mul(grad_q, q), add(mul(grad_k, k), mul(grad_v, v)))
        of_x = normalise_backward(mul(grad, scales), normal, inverse)
        own.inputs.write(of_inputs, of_x, image, mask=own.is_input)
        of_x = add(of_x, own.mediators.read(residual, image, mask=own.is_mediator))
        own.mediators.write(of_mediators, of_x, image, mask=own.is_mediator)
        return (
            add(sum_q, mul(grad_q, x)),
            add(sum_k, mul(grad_k, x)),
            add(sum_v, mul(grad_v, x)),
            add(sum_scale, mul(grad, normal)),
            add(sum_bias, grad),
        )

    group, zeros = pl.program_id(1), own.senders.zeros()
    sums = walk(images, one, (zeros,) * 5)
    own.mediators.write(of_mq, sums[0], group, mask=own.is_mediator)
    own.senders.write(of_mk, sums[1], group)
    own.senders.write(of_mv, sums[2], group)
    write_channels(of_scale, own.senders, sums[3])
    write_channels(of_bias, own.senders, sums[4])
