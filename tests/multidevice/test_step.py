"""A training step on eight devices equals the step on one."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from m2mkd_jax.losses import Program, graph_regulariser
from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.parallel.mesh import batch_sharding, make_mesh, put_batch, replicated
from m2mkd_jax.train.step import initial_state, make_step
from tests.support import NAC_SPEC, assert_trees_close

RECIPE = SimpleNamespace(
    ema=0.5, mixup=0.8, cutmix=1.0, switch_prob=0.5, mix_prob=1.0, smoothing=0.1
)
DATA = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3, classes=10)
HINGE = SimpleNamespace(weight=0.1, hinge=0.4)


def train(devices, expert: int, steps: int = 3):
    build = lambda rngs: NAC(NAC_SPEC, rngs=rngs)  # noqa: E731
    stage = chain.initialise(build, jax.random.key(0))
    regulariser = graph_regulariser("hinge", HINGE)
    program = Program(
        {"nac": stage.graph},
        ("nac",),
        ("nac",),
        rates=((0.1,) * NAC_SPEC.iterations,),
        regulariser=lambda stages: regulariser(stages["nac"]),
    )
    # Plain descent: Adam divides rounding noise by itself where a gradient is zero.
    optimizer = optax.sgd(1e-2, momentum=0.9)
    mesh = make_mesh(devices, expert)
    state = initial_state({"nac": stage.params}, {"nac": stage.fixed}, optimizer, RECIPE)
    state = jax.device_put(state, replicated(mesh))
    step = make_step(program.loss, optimizer, RECIPE, DATA, seed=3)
    draw = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        batch = put_batch(
            mesh,
            {
                "image": draw.integers(0, 255, (16, 32, 32, 3), np.uint8),
                "label": draw.integers(0, 10, (16,), np.int32),
            },
        )
        assert batch["image"].sharding == batch_sharding(mesh)
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def single():
    return train(jax.devices()[:1], 1)


@pytest.mark.parametrize("expert", [1, 2])
def test_eight_devices_equal_one(single, expert):
    state, losses = train(jax.devices(), expert)
    np.testing.assert_allclose(losses, single[1], rtol=1e-5)
    assert int(state["step"]) == 3
    for name in ("params", "ema"):
        assert_trees_close(
            jax.device_get(state[name]), jax.device_get(single[0][name]), 1e-4
        )
