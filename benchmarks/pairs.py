"""All pairs m2mkd/i in one program against each by itself: seconds with data, and FLOPs.

    python -m benchmarks.pairs CONFIG[:ARGUMENT] [--steps=10] [--rounds=3] [--batch=N] [--images=N]
        [--kept] [--flops]

Networks are fresh. All ways read the same images and are timed in turn, in one process; every pair
by itself does as many steps as all of them together. --kept times steps on kept targets too
(config.distillation.views), and how long a step's targets take to compute; these are computed once
a view. --flops counts the matrix products of the traced programs at the config's batch and compiles
nothing: for networks of full size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m2mkd_jax.config.files import find_config, read_config
from m2mkd_jax.data.pipeline import train_batches
from m2mkd_jax.evaluate.flops import count_flops
from m2mkd_jax.jobs.joint import JointSetup, joint_setup
from m2mkd_jax.jobs.kept_targets import keep_targets
from m2mkd_jax.jobs.run import Run, image_source
from m2mkd_jax.jobs.setup import abstract_stages
from m2mkd_jax.parallel.huge_pages import start_again
from m2mkd_jax.parallel.mesh import make_mesh, put_batch
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.families import students
from m2mkd_jax.phases.initial_weights import fresh_stage
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.train.step import with_fixed


def phases_of(config: ConfigDict) -> dict[str, Phase]:
    """The pairs' phases, by job."""
    jobs = [f"m2mkd/{i}" for i in range(students(config).modules)]
    return {job: build_phase(config, job) for job in jobs}


def flops(setup: JointSetup, batch: int) -> int:
    """FLOPs of a step's loss and gradients, on kept targets where the setup is for them."""
    data = next(iter(setup.setups.values())).phase.data
    params = {job: own.params for job, own in setup.setups.items()}
    frozen = setup.frozen
    for own in setup.setups.values():
        frozen = with_fixed(frozen, own.fixed)

    def loss(params: dict, frozen: dict, inputs: dict) -> tuple[jax.Array, dict]:
        whole = {**inputs, "target": jnp.zeros((batch, data.classes))}
        return setup.program.loss(params, frozen, whole, jax.random.key(0))

    inputs = {name: leaf for name, leaf in setup.abstract_batch.items() if name != "label"}
    if "image" in inputs:
        inputs["image"] = jax.ShapeDtypeStruct(inputs["image"].shape, jnp.float32)
    return count_flops(jax.value_and_grad(loss, has_aux=True), params, frozen, inputs)


def count(config: ConfigDict, phases: dict[str, Phase]) -> None:
    """Prints the FLOPs of both ways."""
    recipe = next(iter(phases.values())).recipe
    batch = recipe.batch // recipe.accumulate

    def of(names: list[str], kept: bool = False) -> int:
        own = {name: phases[name] for name in names}
        stages: dict[str, dict] = {}
        for phase in own.values():
            stages |= abstract_stages(phase)
        setup = joint_setup(config, own, stages, mesh=None, updates_per_epoch=1000)
        return flops(setup.on_kept() if kept else setup, batch) // batch

    separate = {name: of([name]) for name in phases}
    joint, on_kept = of(list(phases)), of(list(phases), kept=True)
    for name, each in separate.items():
        print(f"  {name}: {each / 1e9:.2f} GFLOP per image")
    total = sum(separate.values())
    print(
        f"{config.name}: {total / 1e9:.2f} GFLOP per image separately, {joint / 1e9:.2f} in one "
        f"program: {joint / total:.3f}; on kept targets {on_kept / 1e9:.2f}: {on_kept / total:.3f}"
    )


@dataclass
class Way:
    """Some pairs in one program, on their data.

    Attributes:
        run: steps -> seconds on the clock, and of the CPUs.
        fill: seconds that the kept targets of a step took to compute.
    """

    run: Callable[[int], tuple[float, float]]
    fill: float = 0.0


