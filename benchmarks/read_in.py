"""The read-in attention as published against its rewriting (m2mkd_jax/models/nac/read_in.py).

    python -m benchmarks.read_in [--batch=8] [--timed_batch=1] [--repeats=3]

Forward and backward at the ImageNet shape: XLA's count of FLOPs and temporary memory of both, and
wall-clock times taken in turn. Exit code 1 unless both counts are smaller by LEAST or more.

Query, exit layer and modulations are the same in both forms; the modulations cost the same for any
batch. The second line of ratios leaves these out: it is about keys, values and attention alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.read_in import ReadInAttention
from m2mkd_jax.models.nac.spec import NACSpec
from tests import literal

LEAST = 50
SPEC = NACSpec(224, 1000, 512, 512, 8, 192, 768, 64, ffn_capacity=1.0)
BYTES_NEEDED = 3 * 2**30  # of the literal form, per image and with room to spare


def compiled(attend, parts, shapes):
    def loss(params, inputs):
        out = attend(chain.merge(parts.graph, params, {}), *inputs)
        return jnp.square(out).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(parts.params, shapes).compile()


def shared(attention, receivers, codes, tokens):
    """What both forms compute alike: norms, query, exit layer, modulations of key and value."""
    message = attention.query(attention.receiver_norm(receivers), codes)
    scales = attention.key.modulation(codes).sum() + attention.value.modulation(codes).sum()
    return attention.exit(message, codes) * scales + attention.sender_norm(tokens).sum()


def available_bytes() -> int | None:
    """Free memory of the host, or None where it cannot be known (or is not the one that counts)."""
    if jax.default_backend() != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024


def random_like(shapes, key):
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, leaf: 0.1 * jax.random.normal(k, leaf.shape)
    return tree.unflatten([draw(k, leaf) for k, leaf in zip(keys, leaves, strict=True)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images, for XLA's counts")
    parser.add_argument("--timed_batch", type=int, default=1, help="images; 0: no timing")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    parts = chain.abstract(lambda rngs: ReadInAttention(SPEC, rngs=rngs))

    def shapes(batch):
        sizes = (
            (batch, SPEC.input_latents, SPEC.state_dim),
            (SPEC.input_latents, SPEC.code_dim),
            (batch, SPEC.grid**2, SPEC.token_dim),
        )
        return tuple(jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes)

    forms = {"literal": literal.read_in, "rewritten": ReadInAttention.__call__}
    flops, memory = {}, {}
    for name, attend in forms.items():
        program = compiled(attend, parts, shapes(options.batch))
        flops[name] = program.cost_analysis()["flops"]
        memory[name] = program.memory_analysis().temp_size_in_bytes
        print(
            f"{name:10s} batch {options.batch}: {flops[name] / 1e9:9.2f} GFLOP  "
            f"{memory[name] / 2**20:8.1f} MiB temporary"
        )
    ratios = {
        kind: n["literal"] / n["rewritten"] for kind, n in (("FLOPs", flops), ("memory", memory))
    }
    both = compiled(shared, parts, shapes(options.batch)).cost_analysis()["flops"]
    print(f"literal / rewritten: FLOPs {ratios['FLOPs']:.1f}, memory {ratios['memory']:.1f}")
    alone = (flops["literal"] - both) / (flops["rewritten"] - both)
    print(f"literal / rewritten without what they share: FLOPs {alone:.1f}")

    free = available_bytes()
    if options.timed_batch and free is not None and free < options.timed_batch * BYTES_NEEDED:
        print(
            f"not timed: {free / 2**30:.1f} GiB free, {options.timed_batch} x "
            f"{BYTES_NEEDED / 2**30:.0f} GiB needed"
        )
    elif options.timed_batch:
        key = jax.random.key(0)
        args = random_like((parts.params, shapes(options.timed_batch)), key)
        programs = {
            name: compiled(attend, parts, shapes(options.timed_batch))
            for name, attend in forms.items()
        }
        seconds = {name: [] for name in forms}
        for repeat in range(options.repeats + 1):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*args))
                if repeat:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
        pairs = [a / b for a, b in zip(*seconds.values(), strict=True)]
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        print(
            f"batch {options.timed_batch}: literal {medians['literal']:.3f} s, rewritten "
            f"{medians['rewritten']:.4f} s, ratio {statistics.median(pairs):.1f} "
            f"({min(pairs):.1f} to {max(pairs):.1f})"
        )
    if min(ratios.values()) < LEAST:
        print(f"less than {LEAST} times", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
