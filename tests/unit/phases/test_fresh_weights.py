"""Initial weights are those that the random numbers of flax.nnx give."""

import jax
import pytest
from flax import nnx

from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from tests.e2e import tiny, tiny_vmoe
from tests.support import assert_close


@pytest.mark.parametrize("config", [tiny, tiny_vmoe])
def test_initial_weights_are_those_of_nnx_rngs(config):
    """Keys that are computed many at a time are the keys of a plain stream, stacks included."""
    config = config.get_config()
    stages = {
        name: spec.build
        for job in ("pt", "m2mkd/1", "e2e_scratch")
        for name, spec in build_phase(config, job).stages.items()
    }
    for build in [*stages.values(), Many]:
        key = jax.random.key(7)
        drawn = chain.initialise(build, key)
        plain = chain.split(jax.jit(lambda key, build=build: build(nnx.Rngs(key)))(key))
        assert drawn.params.keys() == plain.params.keys()
        expected = jax.tree.leaves((plain.params, plain.fixed))
        for mine, theirs in zip(
            jax.tree.leaves((drawn.params, drawn.fixed)), expected, strict=True
        ):
            assert_close(mine, theirs, 1e-6, "weights")


class Many(nnx.Module):
    """More arrays than keys are computed at a time."""

    def __init__(self, rngs: nnx.Rngs):
        self.arrays = nnx.List(
            [nnx.Param(jax.random.normal(rngs.params(), (2,))) for _ in "x" * 70]
        )
