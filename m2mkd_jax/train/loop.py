"""The training loop: steps, logs, evaluations, checkpoints, early stops and preemption.

It is independent of models and phases: it takes a compiled step, batches and callbacks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.process import alone, from_main, stopping


class Preempted(Exception):
    """SIGTERM or SIGINT arrived in one of the processes; the state has been saved."""


@dataclass
class Loop:
    """The training loop of a job.

    Attributes:
        name: the job, for messages.
        step: (state, frozen, batch) -> (state, metrics).
        frozen: the frozen parameters.
        total_steps: calls of `step` in the whole job.
        log_every: steps between log entries.
        evaluate_every: steps between evaluations; 0: only after the last step.
        evaluate: state -> metrics (`eval_*`).
        log: takes a log entry, a dict of plain numbers and lists.
        save: (step, state, metrics) -> None; must copy before it returns.
        save_seconds: longest time without a checkpoint; several processes check it when logging.
        stop: metrics of an evaluation -> whether to stop early; None: never.
        learning_rate: update number -> rate, for the log.
        accumulate: calls of `step` per optimizer update.
    """

    name: str
    step: Callable[[dict, dict, Any], tuple[dict, dict]]
    frozen: dict
    total_steps: int
    log_every: int
    evaluate_every: int
    evaluate: Callable[[dict], dict]
    log: Callable[[dict], None]
    save: Callable[[int, dict, dict], Any]
    save_seconds: float
    stop: Callable[[dict], bool] | None
    learning_rate: Callable[[int], Any]
    accumulate: int = 1

    def run(self, state: dict, batches: Iterator[dict], start: int = 0) -> tuple[dict, dict, int]:
        """Trains from step `start` on.

        Args:
            state: the training state after `start` steps.
            batches: the batches from step `start` on.
            start: steps already done.

        Returns:
            The final state, the metrics of the last evaluation, and the number of steps done.

        Raises:
            Preempted: a signal arrived; the state was saved first.
            UserError: the loss is no longer finite.
        """
        pending: list[dict] = []
        metrics: dict = {}
        saved = clock = time.monotonic()
        done = start
        evaluated = self.evaluate_every and done and done % self.evaluate_every == 0
        if self.stop and evaluated:
            # A previous run may have been killed after deciding to stop here.
            metrics = self.evaluate(state)
            if self.stop(metrics):
                return state, metrics, done
        with stopping() as asked_to_stop:
            while done < self.total_steps:
                state, step_metrics = self.step(state, self.frozen, next(batches))
                pending.append(step_metrics)
                done += 1
                last = done == self.total_steps
                logs = last or len(pending) == self.log_every
                if logs:
                    # Between evaluations, the host waits for the device only here.
                    clock = self._log(done, pending, clock)
                    pending = []
                metrics = {}
                if last or (self.evaluate_every and done % self.evaluate_every == 0):
                    metrics = self.evaluate(state)
                    self.log({"step": done, **metrics})
                    clock = time.monotonic()
                early = bool(metrics and self.stop and self.stop(metrics))
                overdue = time.monotonic() - saved > self.save_seconds
                if not alone():
                    # Clocks differ between processes, and agreeing at every step would be slow.
                    overdue = logs and from_main(overdue)
                stopped = asked_to_stop()
                if metrics or overdue or stopped:
                    self.save(done, state, metrics)
                    saved = time.monotonic()
                if stopped:
                    raise Preempted(f"{self.name}: stopped by a signal at step {done}, state saved")
                if early:
                    break
        if not metrics:  # resumed after the last step, before the job was marked as done
            metrics = self.evaluate(state)
        return state, metrics, done

    def _log(self, done: int, pending: list[dict], clock: float) -> float:
        """Logs the means of the pending metrics; returns the time.

        Args:
            done: steps done.
            pending: metrics of the steps since the last log entry, on the device.
            clock: when the last log entry was written.
        """
        rate = self.learning_rate(max(done // self.accumulate - 1, 0))
        values, rate = jax.device_get((pending, rate))
        # Scalars become numbers, arrays per layer become lists.
        mean = {k: np.mean([v[k] for v in values], axis=0).tolist() for k in values[0]}
        now = time.monotonic()
        first = done - len(pending) + 1
        seconds = (now - clock) / len(pending)
        self.log({"step": done, "lr": float(rate), "seconds_per_step": seconds, **mean})
        if not math.isfinite(mean["loss"]):
            raise UserError(
                f"{self.name}: the loss is no longer finite between steps {first} and {done}; "
                "lower the learning rate or set clip in its recipe, then delete the job's directory"
            )
        return now
