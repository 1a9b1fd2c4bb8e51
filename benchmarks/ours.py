"""A case of benchmarks/cases.py as this package runs it."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import machine
from benchmarks import memory as process_memory
from benchmarks.cases import CASES, make_config
from m2mkd_jax.evaluate.flops import count_flops
from m2mkd_jax.jobs.setup import fresh_setup
from m2mkd_jax.parallel import backend
from m2mkd_jax.train.step import with_fixed


class Ours:
    """Setup, compiled step and state of a case, on random images that lie on the device."""

    def __init__(self, name: str, batch: int = 0, remat: str = "config", fused: str = "auto"):
        self.case = CASES[name]
        on_cpu = jax.default_backend() == "cpu"
        self.batch = batch or (self.case.cpu if on_cpu else self.case.accelerator)
        config = make_config(self.case, self.batch, remat, fused)
        self.setup = fresh_setup(config, self.case.job)
        self.program = self.setup.program
        data, keys = self.setup.phase.data, jax.random.split(jax.random.key(1))
        shape = (self.batch, data.image_size, data.image_size, 3)
        self.pixels = jax.ShapeDtypeStruct(shape, jnp.float32)
        self.data = {
            "image": jax.random.randint(keys[0], shape, 0, 256, jnp.uint8),
            "label": jax.random.randint(keys[1], (self.batch,), 0, data.classes),
        }
        self.compile_seconds = 0.0
        self.last: Any = None

    def count_flops(self) -> int:
        """FLOPs of the matrix products and convolutions of one step."""
        setup, program = self.setup, self.program
        whole = with_fixed(setup.frozen, setup.fixed)
        if self.case.predict:
            return count_flops(program.logits, setup.params, whole, self.pixels)
        target = jnp.zeros((self.batch, setup.phase.data.classes))

        def loss(params: dict, whole: dict, pixels: jax.Array) -> tuple[jax.Array, dict]:
            batch = {"image": pixels, "target": target}
            return program.loss(params, whole, batch, jax.random.key(0))

        gradient = jax.value_and_grad(loss, has_aux=True)
        return count_flops(gradient, setup.params, whole, self.pixels)

    def matrix_rate(self) -> float:
        """FLOP/s of a square product in the compute type, here and now."""
        return machine.matrix_rate(self.program.dtype)

    def compile(self) -> None:
        """Compiles the step. A training step takes over the buffers of the setup."""
        setup = self.setup
        if self.case.predict:
            self.arguments = (setup.params, with_fixed(setup.frozen, setup.fixed))
            self.images = self.data["image"].astype(jnp.float32) / 255
            began = time.perf_counter()
            _ = self.compiled
            self.compile_seconds = time.perf_counter() - began
            return
        self.state = setup.initial_state()
        self.step = setup.make_step()
        arguments = (self.state, setup.frozen, self.data)
        began = time.perf_counter()
        self.step.fits(*arguments)
        self.compile_seconds = time.perf_counter() - began

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The whole step as one program.

        jax has it already, except for a step in two programs: then this takes time and memory that
        a user's process does not.
        """
        if self.case.predict:
            return backend.jit(self.program.logits).lower(*self.arguments, self.images).compile()
        return self.step.lower(self.state, self.setup.frozen, self.data).compile()

    def steps(self, count: int) -> tuple[float, float]:
        """Runs steps. Returns wall-clock and CPU seconds per step."""
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            if self.case.predict:
                self.last = self.compiled(*self.arguments, self.images)
            else:
                # It finds the compiled program in jax's cache.
                self.state, self.last = self.step(self.state, self.setup.frozen, self.data)
        jax.block_until_ready(self.last)
        wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        return wall / count, cpu / count

    @property
    def loss(self) -> float | None:
        """The loss of the last training step."""
        return None if self.case.predict else float(self.last["loss"])

    def memory(self) -> dict[str, int]:
        """Bytes by how they were found.

        'peak_rss' of the process, from the call of memory.reset_peak_rss on; 'planned', XLA's plan
        for the step; 'peak_on_device', where the device tells it.
        """
        peak = process_memory.peak_rss()  # before the plan, for which the step may be compiled
        plan = self.compiled.memory_analysis()
        found = {
            "peak_rss": peak,
            "planned": plan.argument_size_in_bytes + plan.temp_size_in_bytes,
        }
        told = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in told:
            found["peak_on_device"] = told["peak_bytes_in_use"]
        return found

    def bytes_accessed(self) -> float | None:
        """XLA's count of the bytes that the step reads and writes; the body of a loop counts once.

        None where the backend does not tell.
        """
        analysis = self.compiled.cost_analysis() or {}
        return analysis.get("bytes accessed")
