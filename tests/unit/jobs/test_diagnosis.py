"""Where a loss or gradient that is not finite began."""

import re

import jax
import jax.numpy as jnp
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import diagnosis
from m2mkd_jax.jobs.changes import check_same_config
from m2mkd_jax.jobs.joint import joint_setup
from m2mkd_jax.jobs.plan import Plan, stale_after, write_inputs
from m2mkd_jax.jobs.run import Run
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


@pytest.mark.parametrize(
    ("job", "change"),
    [
        ("pt", {"recipes.pt.clip": 1.0}),
        ("mt/1", {"recipes.mt.modules": {"1": {"clip": 1.0}}}),
        ("m2mkd/1", {"recipes.m2mkd.modules": {"1": {"clip": 0.5}}}),
        ("e2e/1", {"recipes.e2e.lr": 1e-5}),
    ],
)
def test_what_helps_is_not_refused(tmp_path, job, change):
    config = tiny.get_config()
    config.phases, config.e2e_seeds = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "eval"), 2
    plan = Plan(config)
    begun = plan.names[: plan.names.index(job) + 1]
    begun += ["e2e_scratch"] if job == "e2e/1" else []
    for name in begun:
        write_inputs(tmp_path, plan.job(name))
    words = diagnosis.what_helps(Run(config, tmp_path, None), plan.job(job).phase)
    assert all(key.rpartition(".")[0] in words for key in change)
    redo = re.search(r"--redo=(\S+)$", words)[1]
    config.update_from_flattened_dict(change)
    changed = Plan(config)
    stale = stale_after(tmp_path, changed.select(redo, "--redo"))
    check_same_config(changed, tmp_path, changed.names, stale)
    with pytest.raises(UserError, match=r"was made with config\.recipes"):
        check_same_config(changed, tmp_path, changed.names)


def test_other_modules_keep_what_they_have(tmp_path):
    plan = Plan(tiny.get_config())
    words = diagnosis.what_helps(Run(plan.config, tmp_path, None), plan.job("mt/1").phase)
    assert words.endswith("--redo=mt/1") and "config.recipes.mt.modules, such as {'1': " in words
