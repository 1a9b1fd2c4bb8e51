"""A training step that fits into the device's memory, activations recomputed only where they must.

Recomputing the activations of blocks in the backward pass saves memory and costs a forward pass.
With `remat="auto"` the compiler's plan decides: the step is compiled without, and where it needs
more than the device has, once more with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import psutil

from m2mkd_jax.evaluate.flops import flops_of
from m2mkd_jax.models import layers
from m2mkd_jax.parallel import backend, memory
from m2mkd_jax.parallel.process import from_main, say
from m2mkd_jax.train.step import Programs, Step

# Share of the memory that a step may plan: the rest is for batches that wait, and for evaluation.
USABLE = 0.9
SMALL = 2**25  # bytes of a network whose gradient is no burden


class FittingStep:
    """(state, frozen, batch) -> (state, metrics), compiled at its first call; states likewise.

    Args:
        job: its name, for people.
        make: loss -> compiled step.
        loss: of a batch.

    Attributes:
        needed: bytes that the step needs without recomputing, by the compiler's plan; 0: unknown.
        flops: of a step, of the products before anything is recomputed; 0: unknown.
    """

    def __init__(self, job: str, make: Callable[[Callable], Step], loss: Callable):
        self._job, self._make, self._loss = job, make, loss
        self._step = make(loss)
        self._checked = self._started = False
        self._begun: Programs | None = None
        self.needed = self.flops = 0

    def __call__(self, *arguments: Any) -> Any:
        if not self._checked and not self.fits(*arguments):
            self._recompute(arguments)
        if not self._started:
            self._started = True
            memory.give_back()  # what the compiler needed: the step's arrays come on top of it
        return self._step(*arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """The step before it is compiled, as `jax.jit`'s `lower` gives it."""
        return self._step.lower(*arguments)

    def compile_ahead(self, *arguments: Any) -> None:
        """Traces the step here, and compiles it in threads; the first call waits for them.

        Tracing is the interpreter's work, which other work of this process would but delay.

        Args:
            arguments: as for `fits`.
        """
        self._begun = self._step.begin(*arguments)

    def fits(self, *arguments: Any) -> bool:
        """Whether the step fits without recomputing more than the config says; compiles it.

        Args:
            arguments: arrays, or their shapes and shardings.
        """
        self._checked = True
        limit = device_memory()
        if not limit and not self._begun:
            return True
        traced, compiled = self._begun or self._step.begin(*arguments)
        self._begun = None
        self.flops = sum(flops_of(program.jaxpr.jaxpr) for program in traced)
        self.needed = max(planned_bytes(program.result()) for program in compiled)
        self._checked = from_main(not limit or self.needed <= USABLE * limit)
        return self._checked

    def _recompute(self, arguments: tuple[Any, ...]) -> None:
        self._checked = True
        self._step = self._make(recomputing(self._loss))
        programs = self._step.begin(*arguments).compiled
        with_remat = max(planned_bytes(program.result()) for program in programs)
        say(
            f"[{self._job}] activations with remat='auto' are recomputed: a step needs "
            f"{with_remat / 2**30:.1f} GiB, without {self.needed / 2**30:.1f} of "
            f"{device_memory() / 2**30:.1f} GiB"
        )


def recomputing(function: Callable) -> Callable:
    """`function`, traced with remat="auto" taken for "always"."""

    def traced(*arguments: Any) -> Any:
        with layers.recomputing():
            return function(*arguments)

    return traced


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes on one device that a program needs by the compiler's plan; 0 where it tells none."""
    plan = compiled.memory_analysis()
    if plan is None:
        return 0
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return kept + plan.temp_size_in_bytes


def in_two_programs(params: Any) -> bool:
    """Whether gradient and update of a network are programs of their own (train/step.py).

    Args:
        params: its trainable parameters, or their shapes.
    """
    if not backend.is_one_cpu():
        return False
    return backend.array_bytes(params) <= SMALL


def device_memory() -> int:
    """Bytes of memory that a device has; 0 if unknown. CPU devices share the machine's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", 0)
    return psutil.virtual_memory().total // jax.local_device_count()
