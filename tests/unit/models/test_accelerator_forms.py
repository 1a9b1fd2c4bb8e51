"""What GPUs and TPUs compute by other means than a CPU (products, what is kept) is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import vmoe
from m2mkd_jax.models.nac.circuit import NAC
from tests import tiny_nac
from tests.random_params import random_params
from tests.support import GRADIENT_TOLERANCE, assert_trees_close

VIT = vit.ViTSpec(16, 8, 12, 2, 5)
VMOE = vmoe.VMoESpec(VIT, (0, 1), experts=3)
# A tokenizer that starts with four channels: of two a norm leaves the signs, without gradient.
NAC_SPEC = tiny_nac.spec_with(state_dim=16, iterations=1)
BUILDERS = {
    "nac": lambda rngs: NAC(NAC_SPEC, rngs=rngs),
    "vit": lambda rngs: vit.ViTStage(VIT, 2, first=True, last=True, rngs=rngs),
    "vmoe": functools.partial(vmoe.build_stage, VMOE, 0, (2,)),
}


def gradients(name: str, backend: str):
    """Gradients of a training step's logits, all noise on, on a CPU that is taken for another."""
    build = BUILDERS[name]
    parts = chain.abstract(lambda rngs: build(rngs=rngs))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 3)), jnp.float32)

    def loss(params):
        stage = chain.merge(parts.graph, params, {})
        rates = (0.2,) * stage.depth
        logits = chain.run([stage], images, rates=[rates], key=jax.random.key(1), train=True)
        return jnp.sin(logits).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        lowered = tiny_nac.jit(jax.grad(loss)).lower(random_params(parts.params, 3))
    found = lowered.compile()(random_params(parts.params, 3))
    if name == "nac":  # cancels in the pooling's softmax: zero but for rounding
        del found["pooling"]["confidence"]["bias"]
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_are_those_of_a_cpu(name):
    expected = gradients(name, "cpu")
    for backend in ("gpu", "tpu"):
        assert_trees_close(gradients(name, backend), expected, GRADIENT_TOLERANCE)
