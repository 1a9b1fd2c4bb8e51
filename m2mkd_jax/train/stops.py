"""What ends a training loop before its jobs have ended."""

from __future__ import annotations

from m2mkd_jax.errors import UserError


class Preempted(BaseException):
    """A signal to stop arrived in one of the processes; the states have been saved.

    It may arrive anywhere, also where any error of a module of one's own is caught.
    """


class EvaluationStopped(Exception):
    """A signal arrived in the middle of an evaluation, which has no result."""


class NotFinite(UserError):
    """A loss, gradient or evaluation is not finite.

    Args:
        name: the job.
        step: the step, counted from 1, or the number of steps before the evaluation.
        what: what is not finite.
        training: whether it is the step's, not an evaluation's.
    """

    def __init__(self, name: str, step: int, what: str, training: bool):
        self.name, self.step, self.what, self.training = name, step, what, training
        super().__init__(
            f"{name}: the {what} is no longer finite at step {step}; lower the learning rate or "
            "set clip in its recipe"
        )
