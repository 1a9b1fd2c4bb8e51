"""The training loop reads device arrays only to log and to evaluate, by `jax.device_get`.

Arrays on the CPU share the host's memory, so that jax's transfer guard does not see their being
read. The test therefore also counts the reads of an array's value.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.config.defaults import base
from m2mkd_jax.train.loop import Loop
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.schedule import learning_rate
from m2mkd_jax.train.step import initial_state, make_step

BATCH, SIDE, CLASSES, STEPS = 4, 2, 3, 7


class HostSync(AssertionError):
    """An array of the device was read without `jax.device_get`."""


@pytest.fixture
def guarded(monkeypatch):
    """Makes reading an array raise HostSync, except in `jax.device_get`; yields those calls."""
    array = type(jnp.zeros(()))
    device_get, reads = jax.device_get, []
    state = {"explicit": True}

    def explicit(tree):
        reads.append(tree)
        before, state["explicit"] = state["explicit"], True
        try:
            return device_get(tree)
        finally:
            state["explicit"] = before

    def checked(read):
        def method(self, *args, **kwargs):
            if not state["explicit"]:
                raise HostSync("read an array outside of jax.device_get")
            return read(self, *args, **kwargs)

        return method

    monkeypatch.setattr(array, "_value", property(checked(array._value.fget)))
    for name in ("__array__", "__float__", "__int__", "__bool__", "item", "block_until_ready"):
        monkeypatch.setattr(array, name, checked(getattr(array, name)))
    monkeypatch.setattr(jax, "device_get", explicit)
    yield lambda: state.update(explicit=False), reads
    state["explicit"] = True


def loss(trainable, frozen, batch, key):
    del frozen, key
    logits = batch["image"].reshape(BATCH, -1) @ trainable["model"]["kernel"]
    value = -(batch["target"] * jax.nn.log_softmax(logits)).sum(-1).mean()
    return value, {"loss": value, "per_layer": jnp.stack([value, value])}


def make_loop():
    """A loop over a linear model that logs every third step, its state and its batches."""
    config = base()
    recipe, data = config.recipes.pt, config.data
    recipe.epochs, recipe.batch, recipe.warmup_epochs = STEPS, BATCH, 1
    data.image_size, data.classes = SIDE, CLASSES
    params = {"model": {"kernel": jnp.ones((3 * SIDE**2, CLASSES))}}
    optimizer = make_optimizer(recipe, 1, params)
    state = initial_state(params, {"model": {}}, optimizer, recipe)
    step = make_step(loss, optimizer, recipe, data, seed=0)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, BATCH, np.int32),
    }
    logs = []
    loop = Loop(
        name="job",
        step=step,
        frozen={},
        total_steps=STEPS,
        log_every=3,
        evaluate_every=4,
        evaluate=lambda state: {"eval_loss": float(jax.device_get(state["step"]))},
        log=logs.append,
        save=lambda step, state, metrics: None,
        save_seconds=1e9,
        stop=None,
        learning_rate=learning_rate(recipe, 1),
    )
    return loop, state, itertools.repeat(batch), logs


def run_guarded(guarded, loop, state, batches):
    start, reads = guarded
    # Compiling may read constants; the loop continues from the state after the first step.
    state, _ = loop.step(state, loop.frozen, next(batches))
    loop.learning_rate(0)
    start()
    with jax.transfer_guard_device_to_host("disallow"):
        loop.run(state, batches, start=1)
    return reads


def test_only_logs_and_evaluations_read_from_the_device(guarded):
    loop, state, batches, logs = make_loop()
    reads = run_guarded(guarded, loop, state, batches)
    assert [entry["step"] for entry in logs] == [4, 4, 7, 7]
    assert all(np.isfinite(entry["loss"]) for entry in logs if "loss" in entry)
    assert len(reads) == 4  # two log entries and two evaluations


@pytest.mark.parametrize("read", [float, np.asarray, lambda loss: loss.block_until_ready()])
def test_a_step_that_waits_for_the_device_is_noticed(guarded, read):
    loop, state, batches, _ = make_loop()
    step = loop.step

    def waiting(*arguments):
        state, metrics = step(*arguments)
        if len(calls) > 0:
            read(metrics["loss"])
        calls.append(metrics)
        return state, metrics

    calls = []
    loop.step = waiting
    with pytest.raises((HostSync, jax.errors.JaxRuntimeError)):
        run_guarded(guarded, loop, state, batches)
