"""The training loop: steps, logs, evaluations, checkpoints, early stops and preemption.

One loop trains one job, or several jobs on the same batches, each with its own state, length and
rule to stop. It is independent of models and phases: it takes compiled steps, batches and
callbacks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.process import alone, from_main, stopping


class Preempted(Exception):
    """SIGTERM or SIGINT arrived in one of the processes; the states have been saved."""


@dataclass
class Member:
    """One of the jobs of a loop.

    Attributes:
        name: the job, for messages.
        total_steps: steps of the whole job.
        log: takes a log entry, a dict of plain numbers and lists.
        save: (step, state, metrics) -> None; must copy before it returns.
        stop: metrics of an evaluation -> whether to stop early; None: never.
        learning_rate: update number -> rate, for the log.
        finish: (state, metrics of the last evaluation, steps done) -> None, called once, at the
            end of the job.
    """

    name: str
    total_steps: int
    log: Callable[[dict], None]
    save: Callable[[int, dict, dict], Any]
    stop: Callable[[dict], bool] | None
    learning_rate: Callable[[int], Any]
    finish: Callable[[dict, dict, int], None] = lambda state, metrics, steps: None
    _pending: list[dict] = field(default_factory=list, init=False)  # on the device

    def stops(self, metrics: dict) -> bool:
        """Whether the job stops early after an evaluation; {}: there was none."""
        return bool(metrics and self.stop and self.stop(metrics))


@dataclass
class Loop:
    """The training loop of one or several jobs.

    Attributes:
        members: the jobs; they have done the same number of steps.
        step_of: names of jobs -> (states, batch) -> (states, metrics), both by job; called again
            for those that are left when a job has ended.
        log_every: steps between log entries.
        evaluate_every: steps between evaluations; 0: only after the last step.
        evaluate: states by job -> metrics (`eval_*`) by job.
        save_seconds: longest time without a checkpoint; several processes check it when logging.
        accumulate: steps per optimizer update.
    """

    members: Sequence[Member]
    step_of: Callable[[tuple[str, ...]], Callable[[dict, Any], tuple[dict, dict]]]
    log_every: int
    evaluate_every: int
    evaluate: Callable[[dict], dict[str, dict]]
    save_seconds: float
    accumulate: int = 1

    def run(self, states: dict[str, dict], batches: Iterator[dict], start: int = 0) -> dict:
        """Trains from step `start` on, until every job has ended.

        Args:
            states: by job, after `start` steps; they are taken out of the dict as jobs end.
            batches: the batches from step `start` on.
            start: steps already done.

        Returns:
            By job, the metrics of its last evaluation.

        Raises:
            Preempted: a signal arrived; the states were saved first.
            UserError: a loss is no longer finite; the states of the other jobs were saved first.
        """
        ended = self._ended_before(states, start)
        results = self._finish(states, ended, start)
        members = [member for member in self.members if member.name not in ended]
        saved = clock = time.monotonic()
        done = start
        with stopping() as asked_to_stop:
            while members:
                step = self.step_of(tuple(member.name for member in members))
                ended = {}
                while not ended:
                    stepped, step_metrics = step(states, next(batches))
                    states.update(stepped)
                    done += 1
                    for member in members:
                        member._pending.append(step_metrics[member.name])
                    logs = self._due(members, done)
                    if logs:
                        # Between evaluations, the host waits for the device only here.
                        clock = self._log(done, logs, members, states, clock)
                    metrics = self._evaluated(done, members, states)
                    if metrics:
                        clock = time.monotonic()
                    overdue = time.monotonic() - saved > self.save_seconds
                    if not alone():
                        # Clocks differ between processes, and agreeing at every step would be slow.
                        overdue = bool(logs) and from_main(overdue)
                    stopped = asked_to_stop()
                    for member in members:
                        own = metrics.get(member.name, {})
                        if own or overdue or stopped:
                            member.save(done, states[member.name], own)
                    if metrics or overdue:
                        saved = time.monotonic()
                    if stopped:
                        names = ", ".join(member.name for member in members)
                        raise Preempted(f"{names}: stopped by a signal at step {done}, state saved")
                    ended = {
                        member.name: metrics[member.name]
                        for member in members
                        if done == member.total_steps or member.stops(metrics.get(member.name, {}))
                    }
                results |= self._finish(states, ended, done)
                members = [member for member in members if member.name not in ended]
        return results

    def _ended_before(self, states: dict, done: int) -> dict[str, dict]:
        """Metrics of jobs that a previous run may have been killed in after their last step."""
        evaluated = self.evaluate_every and done and done % self.evaluate_every == 0
        asked = {
            member.name: member
            for member in self.members
            if done >= member.total_steps or (member.stop and evaluated)
        }
        metrics = self.evaluate({name: states[name] for name in asked}) if asked else {}
        return {
            name: metrics[name]
            for name, member in asked.items()
            if done >= member.total_steps or member.stops(metrics[name])
        }

    def _finish(self, states: dict, ended: dict[str, dict], done: int) -> dict[str, dict]:
        """Ends jobs, given the metrics of their last evaluations, and lets their states go."""
        for member in self.members:
            if member.name in ended:
                member.finish(states.pop(member.name), ended[member.name], done)
        return ended

    def _due(self, members: Iterable[Member], done: int) -> list[Member]:
        """The jobs that have a log entry after this step."""
        return [
            member
            for member in members
            if done == member.total_steps or len(member._pending) == self.log_every
        ]

    def _evaluated(self, done: int, members: list[Member], states: dict) -> dict[str, dict]:
        """Metrics, by job, of the evaluations that are due after a step."""
        all_due = self.evaluate_every and done % self.evaluate_every == 0
        due = [member for member in members if all_due or done == member.total_steps]
        if not due:
            return {}
        metrics = self.evaluate({member.name: states[member.name] for member in due})
        for member in due:
            member.log({"step": done, **metrics[member.name]})
        return metrics

    def _log(
        self, done: int, due: list[Member], members: list[Member], states: dict, clock: float
    ) -> float:
        """Logs the means of the pending metrics; returns the time.

        Args:
            done: steps done.
            due: jobs whose metrics are logged.
            members: all jobs that are trained.
            states: by job.
            clock: when the last log entry was written.
        """
        update = max(done // self.accumulate - 1, 0)
        on_device = [(member._pending, member.learning_rate(update)) for member in due]
        fetched = jax.device_get(on_device)
        now = time.monotonic()
        diverged = {}
        for member, (values, rate) in zip(due, fetched, strict=True):
            # Scalars become numbers, arrays per layer become lists.
            mean = {k: np.mean([v[k] for v in values], axis=0).tolist() for k in values[0]}
            seconds = (now - clock) / len(values)
            member.log({"step": done, "lr": float(rate), "seconds_per_step": seconds, **mean})
            member._pending = []
            if not math.isfinite(mean["loss"]):
                diverged[member.name] = done - len(values) + 1
        for member in members if diverged else ():
            if member.name not in diverged:
                member.save(done, states[member.name], {})
        for name, first in diverged.items():
            raise UserError(
                f"{name}: the loss is no longer finite between steps {first} and {done}; "
                "lower the learning rate or set clip in its recipe, then delete the job's directory"
            )
        return now
