"""Propagators by fused GPU kernels, interpreted on a CPU, are those of plain operations."""

import dataclasses
import sys
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernel_flops import OWN_PRODUCTS
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.flops import count_flops
from m2mkd_jax.models import attention as plain
from m2mkd_jax.models import chain, layers
from m2mkd_jax.models.nac import circuit
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.fused import agreement, attention, choice, feed_forward, layer
from m2mkd_jax.models.nac.fused.programs import Norm, Rows
from m2mkd_jax.models.nac.fused.residuals import Residual
from m2mkd_jax.parallel import backend
from tests import tiny_nac
from tests.random_params import random_params
from tests.support import assert_trees_close

# Rounding of float32 in sums of another order.
TOLERANCE = 1e-5
# Channels of which no power of two is a divisor but small ones, so that there are several chunks.
SPEC = tiny_nac.spec_with(
    state_dim=96, head_dim=16, heads=2, input_latents=64, mediator_latents=64, qkv_bias=True
)
B, U, V = 3, 128, 192


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return scale * jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def broadcasting(function):
    """The function, written without alignment of ranks, which this package demands elsewhere."""

    def traced(*arguments):
        with jax.numpy_rank_promotion("allow"):
            return function(*arguments)

    return traced


def compare(own, expected, *arguments) -> None:
    """Results and gradients of two functions, at a cotangent of random numbers."""
    found = {}
    for name, function in (("own", own), ("expected", broadcasting(expected))):
        y, pull = jax.vjp(jax.jit(function), *arguments)
        keys = iter(range(100, 200))
        found[name] = y, pull(jax.tree.map(lambda a, k=keys: normal(next(k), *a.shape), y))
    assert_trees_close(found["own"], found["expected"], TOLERANCE)


def test_attention():
    heads, c = 3, 16
    q, k, v = normal(0, B, U, heads * c), normal(1, B, V, heads * c), normal(2, B, V, heads * c)
    # Rows whose weights are spread over all senders, and rows with nearly one sender.
    log = -jnp.exp(2.0 * normal(3, B, U, V))

    def expected(q, k, v, log):
        split = (x.reshape(*x.shape[:2], heads, c) for x in (q, k, v))
        return plain.written_out(*split, log[:, None]).reshape(q.shape)

    compare(lambda *a: layer.attend(*a, heads), expected, q, k, v, log)


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm.scale + norm.bias


@pytest.mark.parametrize("d", [96, 64])
def test_senders(d):
    norm = Norm(1 + normal(0, d, scale=0.2), normal(1, d))
    modulations = tuple(normal(2 + i, n, d) for i, n in enumerate((U, V, V)))
    weights = tuple(normal(5 + i, d, 24, scale=0.2) for i in range(3))

    def expected(inputs, mediators, norm, modulations, weights):
        x = layer_norm(jnp.concatenate([inputs, mediators], 1), norm)
        parts = zip((x[:, V - U :], x, x), modulations, weights, strict=True)
        return tuple((part * m) @ w for part, m, w in parts), mediators

    own = lambda *a: layer.project_senders(*a, 1e-5)
    arguments = normal(8, B, V - U, d), normal(9, B, U, d), norm, modulations, weights
    compare(own, expected, *arguments)


def residual_of(d, seed=20):
    return Residual(normal(seed, d), normal(seed + 1, d), jnp.array([0.0, 1.25, 1.0]))


def added(states, y, residual):
    # Drop-path's factors are drawn: they get no gradient.
    keep = jax.lax.stop_gradient(residual.keep)[:, None, None]
    return states + keep * residual.gamma * (y + residual.bias)


def test_residual_branches():
    d = 96
    norm, modulation = Norm(1 + normal(0, d, scale=0.2), normal(1, d)), normal(2, U, d)
    weights, states, y = normal(3, d, 40, scale=0.2), normal(4, B, U, d), normal(5, B, U, d)

    def expected(states, y, residual, norm, modulation, weights):
        total = added(states, y, residual)
        return total, (layer_norm(total, norm) * modulation) @ weights

    own = lambda *a: layer.add_and_project(*a, 1e-5)
    compare(own, expected, states, y, residual_of(d), norm, modulation, weights)
    compare(layer.add, added, states, y, residual_of(d))
    plain_message = lambda x, m, w: (x * m) @ w
    compare(layer.project_message, plain_message, states, modulation, weights)


def test_geglu():
    hidden = 96
    h, bias = normal(0, B, U, 2 * hidden, scale=2.0), normal(1, 2 * hidden)
    modulation, weights = normal(2, U, hidden), normal(3, hidden, 40, scale=0.2)

    def expected(h, bias, modulation, weights):
        a, gate = jnp.split(h + bias, 2, -1)
        return (a * layers.gelu(gate) * modulation) @ weights

    compare(layer.project_geglu, expected, h, bias, modulation, weights)


