"""A job's training step with everything it takes, without a run's directory."""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from m2mkd_jax.job import make_program, taken_apart
from m2mkd_jax.phases import build_phase
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.step import initial_state, make_step
from m2mkd_jax.weights import fresh_stage

STEPS_PER_EPOCH = 1000  # of the learning rate alone


def training_step(config: ConfigDict, job: str):
    """(phase, program, step, state, frozen) of a job; every stage is fresh, whatever it teaches.

    The step is compiled at its first call, for the first device alone.
    """
    phase = build_phase(config, job)
    stages = {name: fresh_stage(config, record, name, 0) for name, record in phase.stages.items()}
    program = make_program(config, phase, stages)
    params, fixed, frozen = taken_apart(program, stages)
    optimizer = make_optimizer(phase.recipe, STEPS_PER_EPOCH, params)
    step = make_step(program.loss, optimizer, phase.recipe, phase.data, 0)
    state = jax.jit(lambda p, f: initial_state(p, f, optimizer, phase.recipe))(params, fixed)
    return phase, program, step, state, frozen
