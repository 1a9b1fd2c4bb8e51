"""Ways to compute a layer of experts (m2mkd_jax/models/moe/grouped.py), forward and backward.

    python -m benchmarks.dispatch [--rounds=5] [--shape=IMAGES,T,E,D] [--dtype=bfloat16]
                                       [--even]

Rows are sorted by expert already and unevenly many, as a fresh router deals them, or with --even
nearly equally many, as one that is trained to balance them does. 'ragged' is XLA's
ragged_dot, 'chunks' ours for a CPU, 'batched' ours for a GPU, 'loop' every expert on every row,
masked: what a program without any dispatch would do.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.models.moe import experts
from m2mkd_jax.models.moe.grouped import METHODS, grouped_linear

# images, tokens of an image, experts, width; two choices per token
SHAPES = ((64, 17, 4, 48), (64, 17, 8, 64), (16, 65, 8, 192), (8, 197, 8, 768), (8, 197, 64, 384))
CHOICES = 2
# Against the loop, of the largest number; float32 products on a GPU are rounded to tf32.
LARGEST_ERROR = {"float32": 1e-4 if jax.default_backend() == "cpu" else 1e-2, "bfloat16": 5e-2}


def sizes_of(rows: int, count: int, spread: float) -> np.ndarray:
    """Rows per expert: shares between 1 - spread and 1 + spread of the even one."""
    shares = np.random.default_rng(0).uniform(1.0 - spread, 1.0 + spread, count)
    ends = np.rint(np.cumsum(shares) / shares.sum() * rows).astype(np.int32)
    return np.diff(ends, prepend=0)


def by_method(weights, rows, sizes, method: str):
    def linear(rows, layer):
        return grouped_linear(rows, layer["kernel"], layer["bias"], sizes, method)

    return experts.mlp(weights, rows, linear)


def by_loop(weights, rows, sizes):
    """The experts one after the other on all rows."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(len(rows))[:, None]

    def add(total, expert):
        own, start, end = expert

        def linear(rows, layer):
            return rows @ layer["kernel"] + layer["bias"]

        inside = (row >= start) & (row < end)
        return total + jnp.where(inside, experts.mlp(own, rows, linear), 0), None

    return jax.lax.scan(add, jnp.zeros_like(rows), (weights, ends - sizes, ends))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", help="images, tokens, experts, width; several by default")
    parser.add_argument("--dtype", default="float32", choices=LARGEST_ERROR)
    parser.add_argument("--even", action="store_true", help="nearly equal numbers of rows")
    options = parser.parse_args()
    shapes = [tuple(map(int, options.shape.split(",")))] if options.shape else SHAPES
    ways = {m: functools.partial(by_method, method=m) for m in METHODS} | {"loop": by_loop}
    print(f"{'images, T, E, D':20s}" + "".join(f"{way:>22s}" for way in ways))
    for shape in shapes:
        images, tokens, count, width = shape
        count_rows = images * tokens * CHOICES
        keys = jax.random.split(jax.random.key(0), 5)
        weights = {
            name: {
                "kernel": jax.random.normal(key, (count, c, d), options.dtype) * c**-0.5,
                "bias": jnp.zeros((count, d), options.dtype),
            }
            for name, key, c, d in (
                ("fc1", keys[0], width, 4 * width),
                ("fc2", keys[1], 4 * width, width),
            )
        }
        rows = jax.random.normal(keys[2], (count_rows, width), options.dtype)
        sizes = jnp.asarray(sizes_of(count_rows, count, 0.1 if options.even else 0.5))
        programs, results = {}, {}
        for name, way in ways.items():

            def loss(weights, rows, way=way, sizes=sizes):
                return jnp.square(way(weights, rows, sizes)).sum()

            programs[name] = jax.jit(jax.grad(loss, argnums=(0, 1)))
            results[name] = jax.block_until_ready(programs[name](weights, rows))
        for name, result in results.items():
            for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(results["loop"]), strict=True):
                error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
                assert error < LARGEST_ERROR[options.dtype], (name, error)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(options.rounds):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(weights, rows))
                seconds[name].append(time.perf_counter() - start)
        line = f"{shape!s:20s}"
        for name in programs:
            median = statistics.median(seconds[name])
            # Of runs taken in turn: the machine's other load falls on both.
            ratio = statistics.median(
                a / b for a, b in zip(seconds["ragged"], seconds[name], strict=True)
            )
            line += f"{1e3 * median:11.1f} ms {ratio:6.1f}x"
        print(line, flush=True)


if __name__ == "__main__":
    main()
