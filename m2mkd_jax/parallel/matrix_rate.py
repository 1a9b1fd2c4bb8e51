"""How fast this device multiplies matrices, to judge what a program makes of it."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

SIDES = {"cpu": 1024}  # by platform
SIDE = 4096  # large enough for full speed, and small beside what a training step holds
REPETITIONS = 5


@functools.cache
def matrix_rate(dtype: Any) -> float:
    """FLOP/s of a square matrix product on the first device, the best of a few; measured once."""
    side = SIDES.get(jax.default_backend(), SIDE)
    ones = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(REPETITIONS + 1):  # the first one compiles
        began = time.perf_counter()
        jax.block_until_ready(product(ones, ones))
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)
