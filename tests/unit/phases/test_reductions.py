"""Networks with parts removed: what is left is what the whole network has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.setup import frozen_program
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.families import students
from m2mkd_jax.phases.nac_family import without_mediators
from tests.unit.report import runs


def network(name):
    config = runs.config(name)
    phase = build_phase(config, "e2e_scratch")
    trees = {}
    for number, (stage, spec) in enumerate(phase.stages.items()):
        parts = chain.initialise(spec.build, jax.random.key(number))
        trees[stage] = {"params": parts.params, "fixed": parts.fixed}
    size = config.data.image_size
    images = jax.random.normal(jax.random.key(9), (4, size, size, 3))
    return config, phase, trees, images


def logits(config, phase, trees, images):
    program, frozen = frozen_program(config, phase, phase.student, trees)
    return jax.jit(lambda frozen, x: program.logits({}, frozen, x))(frozen, images)


def test_mediators_in_another_order_are_the_same_network():
    config, phase, trees, images = network("tiny")
    order = np.random.default_rng(0).permutation(8)
    moved = without_mediators(trees["nac"]["params"], order, False)
    changed = {"nac": {**trees["nac"], "params": moved}}
    expected = logits(config, phase, trees, images)
    np.testing.assert_allclose(logits(config, phase, changed, images), expected, atol=1e-5)


def test_a_nac_loses_the_mediators_of_the_weakest_links_first():
    config, _, trees, _ = network("tiny")
    latents = trees["nac"]["params"]["mediator_latents"]
    # All point the same way but the last, which hears nobody.
    same = np.zeros(latents["signatures"].shape, np.float32)
    same[:, 0], same[-1] = 1, -np.eye(same.shape[1])[0]
    latents["signatures"] = jnp.asarray(same)
    found = list(students(config).reductions(trees, 0, {}))
    assert [smaller.kept for smaller in found] == [6, 4, 2] * 2
    for smaller in found[:3]:
        left = smaller.trees["nac"]["params"]["mediator_latents"]["signatures"]
        assert len(left) == smaller.kept and float(left[:, 0].min()) == 1
        shape = chain.abstract(smaller.stages["nac"].build).params["mediator_latents"]
        assert shape["signatures"].shape == left.shape
    assert found[3].title == "mediators, at random"


def test_a_token_may_choose_a_single_expert_of_a_published_router():
    config, _, trees, images = network("tiny_vmoe")
    config.vmoe.router = "published"
    (one,) = students(config).reductions(trees, 0, {})
    assert (one.title, one.kept) == ("choices per token", 1)
    smaller = dataclasses.replace(build_phase(config, "e2e_scratch"), stages=one.stages)
    assert np.isfinite(logits(config, smaller, one.trees, images)).all()
    config.vmoe.top_k = 1
    with pytest.raises(UserError, match=r"config\.vmoe\.top_k: the published router's weight"):
        students(config).check(teaching=False, devices=1)


def test_experts_that_get_no_tokens_can_go():
    config, phase, trees, images = network("tiny_vmoe")
    for tree in trees.values():
        for name, segment in tree["params"].items():
            if name.startswith("segment_") and "moe" in segment["blocks"]:
                linear = segment["blocks"]["moe"]["router"]["linear"]
                linear["bias"] = linear["bias"].at[:, ::2].set(-1e3)  # nobody goes to 0 and 2
    expected = logits(config, phase, trees, images)
    load = np.tile([0.0, 0.5, 0.0, 0.5], (3, 1))
    found = {s.title: s for s in students(config).reductions(trees, 0, {"load": load})}
    fewer = found["experts, least load first"]
    assert fewer.kept == 2
    router = fewer.trees["vmoe_0"]["params"]["segment_0"]["blocks"]["moe"]["router"]["linear"]
    assert router["bias"].shape[-1] == 2 and float(router["bias"].min()) > -1e3
    smaller = dataclasses.replace(phase, stages=fewer.stages)
    np.testing.assert_allclose(logits(config, smaller, fewer.trees, images), expected, atol=1e-5)
