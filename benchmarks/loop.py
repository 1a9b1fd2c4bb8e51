"""Python's cost per training step of nac_digits: the loop with its data, against the step alone.

    python -m benchmarks.loop [--steps=200] [--job=m2mkd/1] [--trackers=tensorboard]

All are timed in turn, in one process, on the same compiled step: the step alone; the loop, where
fetching and placing batches and Python are added; the loop with a log and its trackers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from configs import nac_digits
from m2mkd_jax.data.pipeline import train_batches
from m2mkd_jax.jobs.log import Log
from m2mkd_jax.jobs.run import image_source
from m2mkd_jax.jobs.setup import fresh_setup
from m2mkd_jax.jobs.trackers import make_trackers
from m2mkd_jax.parallel.mesh import make_mesh, put_batch
from m2mkd_jax.train.loop import Loop, Member


def run_loop(
    job: str, step: Callable, log_every: int, steps: int, state: dict, stream, log: Callable
) -> dict:
    """The state after some steps in the loop; `step` is (state, batch) -> (state, metrics)."""
    last = {}

    def joint_step(states: dict, batch: dict) -> tuple[dict, dict]:
        state, metrics = step(states[job], batch)
        return {job: state}, {job: metrics}

    member = Member(
        name=job,
        total_steps=steps,
        log=log,
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
    parser.add_argument("--trackers", default="tensorboard")
    arguments = parser.parse_args()
    job, total = arguments.job, arguments.steps
    config, mesh = nac_digits.get_config(), make_mesh()
    config.trackers = tuple(filter(None, arguments.trackers.split(",")))
    setup = fresh_setup(config, job)
    phase, step, state = setup.phase, setup.make_step(), setup.initial_state()
    train = image_source(phase.data, "train")

    def batches(count):
        options = dict(batch_size=phase.recipe.batch, total_steps=count, seed=0)
        return (put_batch(mesh, b) for b in train_batches(train, phase.data, **options))

    def bound_step(state, batch):
        return step(state, setup.frozen, batch)

    def alone(state):
        for _ in range(total):
            state, _ = bound_step(state, batch)
        return state

    def in_loop(state):
        return run_loop(job, bound_step, config.log_every, total, state, batches(total), _nothing)

    def logged(state):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trackers = make_trackers(config, Path(folder), job)
            log = Log(Path(folder) / "metrics.jsonl", job, total, 0, trackers=trackers)
            state = run_loop(job, bound_step, config.log_every, total, state, batches(total), log)
            log.close()
        return state

    batch = next(batches(1))
    for _ in range(2):  # the second time the state lies where the step left it: compiled again
        state, _ = bound_step(state, batch)
    seconds: dict[str, list[float]] = {"alone": [], "in the loop": [], "logged": []}
    for _ in range(arguments.rounds):
        for name, run in zip(seconds, (alone, in_loop, logged), strict=True):
            began = time.perf_counter()
            state = jax.block_until_ready(run(state))
            seconds[name].append((time.perf_counter() - began) / total)
    print(f"{job}, {arguments.rounds} rounds of {total} steps, log_every {config.log_every}")
    for name, found in seconds.items():
        print(f"{name:<12} {1e3 * statistics.median(found):8.2f} ms per step")
    for name, before in (("in the loop", "alone"), ("logged", "in the loop")):
        ratios = [a / b - 1 for a, b in zip(seconds[name], seconds[before], strict=True)]
        print(
            f"{name} adds {100 * statistics.median(ratios):.1f}% to {before} "
            f"(rounds: {100 * min(ratios):.1f}% to {100 * max(ratios):.1f}%)"
        )


def _nothing(entry: dict) -> None:
    """Keeps no log."""


if __name__ == "__main__":
    main()
