"""Routers: who goes where, by hand-written logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2mkd_jax.models import chain
from m2mkd_jax.models.moe import router
from m2mkd_jax.models.moe.spec import ROUTERS, RouterSpec
from tests.support import assert_close

# One group of three tokens and four experts.
LOGITS = jnp.asarray([[[2.0, 0.0, 1.0, -1.0], [0.0, 3.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0]]])
FLOAT32 = 1e-6


def softmax(row) -> np.ndarray:
    e = np.exp(np.asarray(row, np.float64))
    return e / e.sum()


def test_published_weighs_the_best_two_alone():
    routing = router.published(LOGITS, 2)
    np.testing.assert_array_equal(routing.experts[0], [[0, 2], [1, 3], [0, 1]])
    # softmax(2, 1), softmax(3, 2), softmax(1, 1)
    expected = [softmax([2, 1]), softmax([3, 2]), [0.5, 0.5]]
    np.testing.assert_allclose(routing.weights[0], expected, rtol=FLOAT32)
    assert routing.order is None


def test_vmoe_keeps_the_softmax_over_all_and_serves_the_surest_first():
    routing = router.vmoe(LOGITS, 2)
    np.testing.assert_array_equal(routing.experts[0], [[0, 2], [1, 3], [0, 1]])
    every = [softmax(row) for row in LOGITS[0]]
    expected = [[every[0][0], every[0][2]], [every[1][1], every[1][3]], [0.25, 0.25]]
    np.testing.assert_allclose(routing.weights[0], expected, rtol=FLOAT32)
    # Largest weights: e^2 / (e^2 + 1 + e + 1/e) = .644, e^3 / (1 + e^3 + e^.5 + e^2) = .667, .25.
    np.testing.assert_array_equal(routing.order, [[1, 0, 2]])


def test_experts_choose_their_best_tokens():
    routing = router.expert_choice(LOGITS, 2)
    every = np.stack([softmax(row) for row in LOGITS[0]])  # (S, E)
    # Columns: .644 .033 .250 | .087 .667 .250 | .237 .055 .250 | .032 .245 .250
    np.testing.assert_array_equal(routing.tokens[0], [[0, 2], [1, 2], [2, 0], [2, 1]])
    expected = np.take_along_axis(every.T, np.asarray(routing.tokens[0]), 1)
    np.testing.assert_allclose(routing.weights[0], expected, rtol=FLOAT32)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_best_is_top_k_in_value_place_and_gradient(count):
    draw = np.random.default_rng(0)
    values = jnp.asarray(draw.integers(0, 4, (3, 7, 5)), jnp.float32)  # full of ties
    weights = jnp.asarray(draw.normal(size=(3, 7, count)), jnp.float32)

    def value(find, values):
        found, places = find(values, count)
        return jnp.sum(found * weights), (found, places)

    ours, theirs = (
        jax.value_and_grad(lambda v, f=f: value(f, v), has_aux=True)(values)
        for f in (router.best, jax.lax.top_k)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_slots_are_the_even_share_times_the_factor():
    capacity = lambda s, **kw: RouterSpec("vmoe", 8, **kw).capacity(s)
    assert capacity(17) == 6  # ceil(1.25 * 17 * 2 / 8) = ceil(5.3)
    assert capacity(16, capacity_factor=1.0) == 4  # 16 * 2 / 8
    assert capacity(16, top_k=1, capacity_factor=0.1) == 1  # ceil(0.2)
    assert capacity(16, capacity_factor=100.0) == 16  # a token takes one slot of an expert at most


def make_router(kind: str, **options) -> router.Router:
    spec = RouterSpec(kind, 4, **options)
    parts = chain.abstract(lambda rngs: router.Router(spec, 6, rngs=rngs))
    draw = np.random.default_rng(1)
    params = {"kernel": draw.normal(size=(6, 4)), "bias": draw.normal(size=4)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return chain.merge(parts.graph, {"linear": params}, {})


TOKENS = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 6)), jnp.float32)


@pytest.mark.parametrize("kind", ROUTERS)
def test_only_the_vmoe_router_is_noisy_and_only_with_a_key(kind):
    network = make_router(kind)
    key = jax.random.key(3)
    quiet, again, noisy = network(TOKENS), network(TOKENS, None), network(TOKENS, key)
    jax.tree.map(np.testing.assert_array_equal, quiet, again)
    same = all(
        (a == b).all() for a, b in zip(*map(jax.tree.leaves, (quiet[0], noisy[0])), strict=True)
    )
    assert same == (kind != "vmoe")
    assert (noisy[1]["load_loss"] > 0) == (kind == "vmoe") and quiet[1]["load_loss"] == 0
    if kind == "vmoe":
        # The noise is normal, of standard deviation noise / experts.
        network = make_router(kind, noise=2.0)
        noise = 2.0 / 4 * jax.random.normal(key, (2, 5, 4))
        expected = router.vmoe(network.logits(TOKENS) + noise, 2)
        jax.tree.map(np.testing.assert_array_equal, network(TOKENS, key)[0], expected)
        assert make_router(kind, noise=0.0)(TOKENS, key)[1]["load_loss"] == 0


def test_the_linear_layer_is_in_float32():
    network = make_router("published")
    kernel, bias = network.linear.kernel[...], network.linear.bias[...]
    half = TOKENS.astype(jnp.bfloat16)
    logits = network.logits(half)
    assert logits.dtype == jnp.float32
    expected = np.asarray(half, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    assert_close(logits, expected, 1e-6)
    _, seen = network(half)
    gates = np.apply_along_axis(softmax, -1, expected)
    assert_close(seen["entropy"], -(gates * np.log(gates)).sum(-1).mean(), 1e-6)
    share = gates.mean((0, 1))
    assert_close(seen["importance_loss"], share.var() / share.mean() ** 2, 1e-5)


def test_init_is_the_transformers():
    spec = RouterSpec("published", 64)
    kernel = router.Router(spec, 256, rngs=nnx.Rngs(0)).linear.kernel[...]
    # 16384 draws: the standard error of a standard deviation is 0.02 / sqrt(2 n) = 1.1e-4.
    assert abs(float(kernel.std()) - 0.02) < 5e-4 and abs(float(kernel.mean())) < 8e-4


def test_load_is_a_share_of_all_assignments():
    routing = router.published(LOGITS, 2)  # experts 0 2, 1 3, 0 1
    np.testing.assert_allclose(router.load(routing, 4), [2 / 6, 2 / 6, 1 / 6, 1 / 6], rtol=FLOAT32)
    np.testing.assert_allclose(router.load(router.expert_choice(LOGITS, 2), 4), [0.25] * 4)
