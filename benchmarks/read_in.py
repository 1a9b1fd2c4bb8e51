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
FORMS = {"literal": literal.read_in, "rewritten": ReadInAttention.__call__}


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


def input_shapes(batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Receivers, codes and tokens of a batch at the ImageNet size."""
    sizes = (
        (batch, SPEC.input_latents, SPEC.state_dim),
        (SPEC.input_latents, SPEC.code_dim),
        (batch, SPEC.grid**2, SPEC.token_dim),
    )
    return tuple(jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes)


def count(parts: chain.SplitStage, batch: int) -> dict[str, float]:
    """Prints XLA's counts of both forms. Returns literal / rewritten by what was counted."""
    flops, memory = {}, {}
    for name, attend in FORMS.items():
        program = compiled(attend, parts, input_shapes(batch))
        flops[name] = program.cost_analysis()["flops"]
        memory[name] = program.memory_analysis().temp_size_in_bytes
        print(
            f"{name:10s} batch {batch}: {flops[name] / 1e9:9.2f} GFLOP  "
            f"{memory[name] / 2**20:8.1f} MiB temporary"
        )
    ratios = {
        kind: n["literal"] / n["rewritten"] for kind, n in (("FLOPs", flops), ("memory", memory))
    }
    both = compiled(shared, parts, input_shapes(batch)).cost_analysis()["flops"]
    print(f"literal / rewritten: FLOPs {ratios['FLOPs']:.1f}, memory {ratios['memory']:.1f}")
    alone = (flops["literal"] - both) / (flops["rewritten"] - both)
    print(f"literal / rewritten without what they share: FLOPs {alone:.1f}")
    return ratios


def time_forms(parts: chain.SplitStage, batch: int, repeats: int) -> None:
    """Prints seconds of both forms, run in turn; not where memory is short."""
    free = available_bytes()
    if free is not None and free < batch * BYTES_NEEDED:
        print(
            f"not timed: {free / 2**30:.1f} GiB free, {batch} x "
            f"{BYTES_NEEDED / 2**30:.0f} GiB needed"
        )
        return
    args = random_like((parts.params, input_shapes(batch)), jax.random.key(0))
    programs = {
        name: compiled(attend, parts, input_shapes(batch)) for name, attend in FORMS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    pairs = [a / b for a, b in zip(*seconds.values(), strict=True)]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"batch {batch}: literal {medians['literal']:.3f} s, rewritten "
        f"{medians['rewritten']:.4f} s, ratio {statistics.median(pairs):.1f} "
        f"({min(pairs):.1f} to {max(pairs):.1f})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images, for XLA's counts")
    parser.add_argument("--timed_batch", type=int, default=1, help="images; 0: no timing")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    parts = chain.abstract(lambda rngs: ReadInAttention(SPEC, rngs=rngs))
    ratios = count(parts, options.batch)
    if options.timed_batch:
        time_forms(parts, options.timed_batch, options.repeats)
    if min(ratios.values()) < LEAST:
        print(f"less than {LEAST} times", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
