"""GEGLU with the modulation behind it as GPU kernels.

Axes: B batch, U latents, H hidden channels.

Source: Shazeer 2020 (arXiv 2002.05202), equation 6; docs/reference.md#nac-ffn.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from m2mkd_jax.models.nac.fused.choice import LATENTS
from m2mkd_jax.models.nac.fused.programs import (
    Chunks,
    Rows,
    add,
    call,
    grid,
    like,
    mul,
    once,
    sums_like,
    walk,
    write_channels,
)


@once
def geglu(h: jax.Array, bias: jax.Array, modulation: jax.Array) -> jax.Array:
    """a * GELU(g) * modulation, [a, g] = h + bias.

    Args:
        h: (B, U, 2H).
        bias: (2H,).
        modulation: (U, H).

    Returns:
        (B, U, H).
    """
    b, u, width = h.shape
    hidden, (blocks, parts) = width // 2, grid(b, u)

    def geglu(*refs: Any) -> None:
        h, bias, m, x = refs
        rows = Rows(hidden, pl.program_id(0) * LATENTS)
        half = _Halves(rows, bias)
        factors = rows.read(m)

        def one(image: Any, sums: Any) -> Any:
            a, g = half.read(h, image)
            rows.write(x, mul(mul(a, [p * _normal_below(p)[0] for p in g]), factors), image)
            return sums

        walk(b // parts, one, 0)

    return call(geglu, "geglu", (blocks, parts), like(h, b, u, hidden), h, bias, modulation)


@once
def geglu_backward(
    h: jax.Array, bias: jax.Array, modulation: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Backward pass of `geglu`.

    Args:
        h, bias, modulation: as there.
        grad: of its result.

    Returns:
        Its result; gradients of h, bias and modulation.
    """
    b, u, width = h.shape
    hidden, (blocks, parts) = width // 2, grid(b, u)

    def geglu_backward(*refs: Any) -> None:
        h, bias, m, grad, x, of_h, of_m, of_a, of_g = refs
        rows = Rows(hidden, pl.program_id(0) * LATENTS)
        half = _Halves(rows, bias)
        factors = rows.read(m)

        def one(image: Any, sums: Any) -> Any:
            a, g = half.read(h, image)
            below, density = zip(*(_normal_below(p) for p in g), strict=True)
            gate = mul(g, list(below))
            value = mul(a, gate)
            of_x = rows.read(grad, image)
            rows.write(x, mul(value, factors), image)
            of_value = mul(of_x, factors)
            grad_a = mul(of_value, gate)
            slope = [p + q * r for p, q, r in zip(below, g, density, strict=True)]
            grad_g = mul(mul(of_value, a), slope)
            rows.write(of_h, grad_a, image)
            rows.write(of_h, grad_g, image, offset=hidden)
            added = (mul(of_x, value), grad_a, grad_g)
            return tuple(add(s, p) for s, p in zip(sums, added, strict=True))

        sums = walk(b // parts, one, (rows.zeros(),) * 3)
        rows.write(of_m, sums[0], pl.program_id(1))
        write_channels(of_a, rows, sums[1])
        write_channels(of_g, rows, sums[2])

    shapes = [like(h, b, u, hidden), like(h), sums_like(parts, u, hidden)]
    shapes += [sums_like(blocks, parts, hidden)] * 2
    x, of_h, of_m, of_a, of_g = call(
        geglu_backward, "geglu_backward", (blocks, parts), shapes, h, bias, modulation, grad
    )
    of_bias = jnp.concatenate([of_a.sum((0, 1)), of_g.sum((0, 1))])
    return x, of_h, of_bias, of_m.sum(0)


class _Halves:
    """The two halves of h + bias."""

    def __init__(self, rows: Rows, bias: Any):
        starts = (0, rows.channels)
        self.rows = rows
        self.biases = [
            [
                bias[pl.ds(start + part * rows.width, rows.width)].astype(jnp.float32)[None]
                for part in rows.chunks
            ]
            for start in starts
        ]

    def read(self, h: Any, image: Any) -> tuple[Chunks, Chunks]:
        first, second = self.biases
        return (
            add(self.rows.read(h, image), first),
            add(self.rows.read(h, image, offset=self.rows.channels), second),
        )


def _normal_below(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distribution and density of the standard normal: GELU is x times the first.

    Triton has no erf; this is Abramowitz and Stegun's formula 7.1.26, within 1.5e-7.
    """
    z = jnp.abs(x) * math.sqrt(0.5)
    falling = jnp.exp(-z * z)
    t = 1.0 / (1.0 + 0.3275911 * z)
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    series = jnp.zeros_like(t)
    for term in terms:
        series = (series + term) * t
    tail = 0.5 * series * falling
    return jnp.where(x < 0, tail, 1.0 - tail), falling / math.sqrt(2 * math.pi)
