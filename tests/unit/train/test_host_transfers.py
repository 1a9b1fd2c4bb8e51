"""The training loop reads device arrays only to log and to evaluate, by `jax.device_get`.

Arrays on a CPU share the host's memory, and jax's transfer guard does not notice that they are
read. Here the loop therefore gets wrapped arrays, which only `jax.device_get` can read; the guard
is set as well, for accelerators.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.config.defaults import base
from m2mkd_jax.train.loop import Loop, Member
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.schedule import learning_rate
from m2mkd_jax.train.step import initial_state, make_step

BATCH, SIDE, CLASSES, STEPS = 4, 2, 3, 7


class HostSync(AssertionError):
    """An array of the device was read without `jax.device_get`."""


class OnDevice:
    """An array that only `jax.device_get` can read."""

    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        raise HostSync(f"{name} outside of jax.device_get")

    def _read(self, *_, **__):
        raise HostSync("read outside of jax.device_get")

    __array__ = __float__ = __int__ = __bool__ = __index__ = __len__ = __iter__ = _read
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __mul__ = __truediv__ = _read


def wrapped(tree):
    return jax.tree.map(OnDevice, tree)


def unwrapped(tree):
    return jax.tree.map(lambda leaf: leaf.value if type(leaf) is OnDevice else leaf, tree)


@pytest.fixture
def reads(monkeypatch):
    """What `jax.device_get` was called with."""
    device_get, calls = jax.device_get, []

    def get(tree):
        calls.append(tree)
        return device_get(unwrapped(tree))

    monkeypatch.setattr(jax, "device_get", get)
    return calls


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
    rate = learning_rate(recipe, 1)

    def wrapped_step(state, frozen, batch):
        return wrapped(step(unwrapped(state), frozen, batch))

    def joint_step(states, batch):
        state, metrics = wrapped_step(states["job"], {}, batch)
        return {"job": state}, {"job": metrics}

    member = Member(
        name="job",
        total_steps=STEPS,
        log=logs.append,
        save=lambda step, state, metrics, together: None,
        stop=None,
        learning_rate=lambda update: OnDevice(rate(update)),
    )
    loop = Loop(
        members=[member],
        step_of=lambda names: joint_step,
        log_every=3,
        evaluate_every=4,
        evaluate=lambda states: {
            "job": {"eval_loss": float(jax.device_get(states["job"]["step"]))}
        },
        save_seconds=1e9,
    )
    return loop, {"job": wrapped(state)}, itertools.repeat(batch), logs


def run_guarded(loop, states, batches, read=None):
    """Runs all but the first step; `read` is called with the loss after each of them."""
    # Compiling may read constants, so the first step is done without the guard.
    step = loop.step_of(("job",))
    states, _ = step(states, next(batches))
    loop.members[0].learning_rate(0)

    def reading_step(*arguments):
        states, metrics = step(*arguments)
        if read:
            read(metrics["job"]["loss"])
        return states, metrics

    loop.step_of = lambda names: reading_step
    with jax.transfer_guard_device_to_host("disallow"):
        loop.run(states, batches, start=1)


def test_only_logs_and_evaluations_read_from_the_device(reads):
    loop, state, batches, logs = make_loop()
    run_guarded(loop, state, batches)
    assert [entry["step"] for entry in logs] == [4, 4, 7, 7]
    assert all(np.isfinite(entry["loss"]) for entry in logs if "loss" in entry)
    assert len(reads) == 4  # two log entries and two evaluations


@pytest.mark.parametrize("read", [float, bool, np.asarray, np.mean, jax.block_until_ready])
def test_reading_after_every_step_is_noticed(reads, read):
    loop, state, batches, _ = make_loop()
    with pytest.raises(HostSync):
        run_guarded(loop, state, batches, read)
