"""The rewritten read-in attention equals the published one: values and all gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.read_in import ReadInAttention
from tests import literal
from tests.random_params import random_params
from tests.support import NAC_SPEC, OUTPUT_TOLERANCE, assert_close

BATCH = 2
NAMES = tuple(jax.tree_util.DictKey(name) for name in ("key", "kernel"))
KERNEL = (jax.tree_util.SequenceKey(0), *NAMES)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_equals_the_literal_one(qkv_bias, residual):
    spec = dataclasses.replace(NAC_SPEC, qkv_bias=qkv_bias, read_in_residual=residual)
    parts = chain.abstract(lambda rngs: ReadInAttention(spec, rngs=rngs))
    params = random_params(parts.params, seed=3)
    assert ("bias" in params["key"]) == qkv_bias
    rng = np.random.default_rng(4)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    inputs = {
        "receivers": normal(BATCH, spec.input_latents, spec.state_dim),
        "codes": normal(spec.input_latents, spec.code_dim),
        "tokens": normal(BATCH, spec.grid**2, spec.token_dim),
    }
    weight = normal(BATCH, spec.input_latents, spec.state_dim)

    def loss(params, inputs, attend):
        out = attend(chain.merge(parts.graph, params, {}), **inputs)
        return (weight * out).sum(), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    expected, expected_out = run(params, inputs, literal.read_in)
    actual, actual_out = run(params, inputs, ReadInAttention.__call__)
    assert_close(actual_out, expected_out, OUTPUT_TOLERANCE, "output")
    expected = dict(jax.tree_util.tree_leaves_with_path(expected))
    largest = float(np.abs(expected[KERNEL]).max())
    for path, value in jax.tree_util.tree_leaves_with_path(actual):
        name = jax.tree_util.keystr(path)
        if name == "[0]['key']['bias']":
            # Zero by theory: it drops out of the softmax. The literal one gives rounding noise.
            assert not value.any()
            assert np.abs(expected[path]).max() <= OUTPUT_TOLERANCE * largest
            continue
        # Nothing is compared that is zero, e.g. because all tokens are attended to alike.
        assert np.abs(expected[path]).max() > 1e-3, name
        assert_close(value, expected[path], OUTPUT_TOLERANCE, name)
