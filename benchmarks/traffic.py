"""What a training step moves through a GPU's memory, compiled for a GPU that is not there.

    python -m benchmarks.traffic CASE [--batch=N] [--gpu=H100] [--json=OUT]

The step of a case of benchmarks/speed.py is traced and compiled as for that GPU, in bfloat16, fused
attention included. That needs jax's CUDA packages (pip install "jax[cuda12]") and no GPU; nothing
is computed, no weight has a value, and the loss is without the regulariser of a graph, which is
small. Kernels, their bytes and their FLOPs are counted as benchmarks/kernels.py says. The step
takes about

    sum over the kernels of max(bytes / bandwidth, FLOPs / matrix rate)

at a share of the card's nominal bandwidth (--share) and the matrix rate that benchmarks/speed.py
measures there (--rate, of 16-bit products; others count as half as fast). Launches, random numbers
and exponentials are not in it. The compiler times libraries' kernels on the GPU itself, which it
cannot do here: single kernels may differ there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Where there are CUDA packages and no GPU, looking for one takes time and prints warnings.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.cases import CASES, FUSED, make_config
from benchmarks.kernels import Kernel, Module
from m2mkd_jax.jobs.setup import abstract_stages, set_up
from m2mkd_jax.parallel import backend
from m2mkd_jax.parallel.mesh import AXES
from m2mkd_jax.phases.build import build_phase

# Facts of each card in the fields of XLA's GpuTargetConfigProto, and what it was measured to reach.
GPUS = {
    "H100": {
        "name": "NVIDIA H100 80GB HBM3",
        "compute_capability": (9, 0),
        "matrix_rate": 7.0e14,
        "limits": {
            "core_count": 132,
            "fpus_per_core": 128,
            "clock_rate_ghz": 1.98,
            "device_memory_size": 84942979072,
            "memory_bandwidth": 3352320000000,
            "l2_cache_size": 50 << 20,
            "registers_per_core_limit": 1 << 16,
            "registers_per_block_limit": 1 << 16,
            "shared_memory_per_core": 228 << 10,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_block_optin": 227 << 10,
            "threads_per_core_limit": 2048,
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
        },
    },
}
CUDNN = (9, 10, 0)


def target_config(gpu: str) -> str:
    """XLA's description of a GPU."""
    facts = GPUS[gpu]
    major, minor = facts["compute_capability"]
    limits = " ".join(f"{name}: {value}" for name, value in facts["limits"].items())
    cudnn = " ".join(f"{n}: {v}" for n, v in zip(("major", "minor", "patch"), CUDNN, strict=True))
    return (
        f"gpu_device_info {{ {limits} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {cudnn} }} '
        f'device_description_str: "{facts["name"]}"'
    )


def abstract_step(case: str, batch: int, fused: str) -> tuple[Callable, tuple]:
    """The training step of a case, and the shapes of its arguments."""
    chosen = CASES[case]
    config = make_config(chosen, batch or chosen.accelerator, fused=fused)
    config.precision = "bfloat16"
    phase = build_phase(config, chosen.job)
    setup = set_up(config, phase, abstract_stages(phase))
    images, size = phase.recipe.batch, phase.data.image_size
    data = {
        "image": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }
    return setup.make_step(), (setup.abstract_state, setup.abstract_frozen, data)


def _mesh(gpu: str) -> jax.sharding.AbstractMesh:
    """One device of a kind: by it kernels of our own are generated."""
    kind, cores = GPUS[gpu]["name"], GPUS[gpu]["limits"]["core_count"]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.AbstractMesh((1, 1), AXES, axis_types=types, abstract_device=device)


def compile_for(gpu: str, make: Callable[[], tuple[Any, tuple]]) -> Any:
    """A jitted function, compiled for a GPU that is not there.

    Args:
        gpu: of GPUS.
        make: -> the function, made by `backend.jit` or `jax.jit`, and shapes of its arguments.
    """
    topology = topologies.get_topology_desc(
        gpu, platform="cuda", target_config=target_config(gpu), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    capability = ".".join(map(str, GPUS[gpu]["compute_capability"]))
    with backend.tracing_for("gpu", capability):
        function, arguments = make()
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
        )
        with jax.sharding.use_abstract_mesh(_mesh(gpu)):
            lowered = function.lower(*arguments)
    return lowered.compile()


def seconds(kernel: Kernel, bandwidth: float, rate: float) -> tuple[float, float]:
    """What a kernel takes by its bytes and by its FLOPs."""
    half = kernel.dtype in ("bf16", "f16")
    return kernel.bytes / bandwidth, kernel.flops / (rate if half else rate / 2)


