"""What a training step costs on this device: seconds, images/s, share of its matrix rate, memory.

    python -m benchmarks.speed CASE [--batch=N] [--steps=20] [--rounds=5] [--json=OUT]

A case is a job of one of the configs at a batch that one device holds (--batch: another one), in
the precision that the config gives the device. Random images lie on the device already: what
decoding takes is benchmarks/input.py's. FLOPs are those of the matrix products and convolutions of
forward and backward, counted in the traced program (evaluate/flops.py), what is recomputed counted
too. The matrix rate is measured in the same run: a square product in the compute type, timed just
before and after the steps, the better of the two.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from m2mkd_jax.evaluate.flops import count_flops
from m2mkd_jax.jobs.setup import fresh_setup
from m2mkd_jax.train.step import with_fixed

# name: config, its argument, job, images per step
CASES = {
    "nac_digits": ("nac_digits", "", "e2e_scratch", 50),
    "nac_tinyimnet": ("nac_tinyimnet", "", "e2e_scratch", 128),
    "nac_imnet": ("nac_imnet", "", "e2e_scratch", 32),
    "nac_imnet_m2mkd": ("nac_imnet", "", "m2mkd/1", 64),
    "vmoe_digits": ("vmoe_digits", "", "e2e_scratch", 48),
    "vmoe_imnet": ("vmoe_imnet", "base", "e2e_scratch", 64),
    "vmoe_imnet_m2mkd": ("vmoe_imnet", "base", "m2mkd/1", 64),
}


def matrix_rate(dtype: jnp.dtype) -> float:
    """FLOP/s of a square matrix product on this device, the best of ten."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        jax.block_until_ready(product(a, b))
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])


def peak_bytes(compiled) -> tuple[int, str]:
    """Most memory in use so far, as the device tells; a CPU tells none: XLA's plan for the step."""
    told = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        return told["peak_bytes_in_use"], "peak on the device"
    plan = compiled.memory_analysis()
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes, "planned by XLA"


def measure(case: str, batch: int, steps: int, rounds: int) -> dict:
    """All numbers of one case."""
    name, argument, job, images = CASES[case]
    get_config = importlib.import_module(f"configs.{name}").get_config
    config = get_config(*[argument] if argument else [])
    recipe = config.recipes[job.split("/")[0].partition("_")[0]]
    recipe.batch, recipe.accumulate = batch or images, 1
    setup = fresh_setup(config, job)
    phase, program, step, frozen = setup.phase, setup.program, setup.make_step(), setup.frozen
    state = setup.initial_state()
    images, size = recipe.batch, phase.data.image_size
    keys = jax.random.split(jax.random.key(1))
    data = {
        "image": jax.random.randint(keys[0], (images, size, size, 3), 0, 256, jnp.uint8),
        "label": jax.random.randint(keys[1], (images,), 0, phase.data.classes),
    }

    def of_batch(params, frozen, pixels):
        target = jnp.zeros((images, phase.data.classes))
        whole = with_fixed(frozen, state["fixed"])
        return program.loss(params, whole, {"image": pixels, "target": target}, jax.random.key(0))

    pixels = jax.ShapeDtypeStruct((images, size, size, 3), jnp.float32)
    gradient = jax.value_and_grad(of_batch, has_aux=True)
    flops = count_flops(gradient, state["params"], frozen, pixels)
    began = time.perf_counter()
    compiled = step.lower(state, frozen, data).compile()
    compile_seconds = time.perf_counter() - began
    before = matrix_rate(program.dtype)
    seconds = []
    for i in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, frozen, data)
        jax.block_until_ready((state, metrics))
        if i:
            seconds.append((time.perf_counter() - began) / steps)
    memory, how = peak_bytes(compiled)
    rate = max(before, matrix_rate(program.dtype))
    each = statistics.median(seconds)
    return {
        "case": case,
        "job": job,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(jnp.dtype(program.dtype)),
        "batch": images,
        "seconds_per_step": each,
        "fastest_and_slowest_round": [min(seconds), max(seconds)],
        "images_per_second": images / each,
        "flops_per_step": flops,
        "matrix_rate": rate,
        "share_of_matrix_rate": flops / each / rate,
        "memory_bytes": memory,
        "memory_is": how,
        "compile_seconds": compile_seconds,
        "loss": float(metrics["loss"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--batch", type=int, default=0, help="images per step")
    parser.add_argument("--steps", type=int, default=20, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    r = measure(options.case, options.batch, options.steps, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(r, indent=1) + "\n")
    low, high = r["fastest_and_slowest_round"]
    print(
        f"{r['case']} ({r['job']}, batch {r['batch']}, {r['dtype']}, {r['device']}): "
        f"{1e3 * r['seconds_per_step']:.1f} ms per step ({1e3 * low:.1f} to {1e3 * high:.1f}), "
        f"{r['images_per_second']:,.0f} images/s, {r['flops_per_step'] / 1e9:,.0f} GFLOP, "
        f"{100 * r['share_of_matrix_rate']:.1f}% of {r['matrix_rate'] / 1e12:.2f} TFLOP/s, "
        f"{r['memory_bytes'] / 2**30:.2f} GiB {r['memory_is']}, compiled in "
        f"{r['compile_seconds']:.1f} s, loss {r['loss']:.3f}"
    )


if __name__ == "__main__":
    main()
