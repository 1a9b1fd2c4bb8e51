"""Attention as written out for XLA, and as a GPU gets it from cuDNN: forward and backward.

    python -m benchmarks.attention [--rounds=7] [--steps=10] [--dtype=bfloat16]

Between latents under a sampled kernel (models/nac/attention.py), the sampling included, at the
published NACs' shapes, and among the tokens of the published vision transformers
(models/attention.py); timed in turn in one process. Without cuDNN both are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp

from m2mkd_jax.models import attention
from m2mkd_jax.models.nac import kernels
from m2mkd_jax.models.nac.attention import attend

# images, receivers, senders, heads, channels of a head, whether there is a kernel
SHAPES = {
    "nac_tinyimnet": (128, 256, 320, 6, 64, True),
    "nac_imnet": (32, 768, 960, 8, 64, True),
    "vmoe_base, ViT-B": (64, 197, 197, 12, 64, False),
    "ViT-H": (32, 257, 257, 16, 80, False),
}
TRUNCATION, TEMPERATURE = 0.9, 0.5


def under_kernel(q, k, v, distance, bandwidth, key):
    log = kernels.log_kernel(distance, bandwidth, TRUNCATION)
    uniform = jax.random.uniform(key, (q.shape[0], *distance.shape))
    return attend(q, k, v, kernels.sample(log, uniform, TEMPERATURE))


def gradient(function, arguments, written_out: bool):
    """A compiled program that gives the gradients of all floating-point arguments."""

    def loss(*arguments):
        return jnp.square(function(*arguments).astype(jnp.float32)).sum()

    numbers = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]
    program = jax.jit(jax.grad(loss, argnums=numbers))
    if not written_out:
        return program.lower(*arguments).compile()
    with mock.patch.object(attention, "fits_cudnn", lambda q, k: False):
        return program.lower(*arguments).compile()


def distance_of(a, b) -> float:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args()
    for name, (images, u, v, heads, channels, with_kernel) in SHAPES.items():
        keys = jax.random.split(jax.random.key(0), 4)
        arguments = [
            jax.random.normal(key, (images, count, heads, channels), options.dtype)
            for key, count in zip(keys, (u, v, v), strict=False)
        ]
        if with_kernel:
            signatures = jax.random.normal(keys[3], (v, 64))
            distance = kernels.distance(signatures[:u], signatures)
            arguments += [distance, jnp.float32(1.0), jax.random.key(1)]
        function = under_kernel if with_kernel else attention.self_attention
        programs = [gradient(function, arguments, out) for out in (True, False)]
        results = [jax.block_until_ready(program(*arguments)) for program in programs]
        seconds: list[list[float]] = [[], []]
        for _ in range(options.rounds):
            for program, taken in zip(programs, seconds, strict=True):
                began = time.perf_counter()
                for _ in range(options.steps):
                    result = program(*arguments)
                jax.block_until_ready(result)
                taken.append((time.perf_counter() - began) / options.steps)
        line = f"{name} {(images, u, v, heads, channels)}, {options.dtype}:"
        for way, taken, program in zip(("written out", "ours"), seconds, programs, strict=True):
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            line += f" {way} {1e3 * statistics.median(taken):.2f} ms, {memory:,.0f} MiB;"
        ratios = [a / b for a, b in zip(*seconds, strict=True)]
        print(
            f"{line} {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); gradients apart by {max(map(distance_of, *results)):.1e} of "
            "their norm",
            flush=True,
        )


if __name__ == "__main__":
    main()
