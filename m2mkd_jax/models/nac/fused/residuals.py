"""Residual branches with the norm or the modulation beside them as GPU kernels.

Axes: B batch, U latents, D channels.

A backward pass also gives its forward result again, where that is the operand of a matrix product:
the gradient of its weights needs it, and it is not kept.

Source: docs/reference.md#nac-modulated-linear, docs/reference.md#nac-ffn.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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


class Residual(NamedTuple):
    """x + keep * gamma * (y + bias).

    Attributes:
        gamma: layer scale (D,).
        bias: of the matrix product that made y (D,).
        keep: of drop-path (B,): 0, or 1 / the probability of being kept; ones without drop-path.
    """

    gamma: jax.Array
    bias: jax.Array
    keep: jax.Array


@functools.partial(once, static=("epsilon",))
def add_and_modulate(
    states: jax.Array,
    y: jax.Array,
    residual: Residual,
    norm: Norm,
    modulation: jax.Array,
    *,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Adds a residual branch; LayerNorm of the sum, times a modulation.

    Args:
        states, y: (B, U, D).
        residual: how y is added.
        norm: of the sum.
        modulation: (U, D).
        epsilon: of the norm.

    Returns:
        The sum and the modulated norm, (B, U, D) both.
    """
    b, u, d = states.shape
    blocks, parts = grid(b, u)

    def add_and_modulate(*refs: Any) -> None:
        states, y, gamma, bias, keep, scale, shift, m, total, x = refs
        rows = Rows(d, pl.program_id(0) * LATENTS)
        gammas, biases = rows.shared(gamma), rows.shared(bias)
        scales, shifts, factors = rows.shared(scale), rows.shared(shift), rows.read(m)

        def one(image: Any, sums: Any) -> Any:
            branch = mul(add(rows.read(y, image), biases), gammas)
            added = add(rows.read(states, image), [part * keep[image] for part in branch])
            rows.write(total, added, image)
            # The norm is of the states as they are stored, as in the backward pass.
            normal, _ = normalise(_stored(added, total.dtype), epsilon)
            rows.write(x, mul(add(mul(normal, scales), shifts), factors), image)
            return sums

        walk(b // parts, one, 0)

    return tuple(
        call(
            add_and_modulate,
            "add_and_modulate",
            (blocks, parts),
            [like(states)] * 2,
            states,
            y,
            *residual,
            *norm,
            modulation,
        )
    )


def _stored(x: Chunks, dtype: Any) -> Chunks:
    return [part.astype(dtype).astype(jnp.float32) for part in x]


@functools.partial(once, static=("epsilon",))
def add_and_modulate_backward(
    total: jax.Array,
    y: jax.Array,
    residual: Residual,
    norm: Norm,
    modulation: jax.Array,
    grads: tuple[jax.Array, jax.Array],
    *,
    epsilon: float,
) -> tuple[Any, ...]:
    """Backward pass of `add_and_modulate`.

    Args:
        total: its first result.
        y, residual, norm, modulation, epsilon: as there.
        grads: of its two results.

    Returns:
        Its second result; gradients of states, y, residual (of its gamma and bias), norm and
        modulation.
    """
    b, u, d = total.shape
    blocks, parts = grid(b, u)

    kernel = functools.partial(_add_and_modulate_backward, images=b // parts, epsilon=epsilon)
    shapes = [like(total)] * 3 + [sums_like(parts, u, d)] + [sums_like(blocks, parts, d)] * 4
    x, of_states, of_y, of_m, *sums = call(
        kernel,
        "add_and_modulate_backward",
        (blocks, parts),
        shapes,
        total,
        y,
        *residual,
        *norm,
        modulation,
        *grads,
    )
    of_gamma, of_bias, *of_norm = (part.sum((0, 1)) for part in sums)
    return x, of_states, of_y, (of_gamma, of_bias), Norm(*of_norm), of_m.sum(0)


def _add_and_modulate_backward(*refs: Any, images: int, epsilon: float) -> None:
    """Kernel of `add_and_modulate_backward`; `images` of a group."""
    total, y, gamma, bias, keep, scale, shift, m, of_total, of_x = refs[:10]
    x, of_states, of_y, of_m, of_gamma, of_bias, of_scale, of_shift = refs[10:]
    rows = Rows(total.shape[-1], pl.program_id(0) * LATENTS)
    gammas, biases = rows.shared(gamma), rows.shared(bias)
    scales, shifts, factors = rows.shared(scale), rows.shared(shift), rows.read(m)

    def one(image: Any, sums: Any) -> Any:
        sum_m, sum_gamma, sum_bias, sum_scale, sum_shift = sums
        normal, inverse = normalise(rows.read(total, image), epsilon)
        modulated, grad = add(mul(normal, scales), shifts), rows.read(of_x, image)
        rows.write(x, mul(modulated, factors), image)
        of_norm = mul(grad, factors)
        back = normalise_backward(mul(of_norm, scales), normal, inverse)
        of_sum = add(rows.read(of_total, image), back)
        rows.write(of_states, of_sum, image)
        kept = [part * keep[image] for part in of_sum]
        of_branch = mul(kept, gammas)
        rows.write(of_y, of_branch, image)
        return (
            add(sum_m, mul(grad, modulated)),
            add(sum_gamma, mul(kept, add(rows.read(y, image), biases))),
            add(sum_bias, of_branch),
            add(sum_scale, mul(of_norm, normal)),
            add(sum_shift, of_norm),
        )

    sums = walk(images, one, (rows.zeros(),) * 5)
    rows.write(of_m, sums[0], pl.program_id(1))
    for ref, part in zip((of_gamma, of_bias, of_scale, of_shift), sums[1:], strict=True):
        write_channels(ref, rows, part)


@once
def add_backward(
    y: jax.Array, residual: Residual, grad: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Backward pass of a residual branch alone.

    Args:
        y: (B, U, D).
        residual: how y was added.
        grad: of the sum (B, U, D).

    Returns:
        Gradients of y and of the residual's gamma and bias.
    """
    b, u, d = y.shape
    blocks, parts = grid(b, u)

    def add_backward(*refs: Any) -> None:
        y, gamma, bias, keep, grad, of_y, of_gamma, of_bias = refs
        rows = Rows(d, pl.program_id(0) * LATENTS)
        gammas, biases = rows.shared(gamma), rows.shared(bias)

        def one(image: Any, sums: Any) -> Any:
            kept = [part * keep[image] for part in rows.read(grad, image)]
            of_branch = mul(kept, gammas)
            rows.write(of_y, of_branch, image)
            of_gamma = mul(kept, add(rows.read(y, image), biases))
            return add(sums[0], of_gamma), add(sums[1], of_branch)

        sums = walk(b // parts, one, (rows.zeros(), rows.zeros()))
        write_channels(of_gamma, rows, sums[0])
        write_channels(of_bias, rows, sums[1])

    shapes = [like(y)] + [sums_like(blocks, parts, d)] * 2
    of_y, *sums = call(add_backward, "add_backward", (blocks, parts), shapes, y, *residual, grad)
    of_gamma, of_bias = (part.sum((0, 1)) for part in sums)
    return of_y, (of_gamma, of_bias)


@once
def modulate_backward(
    x: jax.Array, modulation: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Backward pass of x * modulation.

    Args:
        x: (B, U, D).
        modulation: (U, D).
        grad: of the product.

    Returns:
        The product; gradients of x and of the modulation.
    """
    b, u, d = x.shape
    blocks, parts = grid(b, u)

    def modulate_backward(*refs: Any) -> None:
        x, m, grad, product, of_x, of_m = refs
        rows = Rows(d, pl.program_id(0) * LATENTS)
        factors = rows.read(m)

        def one(image: Any, sums: Any) -> Any:
            values, of_product = rows.read(x, image), rows.read(grad, image)
            rows.write(product, mul(values, factors), image)
            rows.write(of_x, mul(of_product, factors), image)
            return add(sums, mul(of_product, values))

        rows.write(of_m, walk(b // parts, one, rows.zeros()), pl.program_id(1))

    shapes = [like(x), like(x), sums_like(parts, u, d)]
    product, of_x, of_m = call(
        modulate_backward, "modulate_backward", (blocks, parts), shapes, x, modulation, grad
    )
    return product, of_x, of_m.sum(0)