def test_the_distribution_of_the_normal():
    x = np.linspace(-12, 12, 4801, dtype=np.float32)
    below, density = (np.asarray(a, np.float64) for a in feed_forward._normal_below(jnp.array(x)))
    exact = jax.scipy.special.ndtr(jnp.array(x))
    np.testing.assert_allclose(below, exact, atol=2e-7)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(density, np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi), atol=1e-7)


def gradients(spec, fused: bool, monkeypatch, rates=(0.3, 0.6)):
    """Of a training step's logits with all noise on, in float32."""
    parts = chain.abstract(lambda rngs: NAC(spec, rngs=rngs))
    images = normal(0, B, 16, 16, 3)

    def loss(params):
        nac = chain.merge(parts.graph, params, {})
        return jnp.sin(nac(images, rates=rates, key=jax.random.key(1), train=True)).sum()

    with monkeypatch.context() as patch:
        patch.setattr(circuit, "is_fused", lambda *arguments: fused)
        found = jax.jit(jax.value_and_grad(loss))(random_params(parts.params, 3))
    del found[1]["pooling"]["confidence"]["bias"]  # zero but for rounding
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codes_per_iteration": True, "remat": "always"},
        {"qkv_bias": False, "iterations": 1, "modulation": "l2", "truncation": None},
    ],
)
def test_a_network(options, monkeypatch):
    spec = dataclasses.replace(SPEC, **options)
    rates = (0.3, 0.6)[: spec.iterations]
    own, expected = (gradients(spec, fused, monkeypatch, rates) for fused in (True, False))
    np.testing.assert_allclose(own[0], expected[0], rtol=TOLERANCE)
    # Against a key's bias all scores of a receiver change alike: its gradient is rounding.
    for tree in (own[1], expected[1]):
        for part in ("propagators", "read_out"):
            tree[part]["attention"]["key"].pop("bias", None)
    # The gradient of a gain is a sum of thousands of terms of either sign.
    assert_trees_close(own[1], expected[1], 5e-4)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Of what layers ask, a CPU is an NVIDIA GPU; kernels are interpreted."""
    monkeypatch.setattr(choice, "has_tensor_cores", lambda: True)
    choice.agrees.cache_clear()
    yield
    choice.agrees.cache_clear()


FITTING = dataclasses.replace(SPEC, state_dim=32, iterations=1)


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, "bfloat16", True),
        ({}, "float16", True),
        ({}, "float32", False),
        ({"fused": "never"}, "bfloat16", False),
        ({"geglu": False}, "bfloat16", False),
        ({"stochastic_kernel": False}, "bfloat16", False),
        ({"mediator_latents": 96}, "bfloat16", False),
        ({"input_latents": 32}, "bfloat16", False),
        ({"head_dim": 48}, "bfloat16", False),
        ({"heads": 32}, "bfloat16", False),
        ({"heads": 16, "head_dim": 128}, "bfloat16", False),
        ({"state_dim": 40}, "bfloat16", False),
        ({"share_ffn": True}, "bfloat16", False),
        ({"share_propagators": True}, "bfloat16", False),
        ({"persistent_inputs": False}, "bfloat16", False),
    ],
)
def test_where_they_are_used(options, dtype, expected, on_a_gpu):
    spec = dataclasses.replace(FITTING, **{"fused": "always", **options})
    assert choice.is_fused(spec, 4, jnp.dtype(dtype)) is expected


def test_not_on_a_cpu():
    assert not choice.is_fused(dataclasses.replace(FITTING, fused="always"), 4, jnp.bfloat16)


def test_for_a_gpu_that_is_not_there_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(choice, "agrees", lambda *arguments: pytest.fail("checked"))
    with backend.tracing_for("gpu", "9.0"):
        assert choice.is_fused(FITTING, 4, jnp.bfloat16)
    with backend.tracing_for("gpu", "7.5"):
        assert not choice.is_fused(FITTING, 4, jnp.bfloat16)


def test_kernels_that_agree_are_used(on_a_gpu, capsys):
    # The step is being traced when a layer asks.
    asked = []
    jax.jit(lambda x: asked.append(choice.is_fused(FITTING, 4, x.dtype)) or x).lower(
        jnp.zeros(1, jnp.bfloat16)
    )
    assert asked == [True]
    assert capsys.readouterr().out == ""


def wrong_numbers(monkeypatch):
    right = attention.forward

    def forward(*arguments, **options):
        message, log_sum = right(*arguments, **options)
        return message.at[:, 0].multiply(1.5), log_sum

    monkeypatch.setattr(attention, "forward", forward)


def not_finite(monkeypatch):
    right = feed_forward.geglu_backward

    def geglu_backward(*arguments):
        x, of_h, of_bias, of_modulation = right(*arguments)
        return x, of_h.at[0, 0, 0].set(jnp.nan), of_bias, of_modulation

    monkeypatch.setattr(feed_forward, "geglu_backward", geglu_backward)


def no_compiler(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of shared memory\nin a tile")

    monkeypatch.setattr(attention, "backward", fail)


def no_triton(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("m2mkd_jax.models.nac.fused.") and not name.endswith("choice"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    pallas = import_module("jax.experimental.pallas")
    monkeypatch.delattr(pallas, "triton", raising=False)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wrong_numbers, "which give other numbers on this device"),
        (not_finite, "which give other numbers on this device"),
        (no_compiler, "which fail on this device: RuntimeError: out of shared memory; "),
        (no_triton, "which fail on this device: "),
    ],
)
def test_kernels_that_do_not_are_left_out(damage, said, on_a_gpu, monkeypatch, capsys):
    damage(monkeypatch)
    assert not choice.is_fused(FITTING, 4, jnp.bfloat16)
    out = capsys.readouterr().out
    assert said in out and "config.nac.fused='never'" in out and out.count("\n") == 1
    assert not choice.is_fused(FITTING, 4, jnp.bfloat16)
    assert capsys.readouterr().out == ""


def test_always_needs_triton(on_a_gpu, monkeypatch):
    no_triton(monkeypatch)
    with pytest.raises(UserError, match="has no Triton for Pallas"):
        choice.is_fused(dataclasses.replace(FITTING, fused="always"), 4, jnp.bfloat16)


def test_processes_do_not_choose_by_themselves(on_a_gpu, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not choice.is_fused(FITTING, 4, jnp.bfloat16)
    assert choice.is_fused(dataclasses.replace(FITTING, fused="always"), 4, jnp.bfloat16)


def test_the_check_would_notice_a_few_percent():
    apart = agreement.distances(FITTING, jnp.dtype("bfloat16"))
    assert all(distance.is_rounding for distance in apart.values())
    assert len(apart) > 25
    # The kernels are as near as XLA is, and more than a few percent of an array is too far.
    assert np.median([d.own / d.by_xla for d in apart.values()]) < 1.5
    far = [d._replace(own=0.06 * d.whole) for d in apart.values() if d.by_xla < 0.012 * d.whole]
    assert len(far) > 20 and not any(distance.is_rounding for distance in far)


def test_chunks_are_powers_of_two():
    assert [choice.chunk(n) for n in (384, 512, 768, 1024, 96)] == [128, 512, 256, 512, 32]
    assert list(Rows(384, 0).chunks) == [0, 1, 2]


def attention_and_back(b: int, u: int, v: int, heads: int, c: int):
    """A function of attention and its backward pass, and shapes for it."""

    def both(q, k, log):
        return jax.vjp(lambda *a: layer.attend(*a, heads), q, k, k, log)[1](q)

    sizes = (b, u, heads * c), (b, v, heads * c), (b, u, v)
    return both, [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]


def test_flops_are_counted_by_the_kernels_names():
    both, shapes = attention_and_back(1, 64, 64, 1, 16)
    text = str(jax.make_jaxpr(both)(*shapes))
    assert all(f"name={name}" in text for name in OWN_PRODUCTS)


def test_flops_of_the_traced_program_are_of_all_programs_of_a_kernel():
    b, u, v, heads, c = 3, 128, 192, 2, 16
    both, shapes = attention_and_back(b, u, v, heads, c)
    products = sum(OWN_PRODUCTS.values())
    assert count_flops(both, *shapes) == products * 2 * b * u * v * heads * c


@pytest.mark.parametrize(
    ("capability", "heads", "c", "stages"),
    [
        ("9.0", 6, 64, 2),
        ("9.0", 8, 64, 2),
        ("9.0", 8, 128, 1),
        ("9.0", 16, 64, 1),
        ("10.0", 8, 64, 2),
        ("8.0", 6, 64, 2),
        ("8.0", 8, 64, 1),
        ("8.6", 6, 64, 1),
        ("8.9", 3, 64, 2),
        ("12.0", 6, 64, 1),
    ],
)
def test_the_kernels_fit_into_shared_memory(capability, heads, c, stages):
    both, shapes = attention_and_back(1, 64, 64, heads, c)
    with backend.tracing_for("gpu", capability):
        text = str(jax.make_jaxpr(both)(*shapes))
    assert text.count("num_stages=2") == 1 + stages
    assert text.count("num_stages=1") == 2 - stages
