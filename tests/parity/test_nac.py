"""The NAC against the original (fixture e_nac): outputs, states and kernels."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from m2mkd_jax.conversion.names_nac import nac_names
from m2mkd_jax.models.nac import kernels
from m2mkd_jax.models.nac.circuit import NAC
from tests.literal import normalised
from tests.support import NAC_SPEC, OUTPUT_TOLERANCE, arrays, assert_close, nhwc, with_params
from tests.torch_arrays import arrays_from_torch, arrays_to_torch


@pytest.fixture(scope="module")
def network():
    params = arrays_from_torch(nac_names(NAC_SPEC), arrays("e_nac/weights.npz"))
    return with_params(lambda rngs: NAC(NAC_SPEC, rngs=rngs), params)


@pytest.fixture(scope="module")
def io():
    return arrays("e_nac/io.npz")


@pytest.mark.parametrize("mode", ["zero", "noisy"])
def test_states_and_outputs(network, io, mode):
    noise = {}
    if mode == "noisy":
        noise = {g: jnp.asarray(io[f"noise.{g}_seed"]) for g in ("input", "mediator", "output")}
    gumbel = jnp.asarray(io["noise.gumbel"]) if mode == "noisy" else None
    states = jax.jit(network.forward)(nhwc(io["raw_inputs"]), noise)
    names = {
        "tokens": "tokenized_inputs",
        "input": "input_states",
        "mediator": "mediator_states",
        "output": "output_states",
    }
    for ours, theirs in names.items():
        assert_close(states[ours], io[f"{mode}.{theirs}"], OUTPUT_TOLERANCE, theirs)
    assert_close(states["input"], io[f"{mode}.read_in"], OUTPUT_TOLERANCE)
    logits = network.pooling(states["output"], gumbel)
    assert_close(logits, io[f"{mode}.outputs"], OUTPUT_TOLERANCE)


def test_the_default_evaluation_is_the_noiseless_one(network, io):
    logits = jax.jit(lambda x: network(x))(nhwc(io["raw_inputs"]))
    assert_close(logits, io["zero.outputs"], OUTPUT_TOLERANCE)


@pytest.mark.parametrize("mode", ["zero", "noisy"])
def test_each_propagator_and_the_scan(network, io, mode):
    groups = ("input", "mediator", "output") if mode == "noisy" else ()
    noise = {group: jnp.asarray(io[f"noise.{group}_seed"]) for group in groups}
    inputs = jnp.asarray(io[f"{mode}.read_in"])
    _, mediators, _ = network.initial_states(len(inputs), noise, [None] * 3)
    trace: list = []
    network.propagate(inputs, mediators, trace=trace)
    graph, stacked = nnx.split(network.propagators)
    signatures = network.mediator_latents.signatures[...]
    for i, states in enumerate(trace):
        assert_close(states, io[f"{mode}.propagator_{i}"], OUTPUT_TOLERANCE)
        # The attention alone, before the feed-forward network.
        attention = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked)).attention
        codes = network.mediator_codes(i)
        before = trace[i - 1] if i else mediators
        senders, sender_codes, theirs = network._senders(inputs, before, codes, True)
        distance = kernels.distance(signatures, theirs)
        log = network.propagator_kernel(distance, attention.bandwidth[...], 1)
        heard = attention(before, codes, senders, sender_codes, log)
        assert_close(heard, io[f"{mode}.propagator_{i}.attn"], OUTPUT_TOLERANCE)
    scanned = network.propagate(inputs, mediators)
    assert_close(scanned, trace[-1], OUTPUT_TOLERANCE)


def test_confidences(network, io):
    confidences = network.pooling.confidence(jnp.asarray(io["zero.output_states"]))
    expected = io["zero.confidences"]
    assert_close(confidences.reshape(expected.shape), expected, OUTPUT_TOLERANCE)


def test_seeder(network, io):
    for group in ("input", "mediator", "output"):
        codes = getattr(network, f"{group}_latents").codes[...]
        mean = network.seeder(codes, 1)[0]
        one = network.seeder(codes, 1, jnp.ones((1, *mean.shape)))[0]
        assert_close(mean, io[f"seeder.{group}_mu"], OUTPUT_TOLERANCE)
        assert_close(one - mean, io[f"seeder.{group}_std"], OUTPUT_TOLERANCE)


def test_kernels_of_propagators_and_read_out(network, io):
    mediators = network.mediator_latents.signatures[...]
    senders = jnp.concatenate([network.input_latents.signatures[...], mediators])
    bandwidths = network.propagators.attention.bandwidth[...]
    distance = kernels.distance(mediators, senders)
    for i in range(NAC_SPEC.iterations):
        assert_close(distance, io[f"kernel_{i}.distance"], OUTPUT_TOLERANCE)
        log = normalised(network.propagator_kernel(distance, bandwidths[i], 1))
        expected = io[f"kernel_{i}.log_normalised"]
        assert (jnp.isneginf(log) == jnp.isneginf(expected)).all()
        inside = ~jnp.isneginf(log)
        assert_close(jnp.where(inside, log, 0), jnp.where(inside, expected, 0), OUTPUT_TOLERANCE)
    distance = kernels.distance(network.output_latents.signatures[...], senders)
    bandwidth = network.read_out.attention.bandwidth[...]
    log = normalised(kernels.log_kernel(distance, bandwidth, None))
    assert_close(log, io["kernel_readout.log_normalised"], OUTPUT_TOLERANCE)


def test_names_go_back():
    table, weights = nac_names(NAC_SPEC), arrays("e_nac/weights.npz")
    back = arrays_to_torch(table, arrays_from_torch(table, weights))
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert (back[key] == value).all(), key
