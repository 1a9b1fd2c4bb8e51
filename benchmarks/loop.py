"""Python's cost per training step of the demo: the loop with its data, against the step alone.

    python -m benchmarks.loop [--steps=200] [--job=m2mkd/1]

Both are timed in turn, in one process, on the same compiled step; the difference is what fetching,
placing and logging batches and Python add.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax

from configs import nac_digits
from m2mkd_jax.data.pipeline import train_batches
from m2mkd_jax.jobs.setup import fresh_setup, image_source
from m2mkd_jax.parallel.mesh import make_mesh, put_batch
from m2mkd_jax.train.loop import Loop, Member


def run_loop(job: str, step: Callable, log_every: int, steps: int, state: dict, stream) -> dict:
    """The state after some steps in the loop; `step` is (state, batch) -> (state, metrics)."""
    last = {}

    def joint_step(states: dict, batch: dict) -> tuple[dict, dict]:
        state, metrics = step(states[job], batch)
        return {job: state}, {job: metrics}

    member = Member(
        name=job,
        total_steps=steps,
        log=lambda record: None,
        save=lambda *_: None,
        stop=None,
        learning_rate=lambda step: 0.0,
        finish=lambda state, metrics, steps: last.update(state),
    )
    Loop(
        members=[member],
        step_of=lambda names: joint_step,
        log_every=log_every,
        evaluate_every=0,
        evaluate=lambda states: {job: {"none": 0.0}},
        save_seconds=1e9,
    ).run({job: state}, stream)
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", default="m2mkd/1")
    arguments = parser.parse_args()
    config, mesh = nac_digits.get_config(), make_mesh()
    setup = fresh_setup(config, arguments.job)
    phase, step, state = setup.phase, setup.make_step(), setup.initial_state()
    train = image_source(phase.data, "train")

    def batches(total):
        options = dict(batch_size=phase.recipe.batch, total_steps=total, seed=0)
        return (put_batch(mesh, b) for b in train_batches(train, phase.data, **options))

    batch = next(batches(1))
    for _ in range(2):  # the second time the state lies where the step left it: compiled again
        state, _ = step(state, setup.frozen, batch)
    alone, whole = [], []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        for _ in range(arguments.steps):
            state, _ = step(state, setup.frozen, batch)
        jax.block_until_ready(state)
        alone.append((time.perf_counter() - began) / arguments.steps)
        stream = batches(arguments.steps)
        began = time.perf_counter()
        state = run_loop(
            arguments.job,
            lambda state, batch: step(state, setup.frozen, batch),
            config.log_every,
            arguments.steps,
            state,
            stream,
        )
        jax.block_until_ready(state)
        whole.append((time.perf_counter() - began) / arguments.steps)
    extra = [b - a for a, b in zip(alone, whole, strict=True)]
    print(
        f"{arguments.job}: step alone {1e3 * statistics.median(alone):.2f} ms, "
        f"in the loop {1e3 * statistics.median(whole):.2f} ms, "
        f"Python and data {1e3 * statistics.median(extra):.2f} ms per step "
        f"(from {1e3 * min(extra):.2f} to {1e3 * max(extra):.2f} over {arguments.rounds} pairs)"
    )


if __name__ == "__main__":
    main()
