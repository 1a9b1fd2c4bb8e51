"""What is looked at before experts are removed does not depend on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.jobs import evaluation
from m2mkd_jax.jobs.run import Run, image_source
from m2mkd_jax.jobs.setup import frozen_program
from m2mkd_jax.models import chain
from m2mkd_jax.parallel.mesh import make_mesh
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.train.batch import normalise
from tests.e2e import tiny_vmoe


@pytest.mark.parametrize("seen", [9, 200])  # fewer than there are images, and more
def test_the_load_is_that_of_the_first_images_alone(monkeypatch, tmp_path, seen):
    monkeypatch.setattr(evaluation, "SEEN", seen)
    config = tiny_vmoe.get_config()
    config.phases, config.vmoe.keep_stitches = ("e2e_scratch", "eval"), False
    config.vmoe.depths, config.vmoe.moe_pos = (1, 1), (0, 1)
    config.data.test_images = 13
    phase, data = build_phase(config, "e2e_scratch"), config.data
    stages = {}
    for number, (name, spec) in enumerate(phase.stages.items()):
        parts = chain.initialise(spec.build, jax.random.key(number))
        stages[name] = {"params": parts.params, "fixed": parts.fixed}
    program, frozen = frozen_program(config, phase, phase.student, stages)
    pixels = image_source(data, "test").reader().evaluation_images(np.arange(min(seen, 13)), 16)
    images = normalise(jnp.asarray(pixels), data.mean, data.std)
    _, expected = program.run_with_aux(program.student, {}, frozen, images)
    for devices in (1, 8):
        run = Run(config, tmp_path, make_mesh(jax.devices()[:devices]))
        found = evaluation._seen(run, phase, program, frozen)
        np.testing.assert_allclose(found["load"], expected["load"], atol=1e-6)
