"""What a training step moves through a GPU's memory, compiled for a GPU that is not there.

    python -m benchmarks.traffic CASE [--batch=N] [--gpu=H100] [--json=OUT]

The step of a case of benchmarks/speed.py is traced and compiled as for that GPU, in bfloat16; needed
are jax's CUDA packages (pip install "jax[cuda12]"), no GPU. Nothing is computed and no weight has a
value, hence the loss is without the regulariser of a graph, which is small. Every kernel's bytes
and FLOPs are counted as benchmarks/kernels.py says. The step's time is at least

    sum over the kernels of max(bytes / bandwidth, FLOPs / matrix rate)

with the card's bandwidth and the share of it that large kernels reach, and the matrix rate that
benchmarks/speed.py measures. Libraries' kernels are not timed against each other, as they are on the
GPU itself, so that single kernels may differ.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.kernels import Kernel, Module
from benchmarks.speed import CASES
from m2mkd_jax.jobs.setup import abstract_stages, set_up
from m2mkd_jax.models import backend
from m2mkd_jax.phases.build import build_phase

# Facts of each card in the fields of XLA's GpuTargetConfigProto, and what it was measured to reach.
GPUS = {
    "H100": {
        "name": "NVIDIA H100 80GB HBM3",
        "compute_capability": (9, 0),
        "bandwidth": 3.35e12,
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


def compile_step(case: str, batch: int, gpu: str, options: dict):
    """The compiled training step of a case, for a GPU that is not there."""
    name, argument, job, images = CASES[case]
    get_config = importlib.import_module(f"configs.{name}").get_config
    config = get_config(*[argument] if argument else [])
    recipe = config.recipes[job.split("/")[0].partition("_")[0]]
    recipe.batch, recipe.accumulate = batch or images, 1
    config.precision = "bfloat16"
    phase = build_phase(config, job)
    setup = set_up(config, phase, abstract_stages(phase))
    images, size = recipe.batch, phase.data.image_size
    data = {
        "image": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }
    topology = topologies.get_topology_desc(
        gpu, platform="cuda", target_config=target_config(gpu), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        (setup.abstract_state, setup.abstract_frozen, data),
    )
    capability = ".".join(map(str, GPUS[gpu]["compute_capability"]))
    with backend.tracing_for("gpu", capability):
        lowered = setup.make_step().lower(*arguments)
    return lowered.compile(compiler_options=options)
