"""How fast this device multiplies matrices, to judge what a program makes of it."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

SIDES = {"cpu": 1024}  # by platform
SIDE = 4096  # large enough for full speed, and small beside what a training step holds


def measure_matrix_rate(dtype: Any, side: int, repetitions: int) -> float:
    """FLOP/s of a square matrix product on the first device, the best of some repetitions."""
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        jax.block_until_ready(product(a, b))
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])  # the first one compiles


@functools.cache
def matrix_rate(dtype: Any) -> float:
    """The FLOP/s of this device, measured once."""
    return measure_matrix_rate(dtype, SIDES.get(jax.default_backend(), SIDE), repetitions=5)
