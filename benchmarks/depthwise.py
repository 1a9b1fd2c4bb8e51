"""Ways to compute a depthwise convolution (m2mkd_jax/models/depthwise.py), forward and backward.

python -m benchmarks.depthwise [--repeats=5] [--shape=B,H,W,C] [--dtype=bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from m2mkd_jax.models import depthwise

SHAPES = ((64, 8, 8, 16), (64, 4, 4, 32), (128, 16, 16, 96), (16, 56, 56, 128))
METHODS = ("native", "positions", "shifts")
SIZE = 7
BAND_LIMIT = 2**31  # bytes of the matrix that 'positions' builds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", help="B,H,W,C; several by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    shapes = [tuple(map(int, options.shape.split(",")))] if options.shape else SHAPES
    print(f"{'B, H, W, C':18s}" + "".join(f"{method:>22s}" for method in METHODS))
    for shape in shapes:
        x = jax.random.normal(jax.random.key(0), shape, options.dtype)
        kernel = jax.random.normal(jax.random.key(1), (SIZE, SIZE, shape[-1]), options.dtype)
        _, h, w, c = shape
        programs = {}
        for method in METHODS:
            if method == "positions" and 4 * (h * w) ** 2 * c > BAND_LIMIT:
                continue

            def loss(x, kernel, method=method):
                return jnp.square(depthwise.depthwise_conv(x, kernel, method)).sum()

            programs[method] = jax.jit(jax.grad(loss, argnums=(0, 1)))
            jax.block_until_ready(programs[method](x, kernel))
        seconds = {method: [] for method in programs}
        for _ in range(options.repeats):
            for method, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(x, kernel))
                seconds[method].append(time.perf_counter() - start)
        line = f"{shape!s:18s}"
        for method in METHODS:
            if method not in seconds:
                line += f"{'too large':>22s}"
                continue
            median = statistics.median(seconds[method])
            # Of runs taken in turn: the machine's other load falls on both.
            ratio = statistics.median(
                a / b for a, b in zip(seconds["native"], seconds[method], strict=True)
            )
            line += f"{1e3 * median:11.1f} ms {ratio:6.1f}x"
        print(line, flush=True)


if __name__ == "__main__":
    main()
