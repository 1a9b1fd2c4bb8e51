"""Chains: drop-path ramps, cutting a network otherwise, compute types."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.nac.circuit import NAC
from tests.random_params import random_params
from tests.support import (
    GRADIENT_TOLERANCE,
    NAC_SPEC,
    OUTPUT_TOLERANCE,
    VIT_SPECS,
    assert_close,
    assert_trees_close,
)

SPEC = vit.ViTSpec(16, 8, 12, 2, 5)
SMALL_NAC = dataclasses.replace(NAC_SPEC, image_size=16, tokenizer_depths=(1, 1), iterations=2)
BFLOAT16 = 3e-2  # a few roundings of 2^-8, relative to the largest logit


def images(size: int, batch: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)


def vit_stages(depths) -> list[vit.ViTStage]:
    stages = []
    for i in range(len(depths)):
        parts = chain.abstract(lambda rngs, i=i: vit.build(SPEC, depths, rngs=rngs)[i])
        stages.append(chain.merge(parts.graph, random_params(parts.params, i), {}))
    return stages


@pytest.mark.parametrize("depths, rate", [((2, 1, 3), 0.1), ((1, 1), 0.5), ((4,), 0.3)])
def test_drop_path_rates_grow_linearly_over_all_blocks(depths, rate):
    rates = chain.linear_rates(depths, rate)
    assert [len(r) for r in rates] == list(depths)
    total = sum(depths)
    expected = [rate * k / (total - 1) for k in range(total)]
    np.testing.assert_allclose([r for stage in rates for r in stage], expected, rtol=1e-12)


def test_drop_path_rates_of_nothing_and_of_one_block():
    assert chain.linear_rates((1,), 0.3) == [(0.0,)]
    assert chain.linear_rates((0, 2), 0.3) == [(), (0.0, 0.3)]
    assert chain.linear_rates((0, 0), 0.3) == [(), ()]


@pytest.mark.parametrize("depths", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1), (3, 0, 2), (0, 5)])
def test_a_network_cut_otherwise_computes_the_same(depths):
    stages, x = vit_stages((2, 3)), images(SPEC.image_size)
    run = lambda stages: jax.jit(lambda x: chain.run(stages, x))(x)
    parts = vit.cut(stages, depths)
    assert [stage.depth for stage in parts] == list(depths)
    assert_close(run(parts), run(stages), OUTPUT_TOLERANCE)


def test_a_cut_must_sum_to_the_network():
    with pytest.raises(UserError, match=r"depths \(2, 2\) sum to 4.* 5"):
        vit.cut(vit_stages((2, 3)), (2, 2))


def test_stages_get_different_keys():
    depths = (2, 2)
    stages, x = vit_stages(depths), images(SPEC.image_size, 8)
    rates = chain.linear_rates(depths, 0.5)

    @jax.jit
    def run(key):
        return chain.run(stages, x, rates=rates, key=key, train=True)

    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    assert (first == again).all() and not (first == other).all()
    # The same stage twice in a chain must not drop the same samples twice.
    middle = vit.cut(stages, (1, 2, 1))[1]
    tokens = jnp.ones((64, SPEC.tokens, SPEC.width))
    once = lambda key: middle(tokens, rates=(0.5, 0.5), key=key, train=True)
    key = jax.random.key(0)
    a, b = (jax.jit(once)(jax.random.fold_in(key, i)) for i in (0, 1))
    two = jax.jit(
        lambda key: chain.run([middle, middle], tokens, rates=[(0.5, 0.5)] * 2, key=key, train=True)
    )(key)
    assert not (a == b).all()
    second = jax.jit(
        lambda x, key: middle(x, rates=(0.5, 0.5), key=jax.random.fold_in(key, 1), train=True)
    )
    assert_close(two, second(a, key), OUTPUT_TOLERANCE)


def test_some_names_stay_in_float32():
    shapes = chain.abstract(lambda rngs: NAC(SMALL_NAC, rngs=rngs)).params
    cast = jax.eval_shape(lambda p: chain.cast_compute(p, jnp.bfloat16), shapes)
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        name = path[-1].key
        kept = name in ("signatures", "codes", "bandwidth", "gain")
        seen |= {name} if kept else set()
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), path
    assert seen == set(chain.FLOAT32_NAMES)
    params = {"kernel": jnp.ones(2)}
    assert chain.cast_compute(params, jnp.float32) is params


def nac_build(rngs):
    return NAC(SMALL_NAC, rngs=rngs)


def vit_build(rngs):
    return vit.build(SPEC, (3,), rngs=rngs)[0]


@pytest.mark.parametrize("build", [vit_build, nac_build], ids=["vit", "nac"])
def test_bfloat16_is_close_to_float32(build):
    parts = chain.abstract(build)
    params = random_params(parts.params, 0)
    x = images(16)

    def logits(dtype):
        run = lambda p, x: chain.merge(parts.graph, chain.cast_compute(p, dtype), {})(x)
        return jax.jit(run)(params, x.astype(dtype))

    half, full = logits(jnp.bfloat16), logits(jnp.float32)
    assert half.dtype == full.dtype == jnp.float32
    assert not (half == full).all()
    assert_close(half, full, BFLOAT16)


def test_joined_stages_compute_what_the_chain_does():
    spec = VIT_SPECS["a_vit_large"]
    build = lambda rngs, i: vit.build(spec, (2, 1, 1), rngs=rngs)[i]
    parts = [
        chain.initialise(lambda rngs, i=i: build(rngs, i), jax.random.key(i)) for i in range(3)
    ]
    x = jax.random.normal(jax.random.key(9), (2, 64, 64, 3))

    def value(params, join):
        stages = [chain.merge(p.graph, q, {}) for p, q in zip(parts, params, strict=True)]
        if join:
            stages, rates = chain.join(stages, [(0.0, 0.1), None, (0.3,)])
            assert len(stages) == 1 and rates == [(0.0, 0.1, 0.0, 0.3)]
        return jnp.square(chain.run(stages, x)).sum()

    params = [p.params for p in parts]
    run = jax.jit(jax.value_and_grad(value), static_argnums=1)
    apart, joined = run(params, False), run(params, True)
    assert_close(joined[0], apart[0], OUTPUT_TOLERANCE)
    assert_trees_close(joined[1], apart[1], GRADIENT_TOLERANCE)
