"""Joined stages compute what single ones compute, and split again into the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.config.files import find_config, read_config
from m2mkd_jax.jobs.setup import make_program, partition_stages
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.initial_weights import fresh_stage
from m2mkd_jax.phases.joined import join_neighbours
from m2mkd_jax.train.step import with_fixed
from tests.support import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, assert_close, assert_trees_close


def phase_of(name, job):
    config = read_config(find_config(name))
    phase = build_phase(config, job)
    stages = {n: fresh_stage(config, spec, n, phase.seed) for n, spec in phase.stages.items()}
    return config, phase, stages


CASES = {
    ("nac_digits", "pt"): ["meta_0..meta_5"],
    ("nac_digits", "mt/2"): ["meta_0..meta_1", "module_2", "meta_3..meta_5"],
    ("nac_digits", "m2mkd/2"): ["meta_0..meta_1", "student_2", "meta_3..meta_5"],
    ("vmoe_digits", "ft"): None,
    ("vmoe_digits", "e2e_scratch"): None,
}


@pytest.mark.parametrize(("name", "job"), CASES)
def test_joined_computes_the_same(name, job):
    config, phase, stages = phase_of(name, job)
    single = make_program(config, phase, stages)
    joined = join_neighbours(single, stages, trained=True)
    if CASES[name, job]:
        assert list(joined.program.student) == CASES[name, job]
    assert len(joined.program.student) < len(single.student)
    params, fixed, frozen = partition_stages(phase, jnp.dtype("float32"), stages)
    together = joined.join(params)
    assert_trees_close(joined.split(together), params, 0.0)
    assert jax.tree.structure(joined.split(together)) == jax.tree.structure(params)

    size = phase.data.image_size
    draw = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(draw.normal(size=(4, size, size, 3)), jnp.float32),
        "target": jax.nn.one_hot(jnp.arange(4), phase.data.classes),
    }
    whole = jax.jit(jax.value_and_grad(single.loss, has_aux=True))
    (loss, metrics), grads = whole(params, with_fixed(frozen, fixed), batch, None)
    whole = jax.jit(jax.value_and_grad(joined.program.loss, has_aux=True))
    kept = with_fixed(joined.stages(frozen), joined.fixed(fixed))
    (same, same_metrics), same_grads = whole(together, kept, batch, None)
    assert_close(same, loss, OUTPUT_TOLERANCE)
    assert metrics.keys() == same_metrics.keys()
    assert_trees_close(joined.split(same_grads), grads, GRADIENT_TOLERANCE)


def test_stages_that_only_one_chain_runs_stay_apart():
    """Teacher module and the meta model's end are joined in no chain: the end exists once."""
    config, phase, stages = phase_of("nac_digits", "m2mkd/2")
    joined = join_neighbours(make_program(config, phase, stages), stages, trained=True)
    assert joined.program.teacher == ("meta_0..meta_1", "module_2", "meta_3..meta_5")
    assert joined.program.shared == 1
