"""Propagators by fused kernels on a mesh: every device computes its own images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models import chain
from m2mkd_jax.models.nac import circuit
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.fused import choice
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.mesh import make_mesh, put_batch, with_mesh
from tests import tiny_nac
from tests.random_params import random_params
from tests.support import assert_trees_close

SPEC = tiny_nac.spec_with(
    state_dim=32, head_dim=16, heads=2, input_latents=64, mediator_latents=64, fused="always"
)


def gradients(devices: int, fused: bool, fsdp: bool = False):
    """Loss and gradients of a training step's logits with all noise on, on so many devices."""
    parts = chain.abstract(lambda rngs: NAC(SPEC, rngs=rngs))
    params = {"nac": random_params(parts.params, 3)}
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)

    def loss(params, batch, key):
        nac = chain.merge(parts.graph, params["nac"], {})
        logits = nac(batch["image"], rates=(0.3, 0.6), key=key, train=True)
        return jnp.sin(logits).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuit, "is_fused", lambda *arguments: fused)
        mesh = make_mesh(jax.devices()[:devices], expert=min(2, devices))
        placed = partition.put(params, partition.shardings(mesh, params, fsdp=fsdp))
        run = jax.jit(with_mesh(mesh, jax.value_and_grad(loss)))
        value, grads = run(placed, put_batch(mesh, {"image": images}), jax.random.key(1))
    del grads["nac"]["pooling"]["confidence"]["bias"]  # zero but for rounding
    return value, grads


@pytest.fixture(scope="module")
def on_one_device():
    return gradients(1, fused=False)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_mesh_changes_nothing(fsdp, on_one_device):
    found = gradients(8, fused=True, fsdp=fsdp)
    np.testing.assert_allclose(found[0], on_one_device[0], rtol=1e-5)
    assert_trees_close(found[1], on_one_device[1], 1e-4)


def test_devices_share_the_images_evenly(monkeypatch):
    monkeypatch.setattr(choice, "has_tensor_cores", lambda: True)
    asked = {}

    def ask(x):
        for batch in (8, 12):
            asked[batch] = choice.is_fused(SPEC, batch, jnp.bfloat16)
        return x

    jax.jit(with_mesh(make_mesh(), ask)).lower(dataclasses.asdict(SPEC)["gain"])
    assert asked == {8: True, 12: False}
