"""The arrays of a step's largest gradients: of a small V-MoE, which keeps those of its experts."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.config.defaults import base
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import vmoe
from m2mkd_jax.parallel import backend
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.step import initial_state, make_joint_step, make_step
from tests.random_params import random_params
from tests.support import OUTPUT_TOLERANCE, assert_close, assert_trees_close

SPEC = vmoe.VMoESpec(vit.ViTSpec(8, 4, 8, 2, 5), (0, 1, 3), experts=2)
BATCH = 6
# Blocks 0 and 1 are a loop, 3 is alone, 2 has no experts.
KERNELS = {
    f"net/segment_{i}/blocks/moe/experts/{layer}/kernel" for i in (0, 2) for layer in ("fc1", "fc2")
}


def stage():
    build = functools.partial(vmoe.build_stage, SPEC, 0, (4,))
    parts = chain.abstract(lambda rngs: build(rngs=rngs))
    return parts.graph, random_params(parts.params, 0)


GRAPH, PARAMS = stage()


def loss(trainable, frozen, batch, key):
    del frozen
    net = chain.merge(GRAPH, trainable["net"], {})
    logits = net(batch["image"], key=key, train=True)
    value = -(batch["target"] * jax.nn.log_softmax(logits)).sum(-1).mean()
    return value, {"loss": value}


def recipe_and_data(accumulate: int = 1):
    config = base()
    recipe, data = config.recipes.pt, config.data
    recipe.epochs, recipe.batch, recipe.lr_per, recipe.lr = 4, BATCH, 0, 1e-2
    # Not AdamW: its first updates of a small gradient depend on little more than its sign.
    recipe.optimizer, recipe.clip, recipe.accumulate = "sgd", 0.3, accumulate
    data.image_size, data.classes = 8, 5
    return recipe, data


def batches(count: int):
    rng = np.random.default_rng(0)
    for _ in range(count):
        images = rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8)
        yield {"image": images, "label": rng.integers(0, 5, BATCH, np.int32)}


def make(accumulate: int = 1, apart: bool = False, changed=loss):
    recipe, data = recipe_and_data(accumulate)
    params = jax.tree.map(jnp.array, {"net": PARAMS})
    optimizer = make_optimizer(recipe, 4, params)
    step = make_step(changed, optimizer, recipe, data, seed=0, apart=apart)
    return step, initial_state(params, {"net": {}}, optimizer, recipe)


def trained(step, state, count: int = 3):
    for batch in batches(count):
        state, metrics = step(state, {}, batch)
    return jax.tree.map(np.asarray, (state, metrics))


def assert_same(a, b):
    for one, other in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_without(accumulate, monkeypatch):
    """In two programs, which have none, and with the library's loop."""
    step, state = make(accumulate)
    found = trained(step, state)
    assert set(step.buffers.names) == KERNELS
    in_two = trained(*make(accumulate, apart=True))
    monkeypatch.setattr(backend, "is_one_cpu", lambda: False)
    plain, state = make(accumulate)
    by_scan = trained(plain, state)
    assert not plain.buffers.names
    for expected in (in_two, by_scan):
        assert_trees_close(found, expected, OUTPUT_TOLERANCE)


def test_the_arrays_stay_where_they_are():
    step, state = make()
    places = []
    for batch in batches(3):
        state, _ = step(state, {}, batch)
        arrays = step.buffers.arrays
        places.append({name: array.unsafe_buffer_pointer() for name, array in arrays.items()})
    assert set(places[0]) == KERNELS
    assert places[0] == places[1] == places[2]


def test_a_step_that_failed_goes_on_with_others():
    """The program had taken over the arrays."""
    step, state = make()
    state, _ = step(state, {}, next(batches(1)))
    taken = step.buffers.take(state["params"])
    assert set(taken) == KERNELS
    state, metrics = step(state, {}, next(batches(1)))
    assert np.isfinite(metrics["loss"])
    assert set(step.buffers.arrays) == KERNELS


def test_what_is_not_written_in_place_is_not_kept():
    """Half of the experts' layers are changed before they are used: their gradient is another's."""

    def changing(trainable, *arguments):
        def double(path, leaf):
            return 2 * leaf if "fc1" in str(path) else leaf

        return loss(jax.tree_util.tree_map_with_path(double, trainable), *arguments)

    step, state = make(changed=changing)
    trained(step, state)
    assert set(step.buffers.names) == {name for name in KERNELS if "fc2" in name}


def test_joint_jobs_have_arrays_each():
    recipe, data = recipe_and_data()
    params = {job: jax.tree.map(jnp.array, {"net": PARAMS}) for job in "ab"}
    jobs = {job: (make_optimizer(recipe, 4, own), recipe) for job, own in params.items()}

    def joint(trainable, frozen, batch, key):
        values = {job: loss(own, frozen, batch, key)[0] for job, own in trainable.items()}
        return sum(values.values()), {job: {"loss": value} for job, value in values.items()}

    step = make_joint_step(joint, jobs, data, 0)
    states = {
        job: initial_state(params[job], {"net": {}}, optimizer, recipe)
        for job, (optimizer, recipe) in jobs.items()
    }
    states, _ = trained(step, states)
    assert set(step.buffers.names) == {f"{job}/{name}" for job in "ab" for name in KERNELS}
    assert_same(states["a"], states["b"])


def test_a_step_inside_another_program_keeps_nothing():
    step, state = make()
    after, _ = jax.eval_shape(step, state, {}, next(batches(1)))
    assert not step.buffers.arrays
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    state, _ = step(state, {}, next(batches(1)))
    assert set(step.buffers.arrays) == KERNELS


def test_a_state_that_is_constant_in_another_program():
    step, state = make()
    batch = next(batches(1))
    inside = jax.jit(lambda batch: step(state, {}, batch)[1]["loss"])(batch)
    state, metrics = step(state, {}, batch)
    assert_close(inside, metrics["loss"], OUTPUT_TOLERANCE)
    again, _ = make()
    again(jax.tree.map(jnp.array, state), {}, batch)
    jax.eval_shape(lambda batch: again(state, {}, batch), batch)
    again(state, {}, batch)  # no array of the other program is left in it


def test_the_arrays_go_with_the_step():
    """At once, without a collection of garbage."""
    step, state = make()
    step(state, {}, next(batches(1)))
    kept = [weakref.ref(array) for array in step.buffers.arrays.values()]
    assert len(kept) == len(KERNELS)
    gc.disable()
    try:
        del step
        assert not any(array() is not None for array in kept)
    finally:
        gc.enable()


def test_only_sorted_rows_are_read_in_their_stacks():
    """Others have second derivatives, which a constant stack would not show."""
    for dispatch, router, expected in (
        ("dropless", "published", True),
        ("capacity", "published", False),
        ("dropless", "expert_choice", False),
    ):
        spec = dataclasses.replace(SPEC, dispatch=dispatch, router=router)
        assert spec.sorts_rows(training=True) == expected
        assert spec.sorts_rows(training=False) == (router == "published")
