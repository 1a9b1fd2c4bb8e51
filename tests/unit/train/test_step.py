"""The step on a linear model without noise, where a batch in parts must equal it whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.config.defaults import base
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.step import evaluated_params, initial_state, make_step
from tests.support import assert_close

BATCH, SIDE, CLASSES = 12, 4, 5


def setting(accumulate: int, ema: float):
    config = base()
    recipe, data = config.recipes.pt, config.data
    recipe.epochs, recipe.batch, recipe.lr_per, recipe.lr = 4, BATCH, 0, 1e-2
    recipe.mixup = recipe.cutmix = 0.0
    recipe.clip = 0.3
    recipe.accumulate, recipe.ema = accumulate, ema
    data.image_size, data.classes = SIDE, CLASSES
    return recipe, data


def loss(trainable, frozen, batch, key):
    del frozen, key
    x = batch["image"].reshape(len(batch["image"]), -1)
    logits = x @ trainable["model"]["kernel"] + trainable["model"]["bias"][None]
    value = -(batch["target"] * jax.nn.log_softmax(logits)).sum(-1).mean()
    return value, {"loss": value}


def trained(accumulate: int, ema: float, updates: int = 3) -> dict:
    """The state after some updates, each with a batch in `accumulate` parts."""
    return trained_and_norm(accumulate, ema, updates)[0]


def trained_and_norm(
    accumulate: int, ema: float, updates: int = 3, apart: bool = False
) -> tuple[dict, float]:
    """`trained`, and the gradient norm of the last update; `apart` as for `make_step`."""
    recipe, data = setting(accumulate, ema)
    rng = np.random.default_rng(0)
    params = {
        "model": {
            "kernel": jnp.asarray(rng.normal(size=(3 * SIDE**2, CLASSES)), jnp.float32),
            "bias": jnp.zeros(CLASSES),
        }
    }
    optimizer = make_optimizer(recipe, updates, params)
    state = initial_state(params, {"model": {}}, optimizer, recipe)
    step = make_step(loss, optimizer, recipe, data, seed=0, apart=apart)
    for _ in range(updates):
        images = rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
        labels = rng.integers(0, CLASSES, BATCH, np.int32)
        parts = np.split(images, accumulate), np.split(labels, accumulate)
        for image, label in zip(*parts, strict=True):
            state, metrics = step(state, {}, {"image": image, "label": label})
    return state, float(metrics["gradient_norm"])


@pytest.mark.parametrize("accumulate", [2, 3])
def test_a_batch_in_parts_is_the_batch(accumulate):
    """The weights, and their average, which must not move more often than they do."""
    whole, parts = trained(1, ema=0.9), trained(accumulate, ema=0.9)
    for a, b in zip(
        jax.tree.leaves([parts["params"], parts["ema"]]),
        jax.tree.leaves([whole["params"], whole["ema"]]),
        strict=True,
    ):
        assert_close(a, b, 1e-5)
    assert int(parts["step"]) == accumulate * int(whole["step"])


def test_evaluation_takes_the_average_where_there_is_one():
    with_average, without = trained(1, ema=0.9), trained(1, ema=0.0)
    assert "ema" not in without
    kernel = lambda state: evaluated_params(state)["model"]["kernel"]
    assert (kernel(without) == with_average["params"]["model"]["kernel"]).all()
    assert (kernel(with_average) == with_average["ema"]["model"]["kernel"]).all()
    assert float(jnp.abs(kernel(with_average) - kernel(without)).max()) > 1e-3


def test_the_gradient_norm_of_a_batch_in_parts_is_that_of_the_batch():
    assert trained_and_norm(3, ema=0.0)[1] == pytest.approx(trained_and_norm(1, ema=0.0)[1], 1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_in_two_programs_is_the_same(accumulate):
    one, norm = trained_and_norm(accumulate, ema=0.9)
    two, norm_in_two = trained_and_norm(accumulate, ema=0.9, apart=True)
    assert norm == norm_in_two
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(accumulate, apart):
    recipe, data = setting(accumulate, ema=0.9)
    params = {"model": {"kernel": jnp.ones((3 * SIDE**2, CLASSES)), "bias": jnp.zeros(CLASSES)}}
    optimizer = make_optimizer(recipe, 4, params)

    def breaking(trainable, frozen, batch, key):
        value, metrics = loss(trainable, frozen, batch, key)
        value = jnp.where(batch["target"][0, 0] > 0.5, jnp.nan, value)  # a label of 0
        return value, metrics | {"loss": value}

    step = make_step(breaking, optimizer, recipe, data, seed=0, apart=apart)
    image = np.arange(BATCH * SIDE**2 * 3, dtype=np.uint8).reshape(BATCH, SIDE, SIDE, 3)
    good = {"image": image, "label": np.ones(BATCH, np.int32)}
    bad = {"image": image, "label": np.zeros(BATCH, np.int32)}
    recipe.smoothing = 0.0
    state = initial_state(params, {"model": {}}, optimizer, recipe)
    state, _ = step(state, {}, good)
    before = jax.tree.map(np.asarray, state)
    after, metrics = step(jax.tree.map(jnp.asarray, before), {}, bad)
    assert not np.isfinite(metrics["loss"])
    assert (int(after["step"]), int(after["skipped"])) == (2, 1)
    for name in ("params", "opt_state", "ema"):
        for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_copies_nothing_on_a_cpu(accumulate, ema, apart):
    recipe, data = setting(accumulate, ema)
    params = {"model": {"kernel": jnp.ones((3 * SIDE**2, 96)), "bias": jnp.zeros(CLASSES)}}
    optimizer = make_optimizer(recipe, 4, params)

    def simple(trainable, frozen, batch, key):
        value = jnp.square(trainable["model"]["kernel"]).sum() * batch["image"].mean()
        return value, {"loss": value}

    step = make_step(simple, optimizer, recipe, data, seed=0, apart=apart)
    state = initial_state(params, {"model": {}}, optimizer, recipe)
    image = np.ones((BATCH, SIDE, SIDE, 3), np.uint8)
    batch = {"image": image, "label": np.ones(BATCH, np.int32)}
    programs = [program.result() for program in step.begin(state, {}, batch).compiled]
    assert len(programs) == 1 + apart
    lines = [line for program in programs for line in program.as_text().splitlines()]
    copies = [line for line in lines if " copy(" in line]
    assert not [line for line in copies if f"f32[{3 * SIDE**2},96]" in line]
