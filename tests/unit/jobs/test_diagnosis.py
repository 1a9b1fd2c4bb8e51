"""Where a loss or gradient that is not finite began."""

import jax
import jax.numpy as jnp
import pytest

from m2mkd_jax.jobs import diagnosis
from m2mkd_jax.jobs.joint import joint_setup
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.initial_weights import fresh_stage
from tests.e2e import tiny

JOB = "m2mkd/1"


@pytest.mark.parametrize("kept", [False, True])
def test_a_gradient_that_is_not_finite(kept):
    config = tiny.get_config()
    config.distillation.views = int(kept)
    phase = build_phase(config, JOB)
    stages = {n: fresh_stage(config, spec, n, 0) for n, spec in phase.stages.items()}
    setup = joint_setup(config, {JOB: phase}, stages, mesh=None, updates_per_epoch=10)
    own = (setup.on_kept() if kept else setup).setups[JOB]
    image = jnp.ones((2, config.data.image_size, config.data.image_size, 3))
    target = jnp.full((2, config.data.classes), jnp.nan)
    batch = {"image": image, "target": target, "step": jnp.int32(0)}
    found = diagnosis._first_gradient(own, own.initial_state(), batch, jax.random.key(0))
    # A step on kept targets has no teacher to do it once more with.
    assert found.startswith("" if kept else "the gradient of student_1/") and bool(found) != kept
