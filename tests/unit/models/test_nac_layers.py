"""Options of a NAC's kernels, layers and output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.kernels import sample
from m2mkd_jax.models.nac.modulation import ModulatedFFN
from tests.random_params import random_params
from tests.support import OUTPUT_TOLERANCE, assert_close
from tests.tiny_nac import (
    BATCH,
    SPEC,
    differ,
    evaluate,
    images,
    jit,
    leaf_at,
    network,
    params_of,
    parts,
    propagated,
    spec_with,
    with_leaf,
)

# Kernels


def test_truncations():
    states = propagated(spec_with(truncation=None))
    # No distance is above 2.
    assert_close(propagated(spec_with(truncation=2.5)), states, OUTPUT_TOLERANCE)
    assert differ(propagated(SPEC), states)
    masked = spec_with(truncation_implementation="masked")
    assert_close(propagated(masked), propagated(SPEC), OUTPUT_TOLERANCE)


@pytest.mark.parametrize("truncation", [1e-3, -1.0], ids=["itself", "nobody"])
def test_a_truncated_mediator_does_not_hear_the_others(truncation):
    spec = spec_with(truncation=truncation)
    distances = 1 - jnp.eye(SPEC.mediator_latents)
    log = network(spec).propagator_kernel(distances, jnp.float32(1.0), 1)
    heard = np.isfinite(log)
    assert (heard == (np.eye(SPEC.mediator_latents, dtype=bool) & (truncation > 0))).all()
    silent = jnp.zeros((BATCH, SPEC.input_latents, SPEC.state_dim))
    states = propagated(spec)
    assert np.isfinite(states).all()
    assert (propagated(spec, inputs=silent) == states).all()


def test_truncated_links_leak_when_sampled():
    """As published: probabilities are clamped away from 0."""
    spec = spec_with(truncation=-1.0)
    net, distance = network(spec), jnp.ones((5, 8))
    log = net.propagator_kernel(distance, jnp.float32(1.0), BATCH, jax.random.key(0))
    assert log.shape == (BATCH, 5, 8) and np.isfinite(log).all() and (log <= 0).all()


def test_sampled_kernels_in_16_bits():
    """The float32 sample and its gradient, rounded to the type in which they are used."""
    draw = np.random.default_rng(0)
    log = -jnp.asarray(draw.uniform(0.01, 3.0, (5, 8)), jnp.float32)
    uniform = jnp.asarray(draw.uniform(size=(BATCH, 5, 8)), jnp.float32)
    pull = jnp.asarray(draw.normal(size=(BATCH, 5, 8)), jnp.bfloat16)
    results = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        y, pullback = jax.vjp(lambda log, dtype=dtype: sample(log, uniform, 0.5, dtype), log)
        results[dtype] = y, pullback(pull.astype(dtype))[0]
        assert y.dtype == dtype and results[dtype][1].dtype == jnp.float32
    (wide, wide_slope), (half, half_slope) = results.values()
    np.testing.assert_array_equal(half, wide.astype(jnp.bfloat16))
    assert_close(half_slope, wide_slope, 1e-2)


# Layers


def test_gelu_is_a_geglu_whose_values_are_one():
    codes = jnp.asarray(np.random.default_rng(0).normal(size=(4, SPEC.code_dim)), jnp.float32)
    states = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, SPEC.state_dim)), jnp.float32)
    built = {
        geglu: chain.abstract(
            lambda rngs, geglu=geglu: ModulatedFFN(spec_with(geglu=geglu), 0.1, rngs=rngs)
        )
        for geglu in (True, False)
    }
    plain = random_params(built[False].params, 0)
    kernel, bias = plain["fc1"]["kernel"], plain["fc1"]["bias"]
    wide = {
        "kernel": jnp.concatenate([jnp.zeros_like(kernel), kernel], -1),
        "bias": jnp.concatenate([jnp.ones_like(bias), bias]),
    }
    gated = {**plain, "fc1": {**plain["fc1"], **wide}}
    run = lambda geglu, p: jit(chain.merge(built[geglu].graph, p, {}).__call__)(states, codes)
    assert_close(run(True, gated), run(False, plain), OUTPUT_TOLERANCE)


def test_qkv_biases():
    spec = spec_with(qkv_bias=True)
    params = params_of(spec)
    biases = [
        f"{part}/{name}"
        for part in ("read_in/attention", "propagators/attention", "read_out/attention")
        for name in ("query", "key", "value")
    ]
    none = params
    for path in biases:
        none = with_leaf(none, f"{path}/bias", jnp.zeros_like(leaf_at(none, f"{path}/bias")))
    without = jax.tree.map(lambda a: a, params)
    for path in biases:
        del leaf_at(without, path)["bias"]
    assert_close(evaluate(spec, none), evaluate(SPEC, without), OUTPUT_TOLERANCE)
    for path in biases:
        one = with_leaf(none, f"{path}/bias", leaf_at(params, f"{path}/bias"))
        # A bias on the keys shifts all scores of a query alike.
        if path.endswith("key"):
            assert_close(evaluate(spec, one), evaluate(spec, none), OUTPUT_TOLERANCE)
        else:
            assert (evaluate(spec, one) != evaluate(spec, none)).any(), path


def test_first_slot():
    spec = spec_with(output="first_slot", classes=SPEC.state_dim)
    assert "pooling" not in parts(spec).params
    states = jit(lambda p, x: network(spec, p).forward(x, {}))(params_of(spec), images())
    assert_close(evaluate(spec), states["output"][:, 0], OUTPUT_TOLERANCE)


def test_pooling():
    """Both are a plain softmax when nothing is drawn; only 'gumbel' draws."""
    vanilla = spec_with(pooling="vanilla")
    assert (evaluate(vanilla, params_of(SPEC)) == evaluate(SPEC)).all()
    key = jax.random.key(0)
    assert "gumbel" in network(SPEC).draw_noise(key, BATCH)
    assert "gumbel" not in network(vanilla).draw_noise(key, BATCH)
    assert differ(evaluate(SPEC, key=key), evaluate(vanilla, params_of(SPEC), key=key))


@pytest.mark.parametrize("kind", ["l2", "none", "sigmoid", "tanh"])
def test_modulations(kind):
    codes = jnp.asarray(np.random.default_rng(0).normal(size=(4, SPEC.code_dim)), jnp.float32)
    for add_one in (True, False):
        layer = network(spec_with(modulation=kind, add_one=add_one)).read_in.attention.query
        scale = np.asarray(codes @ layer.scale.kernel[...], np.float64)
        expected = {
            "l2": lambda s: s / np.linalg.norm(s, axis=-1, keepdims=True),
            "none": lambda s: s,
            "sigmoid": lambda s: 1 / (1 + np.exp(-s)),
            "tanh": np.tanh,
        }[kind](scale)
        expected = float(layer.gain[...]) * expected + add_one
        assert_close(layer.modulation(codes), expected, OUTPUT_TOLERANCE)