def merged(kernels: list[Kernel]) -> list[Kernel]:
    """Kernels that do the same in several places of a program, as one that runs so often."""
    by_work: dict[tuple, Kernel] = {}
    for kernel in kernels:
        work = (kernel.kind, kernel.op_name or kernel.name, kernel.shapes)
        known = by_work.get(work)
        if known is None:
            by_work[work] = dataclasses.replace(kernel)
            continue
        for field in ("times", "read", "written", "flops"):
            setattr(known, field, getattr(known, field) + getattr(kernel, field))
    return list(by_work.values())


def summary(kernels: list[Kernel], bandwidth: float, rate: float, largest: int) -> dict:
    """Totals, by kind of kernel, and the largest kernels.

    Args:
        kernels: of a step.
        bandwidth: bytes per second.
        rate: FLOPs per second of 16-bit matrix products.
        largest: how many.
    """
    times = [seconds(kernel, bandwidth, rate) for kernel in kernels]
    by_kind: Counter[str] = Counter()
    for kernel in kernels:
        by_kind[kernel.kind] += kernel.bytes
    ordered = sorted(merged(kernels), key=lambda kernel: -kernel.bytes)
    return {
        "read": sum(kernel.read for kernel in kernels),
        "written": sum(kernel.written for kernel in kernels),
        "flops": sum(kernel.flops for kernel in kernels),
        "launches": sum(kernel.times for kernel in kernels),
        "seconds": sum(max(pair) for pair in times),
        "seconds_of_memory": sum(moving for moving, _ in times),
        "seconds_of_products": sum(computing for _, computing in times),
        "by_kind": dict(by_kind.most_common()),
        "largest": [dataclasses.asdict(kernel) for kernel in ordered[:largest]],
    }


def lines(r: dict) -> Iterator[str]:
    """The lines that are printed."""
    yield (
        f"{r['case']}, batch {r['batch']}, {r['gpu']}: {(r['read'] + r['written']) / 1e9:.1f} GB "
        f"({r['read'] / 1e9:.1f} read), {r['flops'] / 1e12:.2f} TFLOP, {r['launches']:,} kernels "
        f"run, {r['temporary'] / 2**30:.2f} GiB planned for temporaries"
    )
    yield (
        f"at least {1e3 * r['seconds']:.1f} ms ({1e3 * r['seconds_of_memory']:.1f} ms memory, "
        f"{1e3 * r['seconds_of_products']:.1f} ms products) at {r['bandwidth'] / 1e12:.2f} TB/s "
        f"and {r['rate'] / 1e12:.0f} TFLOP/s; compiled in {r['compile_seconds']:.0f} s"
    )
    for kind, count in r["by_kind"].items():
        yield f"{count / 1e9:8.2f} GB  {kind}"
    for k in r["largest"]:
        yield (
            f"{(k['read'] + k['written']) / 1e9:6.2f} GB ({k['read'] / 1e9:.2f} read), {k['times']}"
            f" times, {k['kind']}, {k['name']}: {k['op_name']} [{', '.join(k['sources'][:4])}]"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=[n for n, case in CASES.items() if not case.predict])
    parser.add_argument("--batch", type=int, default=0, help="images per step")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--share", type=float, default=0.9, help="of the bandwidth that is reached")
    parser.add_argument("--rate", type=float, default=0.0, help="FLOP/s of 16-bit products")
    parser.add_argument("--largest", type=int, default=10, help="kernels that are shown")
    parser.add_argument("--fused", choices=FUSED, default="auto", help="config.nac.fused")
    parser.add_argument("--hlo", type=Path, help="file for the compiled program")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    began = time.perf_counter()
    make = functools.partial(abstract_step, options.case, options.batch, options.fused)
    compiled = compile_for(options.gpu, make)
    taken = time.perf_counter() - began
    text, facts = compiled.as_text(), GPUS[options.gpu]
    bandwidth = options.share * facts["limits"]["memory_bandwidth"]
    rate = options.rate or facts["matrix_rate"]
    if options.hlo:
        options.hlo.write_text(text)
    result = {
        "case": options.case,
        "gpu": options.gpu,
        "batch": options.batch or CASES[options.case].accelerator,
        "jax": jax.__version__,
        "bandwidth": bandwidth,
        "rate": rate,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": taken,
        **summary(Module(text).kernels(), bandwidth, rate, options.largest),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
