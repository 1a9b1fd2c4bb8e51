"""What a training step costs each device as devices grow, from compiled programs alone.

    python -m benchmarks.scale [--devices=8,64,256] [--case=NAME] [--group=8] [--no_fsdp]

Every case is compiled ahead of time for simulated CPU devices, in a process of its own per number
of devices; no weight is ever allocated. The mesh is (devices / group) x group ('data' x 'expert'),
large parameters are cut over 'data' too (FSDP), experts are served by capacity, activations are
recomputed, all in float32, with a constant number of images per device. Per device and step:

    state       parameters trained and frozen, and optimizer state, as the shardings say
    temporary   XLA's count (memory_analysis) of the rest: gradients, activations, gathered weights
    FLOPs       matrix products of forward and backward, counted in the traced program
                (evaluate/flops.py), shared out equally: XLA counts the body of a loop once
    traffic     bytes sent per kind of collective, from the compiled program: those in a loop as
                often as it runs; an all-gather or all-to-all among g devices sends (g - 1) / g of
                the result, an all-reduce twice that (as a ring does)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp

from configs import vmoe_imnet
from m2mkd_jax.evaluate.flops import count_flops
from m2mkd_jax.jobs.setup import abstract_stages, set_up
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.mesh import batch_sharding, make_mesh
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.train.step import with_fixed

CASES = {
    "vmoe_base m2mkd/1": ("base", 8, "m2mkd/1"),
    "vmoe_base e2e": ("base", 8, "e2e_scratch"),
    "vmoe_large, 64 experts, m2mkd/1": ("large", 64, "m2mkd/1"),
    "vmoe_large, 64 experts, e2e": ("large", 64, "e2e_scratch"),
}
COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation of an HLO module, and which of them is the entry."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            name = start[2]
            entry = name if start[1] else entry
            found[name] = []
        elif name:
            found[name].append(line)
    return found, entry


def group_size(groups: str) -> int:
    """Devices of a group, from {{0,1},...}, [groups,members]<=... or mesh['a'=2,...] {'a',...}."""
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.split("]")[0]))
        axes = re.search(r" \{(.*?)\}", groups)[1]
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
    if groups.startswith("{"):
        return groups[: groups.index("}")].count(",") + 1
    return int(re.match(r"\[\d+,(\d+)\]", groups)[1])


def sent_bytes(kind: str, result: str, line: str) -> int:
    """Bytes that a device sends in one collective, given the text of its result's type."""
    size = sum(
        BYTES[dtype] * math.prod(map(int, filter(None, sizes.split(","))))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
    )
    if kind == "collective-permute":
        return size
    members = group_size(line.split("replica_groups=")[1])
    if kind == "reduce-scatter":
        return size * (members - 1)
    return size * (members - 1) * (2 if kind == "all-reduce" else 1) // members


def traffic(text: str) -> Counter:
    """Bytes sent per device and run of a compiled program, by kind of collective."""
    bodies, entry = computations(text)
    known: dict[str, Counter] = {}

    def total(name: str) -> Counter:
        if name in known:
            return known[name]
        found: Counter = Counter()
        for line in bodies[name]:
            made = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})\(", line)
            if made:
                found[made[2]] += sent_bytes(made[2], made[1], line)
            counted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            times = int(counted[1]) if counted else 1
            for inner in re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", line):
                if total(inner) and " while(" in line and not counted:
                    raise ValueError(f"a loop with collectives runs unknown times: {line[:200]}")
                for kind, count in total(inner).items():
                    found[kind] += times * count
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for inner in branches.replace("%", "").split(", "):
                    found += total(inner)
        known[name] = found
        return found

    return total(entry)


def measure(case: str, images: int, group: int, fsdp: bool) -> dict:
    """Compiles one case for all devices of this process.

    Args:
        case: of CASES.
        images: per device.
        group: devices that share the experts.
        fsdp: cut large parameters over the data axis.

    Returns:
        Bytes, FLOPs and seconds by name, as the table shows them.
    """
    variant, experts, job = CASES[case]
    config = vmoe_imnet.get_config(variant)
    config.vmoe.experts, config.vmoe.dispatch = experts, "capacity"
    config.teacher.remat, config.mesh.fsdp, config.precision = "always", fsdp, "float32"
    mesh = make_mesh(expert=group)
    phase = build_phase(config, job)
    setup = set_up(config, phase, abstract_stages(phase), mesh=mesh)
    state, frozen = setup.abstract_state, setup.abstract_frozen
    total, size = images * mesh.size, phase.data.image_size
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, shape, dtype in (
            ("image", (total, size, size, 3), jnp.uint8),
            ("label", (total,), jnp.int32),
        )
    }
    step, loss = setup.make_step(), setup.on_mesh(setup.program.loss)
    began = time.monotonic()
    compiled = step.lower(state, frozen, batch).compile()
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()

    def of_batch(params, frozen, images):
        batch = {"image": images, "target": jnp.zeros((total, phase.data.classes))}
        return loss(params, with_fixed(frozen, setup.fixed), batch, jax.random.key(0))[0]

    normalised = jax.ShapeDtypeStruct((total, size, size, 3), jnp.float32)
    flops = count_flops(jax.value_and_grad(of_batch), state["params"], frozen, normalised)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen))
    return {
        "case": case,
        "devices": mesh.size,
        "parameters": chain.count_parameters(setup.params),
        "state": partition.bytes_per_device((state, frozen), shardings),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        # Nothing is left over if every buffer of the old state is reused.
        "new": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops": flops // mesh.size,
        "traffic": dict(traffic(compiled.as_text())),
        "compile_seconds": round(seconds, 1),
    }


def compile_apart(case: str, devices: int, arguments) -> dict:
    """`measure` in a process that has so many devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # The code of single operations does not matter; the partitioning does.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--measure",
        f"--case={case}",
        f"--images={arguments.images}",
        f"--group={arguments.group}",
    ]
    command += ["--no_fsdp"] if arguments.no_fsdp else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict]):
    """The lines of a Markdown table."""
    yield (
        "| case | devices | state | temporary | GFLOP | "
        + " | ".join(COLLECTIVES)
        + " | compiled in |"
    )
    yield "|" + "---|" * (6 + len(COLLECTIVES))
    for r in results:
        cells = [r["case"], str(r["devices"])]
        cells += [f"{r[key] / 2**20:,.0f} MiB" for key in ("state", "temporary")]
        cells += [f"{r['flops'] / 1e9:,.0f}"]
        cells += [f"{r['traffic'].get(kind, 0) / 2**20:,.1f} MiB" for kind in COLLECTIVES]
        yield "| " + " | ".join([*cells, f"{r['compile_seconds']:.0f} s"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="8,64,256")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--images", type=int, default=8, help="per device")
    parser.add_argument("--group", type=int, default=8, help="devices that share the experts")
    parser.add_argument("--no_fsdp", action="store_true")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        options = (arguments.images, arguments.group, not arguments.no_fsdp)
        print(json.dumps(measure(arguments.case, *options)))
        return
    wanted = [
        (case, int(devices))
        for case in ([arguments.case] if arguments.case else CASES)
        for devices in arguments.devices.split(",")
    ]
    for case, devices in wanted:
        if devices % arguments.group or CASES[case][1] % arguments.group:
            parser.error(
                f"--group={arguments.group} must divide the {devices} devices and the "
                f"{CASES[case][1]} experts of {case!r}"
            )
    results = []
    for case, devices in wanted:
        results.append(compile_apart(case, devices, arguments))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
