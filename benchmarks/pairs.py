"""All pairs m2mkd/i in one program against each by itself: seconds with data, and FLOPs.

    python -m benchmarks.pairs CONFIG[:ARGUMENT] [--steps=10] [--rounds=3] [--batch=N] [--flops]

Networks are fresh. Both ways read the same images from disk and are timed in turn, in one process;
every pair by itself does as many steps as all of them together. --flops counts the matrix products
of the traced programs at the config's batch and compiles nothing: for networks of full size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m2mkd_jax.config.files import find_config, read_config
from m2mkd_jax.data.pipeline import train_batches
from m2mkd_jax.evaluate.flops import count_flops
from m2mkd_jax.jobs.joint import JointSetup, joint_setup
from m2mkd_jax.jobs.setup import abstract_stages, image_source
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
    """FLOPs of a step's loss and gradients."""
    data = next(iter(setup.setups.values())).phase.data
    params = {job: own.params for job, own in setup.setups.items()}
    frozen = setup.frozen
    for own in setup.setups.values():
        frozen = with_fixed(frozen, own.fixed)

    def loss(params: dict, frozen: dict, images: jax.Array) -> tuple[jax.Array, dict]:
        target = jnp.zeros((batch, data.classes))
        batch_of = {"image": images, "target": target}
        return setup.program.loss(params, frozen, batch_of, jax.random.key(0))

    images = jax.ShapeDtypeStruct((batch, data.image_size, data.image_size, 3), jnp.float32)
    return count_flops(jax.value_and_grad(loss, has_aux=True), params, frozen, images)


def count(config: ConfigDict, phases: dict[str, Phase]) -> None:
    """Prints the FLOPs of both ways."""
    recipe = next(iter(phases.values())).recipe
    batch = recipe.batch // recipe.accumulate

    def of(names: list[str]) -> int:
        own = {name: phases[name] for name in names}
        stages: dict[str, dict] = {}
        for phase in own.values():
            stages |= abstract_stages(phase)
        setup = joint_setup(config, own, stages, mesh=None, updates_per_epoch=1000)
        return flops(setup, batch) // batch

    separate, joint = {name: of([name]) for name in phases}, of(list(phases))
    for name, each in separate.items():
        print(f"  {name}: {each / 1e9:.2f} GFLOP per image")
    total = sum(separate.values())
    print(
        f"{config.name}: {total / 1e9:.2f} GFLOP per image separately, {joint / 1e9:.2f} in one "
        f"program: {joint / total:.3f}"
    )


def stepper(config: ConfigDict, phases: dict[str, Phase]) -> Callable[[int], float]:
    """Steps -> seconds that some pairs take for them in one program, with their data."""
    stages: dict[str, dict] = {}
    for phase in phases.values():
        missing = {n: spec for n, spec in phase.stages.items() if n not in stages}
        stages |= {n: fresh_stage(config, spec, n, phase.seed) for n, spec in missing.items()}
    mesh = make_mesh()
    setup = joint_setup(config, phases, stages, mesh=mesh, updates_per_epoch=1000)
    step, frozen = setup.make_step(), setup.frozen
    states = {job: own.initial_state() for job, own in setup.setups.items()}
    phase = next(iter(phases.values()))
    source, recipe = image_source(phase.data, "train"), phase.recipe

    def run(steps: int) -> float:
        nonlocal states
        began = time.perf_counter()
        stream = train_batches(
            source,
            phase.data,
            batch_size=recipe.batch // recipe.accumulate,
            total_steps=steps,
            seed=phase.seed,
        )
        for batch in stream:
            states, _ = step(states, frozen, put_batch(mesh, batch))
        jax.block_until_ready(states)
        return time.perf_counter() - began

    return run


def clock(config: ConfigDict, phases: dict[str, Phase], steps: int, rounds: int) -> None:
    """Prints the seconds of both ways."""
    joint = stepper(config, phases)
    separate = [stepper(config, {job: phase}) for job, phase in phases.items()]
    for run in (joint, *separate):
        run(2)  # compiles
    shares = []
    for number in range(rounds):
        # Each way comes first as often as the other.
        ways = [[joint], separate][:: 1 if number % 2 else -1]
        seconds = {len(way) == 1: sum(run(steps) for run in way) for way in ways}
        together, apart = seconds[True], seconds[False]
        shares.append(together / apart)
        print(
            f"  round {number}: {apart / steps:.3f} s per step separately, {together / steps:.3f} "
            f"in one program: {shares[-1]:.3f}",
            flush=True,
        )
    print(
        f"{config.name}, {len(phases)} pairs, {steps} steps: time in one program over time "
        f"separately {statistics.median(shares):.3f} (from {min(shares):.3f} to {max(shares):.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a shipped config or a path, and after a colon its argument")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=0, help="images per step; 0: the config's")
    parser.add_argument("--flops", action="store_true", help="count, for networks of any size")
    arguments = parser.parse_args()
    name, *argument = arguments.config.split(":", 1)
    config = read_config(find_config(name), argument)
    if arguments.batch:
        config.recipes.m2mkd.batch, config.recipes.m2mkd.accumulate = arguments.batch, 1
    phases = phases_of(config)
    if arguments.flops:
        count(config, phases)
    else:
        clock(config, phases, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