def make_way(config: ConfigDict, phases: dict[str, Phase], keep_in: Path | None = None) -> Way:
    """The program of some pairs, which keep their targets in a directory, or do not."""
    stages: dict[str, dict] = {}
    for phase in phases.values():
        missing = {n: spec for n, spec in phase.stages.items() if n not in stages}
        stages |= {n: fresh_stage(config, spec, n, phase.seed) for n, spec in missing.items()}
    mesh = make_mesh()
    setup = joint_setup(config, phases, stages, mesh=mesh, updates_per_epoch=1000)
    phase = next(iter(phases.values()))
    source, recipe = image_source(phase.data, "train"), phase.recipe
    batch_size, kept, fill = recipe.batch // recipe.accumulate, None, 0.0
    if keep_in is not None:
        began = time.perf_counter()
        run_of = Run(config, keep_in, mesh)
        kept = keep_targets(run_of, setup, {job: {} for job in phases}, steps=0)
        fill = (time.perf_counter() - began) * batch_size / len(source)
        setup = setup.on_kept()
    step, frozen = setup.make_step(), setup.frozen
    states = {job: own.initial_state() for job, own in setup.setups.items()}

    def run(steps: int) -> tuple[float, float]:
        nonlocal states
        began, began_cpu = time.perf_counter(), time.process_time()
        stream = train_batches(
            source,
            phase.data,
            batch_size=batch_size,
            total_steps=steps,
            seed=phase.seed,
            views=int(kept is not None),
            kept=kept,
        )
        for batch in stream:
            states, _ = step(states, frozen, put_batch(mesh, batch))
        jax.block_until_ready(states)
        return time.perf_counter() - began, time.process_time() - began_cpu

    return Way(run, fill)


def clock(
    config: ConfigDict, phases: dict[str, Phase], steps: int, rounds: int, keep_in: Path | None
) -> None:
    """Prints the seconds of each way."""
    ways = {
        "separately": [make_way(config, {job: phase}) for job, phase in phases.items()],
        "in one program": [make_way(config, phases)],
    }
    if keep_in is not None:
        config.distillation.views = 1
        ways["on kept targets"] = [make_way(config, phases_of(config), keep_in)]
    for way in (way for parts in ways.values() for way in parts):
        way.run(2)  # compiles
    shares: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for number in range(rounds):
        # Each way comes first about as often as the others.
        order = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
        seconds = {
            name: tuple(
                sum(kind) / steps
                for kind in zip(*(way.run(steps) for way in ways[name]), strict=True)
            )
            for name in order
        }
        for name in ways:
            pairs = zip(seconds[name], seconds["separately"], strict=True)
            shares[name].append(tuple(own / alone for own, alone in pairs))
        told = ", ".join(f"{seconds[n][0]:.3f} ({seconds[n][1]:.3f} CPU) {n}" for n in ways)
        print(f"  round {number}: seconds per step of all pairs: {told}", flush=True)
    print(f"{config.name}, {len(phases)} pairs, {steps} steps, time over the time separately:")
    for name, found in shares.items():
        for kind, values in zip(("clock", "CPU"), zip(*found, strict=True), strict=True):
            spread = f"{min(values):.3f} to {max(values):.3f}"
            print(f"  {name}, {kind}: {statistics.median(values):.3f} ({spread})")
    for way in ways.get("on kept targets", []):
        print(f"  the kept targets of a step took {way.fill:.3f} s to compute, with compiling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a shipped config or a path, and after a colon its argument")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=0, help="images per step; 0: the config's")
    parser.add_argument("--images", type=int, default=0, help="training images; 0: the config's")
    parser.add_argument("--kept", action="store_true", help="time steps on kept targets too")
    parser.add_argument("--flops", action="store_true", help="count, for networks of any size")
    arguments = parser.parse_args()
    start_again()  # with huge pages, as m2mkd does
    name, *argument = arguments.config.split(":", 1)
    config = read_config(find_config(name), argument)
    if arguments.batch:
        config.recipes.m2mkd.batch, config.recipes.m2mkd.accumulate = arguments.batch, 1
    if arguments.images:
        config.data.train_images = arguments.images
    if arguments.kept or arguments.flops:
        config.distillation.token_weight = 0.0  # no tokens are among the kept targets
    phases = phases_of(config)
    if arguments.flops:
        count(config, phases)
        return
    with tempfile.TemporaryDirectory() as folder:
        keep_in = Path(folder) if arguments.kept else None
        clock(config, phases, arguments.steps, arguments.rounds, keep_in)


if __name__ == "__main__":
    main()
