"""The training loop: steps, logs, evaluations, checkpoints, early stops and preemption.

One loop trains one job, or several jobs on the same batches, each with its own state, length and
rule to stop. It is independent of models and phases: it takes compiled steps, batches and
callbacks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from m2mkd_jax.errors import Lost
from m2mkd_jax.parallel.process import alone, from_main, interrupted, reached, stopping
from m2mkd_jax.train.stops import EvaluationStopped, NotFinite, Preempted


@dataclass
class Member:
    """One of the jobs of a loop.

    Attributes:
        name: the job, for messages.
        total_steps: steps of the whole job.
        log: takes a log entry, a dict of plain numbers and lists.
        save: (step, state, metrics, jobs that are saved with it) -> None; must copy before it
            returns.
        stop: metrics of an evaluation -> whether to stop early; None: never.
        learning_rate: update number -> rate, for the log.
        finish: (state, metrics of the last evaluation, steps done) -> None, called once, at the
            end of the job.
        allowed: how many steps whose loss or gradient is not finite are skipped; one more ends the
            job.
        skipped: how many have been.
        evaluated: steps before the last evaluation in the log.
    """

    name: str
    total_steps: int
    log: Callable[[dict], None]
    save: Callable[[int, dict, dict, tuple[str, ...]], Any]
    stop: Callable[[dict], bool] | None
    learning_rate: Callable[[int], Any]
    finish: Callable[[dict, dict, int], None] = lambda state, metrics, steps: None
    allowed: int = 0
    skipped: int = 0
    evaluated: int = 0
    _pending: list[dict] = field(default_factory=list, init=False)  # on the device
    _taken: list[dict] = field(default_factory=list, init=False)  # fetched, not yet logged
    _steps: int = field(default=0, init=False)  # since the last log entry
    _logged: float = field(default=0.0, init=False)  # when that was, by the loop's clock
    _waited: float = field(default=0.0, init=False)  # the loop's then

    def add(self, metrics: dict) -> None:
        """Adds the metrics of a step, which are still on the device."""
        self._pending.append(metrics)
        self._steps += 1

    def pending(self) -> list[dict]:
        """The metrics of the steps since the last call, on the device."""
        pending, self._pending = self._pending, []
        return pending

    def take(self, fetched: list[dict], done: int, accumulate: int) -> None:
        """Keeps the metrics of steps until they are logged, without those of skipped steps.

        Args:
            fetched: of the last steps.
            done: steps done.
            accumulate: steps per optimizer update.

        Raises:
            NotFinite: more steps are skipped than allowed.
        """
        for step, values in enumerate(fetched, done - len(fetched) + 1):
            numbers = {"loss": values["loss"], "gradient": values.get("gradient_norm", 0.0)}
            wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
            if not wrong:
                # A skipped step is no part of a batch; the next one takes its place.
                if (step - self.skipped) % accumulate:  # the norm of a part of the gradient
                    values = {k: v for k, v in values.items() if k != "gradient_norm"}
                self._taken.append(values)
                continue
            self.skipped += 1
            if self.skipped > self.allowed:
                raise NotFinite(self.name, step, wrong[0], True)

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
        wait: until what has been saved is on disk.
    """

    members: Sequence[Member]
    step_of: Callable[[tuple[str, ...]], Callable[[dict, Any], tuple[dict, dict]]]
    log_every: int
    evaluate_every: int
    evaluate: Callable[[dict], dict[str, dict]]
    save_seconds: float
    accumulate: int = 1
    wait: Callable[[], None] = lambda: None
    _saved: float = field(default=0.0, init=False)  # when
    _paused: float = field(default=0.0, init=False)  # time in which no steps were made
    _asked: float = field(default=0.0, init=False)  # when the last evaluation began
    _waited: float = field(default=0.0, init=False)  # for batches

    def run(self, states: dict[str, dict], batches: Iterator[dict], start: int = 0) -> dict:
        """Trains from step `start` on, until every job has ended.

        Args:
            states: by job, after `start` steps; they are taken out of the dict as jobs end.
            batches: the batches from step `start` on.
            start: steps already done.

        Returns:
            By job, the metrics of its last evaluation.

        Raises:
            Preempted: a signal arrived; the states were saved first, or the jobs had ended.
            NotFinite: a loss, gradient or evaluation is not; its state is not saved, the states of
                the other jobs were saved first.
        """
        self._saved, done = time.monotonic(), start
        with stopping() as asked_to_stop:
            ended = self._ended_before(states, start)
            results = self._finish(states, ended, start)
            members = [member for member in self.members if member.name not in ended]
            for member in members:
                member._logged = self._clock()
            while members:
                names = tuple(member.name for member in members)
                step = self.step_of(names)
                ended, compiled = {}, False
                while not ended:
                    asked = time.monotonic()
                    batch = self._next(batches, done, members, states)
                    arrived = time.monotonic()
                    self._waited += arrived - asked
                    stepped, step_metrics = step(states, batch)
                    if not compiled:  # the first call does not return before it is
                        for member in members:  # compiles the schedule, for the log
                            member.learning_rate(0)
                        self._paused += time.monotonic() - arrived
                        compiled = True
                    states.update(stepped)
                    done += 1
                    reached(f"step {done} of {', '.join(names)}")
                    for member in members:
                        member.add(step_metrics[member.name])
                    metrics = self._log_evaluate_save(done, members, states, asked_to_stop)
                    ended = {
                        member.name: metrics[member.name]
                        for member in members
                        if done == member.total_steps or member.stops(metrics.get(member.name, {}))
                    }
                began = time.monotonic()
                results |= self._finish(states, ended, done)
                self._paused += time.monotonic() - began
                members = [member for member in members if member.name not in ended]
            if asked_to_stop():  # while the last jobs were ended
                raise Preempted(f"stopped by a signal after {', '.join(results)} had ended")
        return results

    def _log_evaluate_save(
        self, done: int, members: list[Member], states: dict, asked_to_stop: Callable[[], bool]
    ) -> dict[str, dict]:
        """What follows a step: logs, evaluations and saves that are due.

        Returns:
            Metrics, by job, of the evaluations.

        Raises:
            Preempted, NotFinite: as `run`.
        """
        logs = self._due(members, done)
        if logs:
            # Between evaluations, the host waits for the device only here.
            self._log(done, logs, states)
        metrics: dict[str, dict] = {}
        stopped = asked_to_stop()
        if not stopped:
            try:
                metrics = self._evaluated(done, members, states)
            except EvaluationStopped:
                stopped = True
            except Lost:
                self._keep(done, members, states)
                raise
        overdue = time.monotonic() - self._saved > self.save_seconds
        if not alone():
            # Clocks differ between processes, and agreeing at every step would be slow.
            overdue = bool(logs) and from_main(overdue)
        if metrics or overdue or stopped:
            self._save(done, members, states, metrics)
        if metrics:
            self._paused += time.monotonic() - self._asked
        if metrics or overdue:
            self._saved = time.monotonic()
        if stopped:
            raise _preempted(done, members)
        return metrics

    def _save(
        self, done: int, members: list[Member], states: dict, metrics: dict[str, dict]
    ) -> None:
        """Saves the states after `done` steps, with metrics of evaluations. Raises NotFinite."""
        self._check_pending(done, members, states)
        # All at the same steps, each of which all have before the next one is saved: from the
        # newest of them a killed run goes on in the program that it had.
        self.wait()
        together = tuple(member.name for member in members)
        for member in members:
            try:
                member.save(done, states[member.name], metrics.get(member.name, {}), together)
            except NotFinite as error:
                raise self._failed([error], done, states) from None

    def _next(self, batches: Iterator[dict], done: int, members: list[Member], states: dict) -> Any:
        """The next batch.

        Raises:
            Lost: who makes the batches has ended; the states were saved where this process can do
                so by itself.
            Preempted: it has because all processes of a terminal or a job got a signal.
        """
        try:
            return next(batches)
        except Lost:
            self._keep(done, members, states)
            raise

    def _keep(self, done: int, members: list[Member], states: dict) -> None:
        """Saves the states after `done` steps, where the process is alone.

        Raises:
            Preempted: a signal to stop has arrived.
        """
        if alone() and done:
            self._save(done, members, states, {})
            self.wait()
        if alone() and interrupted():
            raise _preempted(done, members)

    def _ended_before(self, states: dict, done: int) -> dict[str, dict]:
        """Metrics of jobs that a previous run may have been stopped in after their last step.

        An evaluation that was due and is not in the log is made up for.
        """
        due = bool(self.evaluate_every and done and done % self.evaluate_every == 0)
        needed = any(
            done >= member.total_steps or (due and (member.stop or member.evaluated < done))
            for member in self.members
        )
        # Together, as without the stop: in another program a loss may differ in its last digit.
        asked = [m for m in self.members if needed and (due or done >= m.total_steps)]
        try:
            metrics = self._measured(done, asked, states) if asked else {}
        except EvaluationStopped:
            names = ", ".join(member.name for member in asked)
            raise Preempted(f"{names}: stopped by a signal at step {done}") from None
        return {
            member.name: metrics[member.name]
            for member in asked
            if done >= member.total_steps or member.stops(metrics[member.name])
        }

    def _finish(self, states: dict, ended: dict[str, dict], done: int) -> dict[str, dict]:
        """Ends jobs, given the metrics of their last evaluations, and lets their states go."""
        if ended:  # no job is done before the others have the step from which they go on
            self.wait()
        for member in self.members:
            if member.name in ended:
                member.finish(states.pop(member.name), ended[member.name], done)
        return ended

    def _due(self, members: Iterable[Member], done: int) -> list[Member]:
        """The jobs that have a log entry after this step."""
        return [
            member
            for member in members
            if done == member.total_steps or member._steps == self.log_every
        ]

    def _evaluated(self, done: int, members: list[Member], states: dict) -> dict[str, dict]:
        """Metrics, by job, of the evaluations that are due after a step."""
        all_due = self.evaluate_every and done % self.evaluate_every == 0
        due = [member for member in members if all_due or done == member.total_steps]
        if not due:
            return {}
        self._check_pending(done, members, states)  # all are saved
        self._asked = time.monotonic()
        return self._measured(done, due, states)

    def _measured(self, done: int, due: Iterable[Member], states: dict) -> dict[str, dict]:
        """Metrics of some jobs, which are logged. Raises NotFinite and EvaluationStopped."""
        metrics = self.evaluate({member.name: states[member.name] for member in due})
        for member in due:
            if member.evaluated < done:
                member.log({"step": done, **metrics[member.name]})
                member.evaluated = done
            for name, value in metrics[member.name].items():
                if not math.isfinite(value):
                    wrong = NotFinite(member.name, done, name, False)
                    raise self._failed([wrong], done, states)
        return metrics

    def _check_pending(
        self, done: int, members: Sequence[Member], states: dict, beside: Any = ()
    ) -> Any:
        """Fetches the metrics of pending steps, and `beside`, which is returned.

        Raises:
            NotFinite: a step of one of the jobs was one too many to skip.
        """
        pending = [member.pending() for member in members]
        if any(pending) or beside:
            pending, beside = jax.device_get((pending, beside))
        errors = []
        for member, values in zip(members, pending, strict=True):
            try:
                member.take(values, done, self.accumulate)
            except NotFinite as error:
                errors.append(error)
        if errors:
            raise self._failed(errors, done, states)
        return beside

    def _failed(self, errors: Sequence[NotFinite], done: int, states: dict) -> NotFinite:
        """The first of some jobs' errors, once the jobs that go well are saved."""
        error, failed = errors[0], {error.name for error in errors}
        for member in self.members:
            if member.name not in failed and member.name in states:
                with contextlib.suppress(NotFinite):
                    member.take(jax.device_get(member.pending()), done, self.accumulate)
                    member.save(done, states[member.name], {}, (member.name,))
        return error

    def _log(self, done: int, due: list[Member], states: dict) -> None:
        """Logs the means of the pending metrics of the jobs that are due, after `done` steps."""
        # A skipped step moves neither the weights nor the schedule. Those of the pending steps are
        # known once their metrics are here: only then is another rate asked for.
        before = [(m.skipped, m.learning_rate(self._update(m, done))) for m in due]
        fetched = self._check_pending(done, due, states, [rate for _, rate in before])
        now = self._clock()
        for member, (skipped, _), rate in zip(due, before, fetched, strict=True):
            if member.skipped > skipped:
                rate = jax.device_get(member.learning_rate(self._update(member, done)))
            values, member._taken = member._taken, []
            steps, member._steps = member._steps, 0
            # Scalars become numbers, arrays per layer become lists.
            names = dict.fromkeys(name for own in values for name in own)
            mean = {k: np.mean([v[k] for v in values if k in v], axis=0).tolist() for k in names}
            seconds, member._logged = now - member._logged, now
            waited, member._waited = self._waited - member._waited, self._waited
            entry = {"step": done, "lr": float(rate), "seconds_per_step": seconds / steps, **mean}
            entry["data_wait"] = waited / max(seconds, 1e-9)
            member.log(entry | ({"skipped": member.skipped} if member.skipped else {}))

    def _update(self, member: Member, done: int) -> int:
        """The number of a job's last optimizer update after `done` steps, from 0."""
        return max((done - member.skipped) // self.accumulate - 1, 0)

    def _clock(self) -> float:
        """The time, without that of compiling and evaluating."""
        return time.monotonic() - self._paused


def _preempted(done: int, members: Sequence[Member]) -> Preempted:
    names = ", ".join(member.name for member in members)
    return Preempted(f"{names}: stopped by a signal at step {done}, state saved")
