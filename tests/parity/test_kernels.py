"""Signature kernels against the original (fixture e_kernel), truncated rows included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models.nac import kernels
from m2mkd_jax.models.nac.attention import attend
from tests.literal import normalised
from tests.support import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, arrays, assert_close, facts

IO = arrays("e_kernel/io.npz")
BANDWIDTH = jnp.float32(facts("e_kernel/meta.json")["bandwidth"])
IMPLEMENTATIONS = ("direct", "masked")
TRUNCATIONS = (0.9, None)
# Receiver 1 has no sender inside the truncation; the original divides by zero there.
EMPTY_ROW = 1


def name(implementation, truncation):
    return f"{implementation}.trunc_{truncation}"


def log_kernel(receiver, sender, bandwidth, implementation, truncation):
    distance = kernels.distance(receiver, sender)
    return kernels.log_kernel(distance, bandwidth, truncation, implementation)


def compare_log(actual, expected, what):
    rows = ~np.isnan(expected).any(-1)
    actual, expected = np.asarray(actual)[rows], expected[rows]
    assert (np.isneginf(actual) == np.isneginf(expected)).all(), what
    inside = ~np.isneginf(expected)
    assert_close(actual[inside], expected[inside], OUTPUT_TOLERANCE, what)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_values(implementation, truncation):
    key = name(implementation, truncation)
    distance = kernels.distance(IO["receiver"], IO["sender"])
    assert_close(distance, IO["distance"], OUTPUT_TOLERANCE)
    log = kernels.log_kernel(distance, BANDWIDTH, truncation, implementation)
    compare_log(log, IO[f"{key}.log"], key)
    compare_log(normalised(log), IO[f"{key}.log_normalised"], key)
    exp = kernels.affinity(distance, BANDWIDTH, truncation, implementation)
    assert_close(exp, IO[f"{key}.exp"], OUTPUT_TOLERANCE)
    total = exp.sum(-1, keepdims=True)
    rows = ~np.isnan(IO[f"{key}.exp_normalised"]).any(-1)
    shares = np.asarray(exp / total)[rows]
    assert_close(shares, IO[f"{key}.exp_normalised"][rows], OUTPUT_TOLERANCE)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("batched", ["2_3", "3_3"])
def test_batched_signatures(truncation, batched):
    receiver = IO["receiver"] if batched == "2_3" else IO["batch_receiver"]
    log = log_kernel(receiver, IO["batch_sender"], BANDWIDTH, "direct", truncation)
    key = f"direct.trunc_{truncation}.log_normalised.{batched}"
    compare_log(normalised(log), IO[key], key)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_gradients_of_the_exponential(implementation, truncation):
    def loss(receiver, sender, bandwidth):
        distance = kernels.distance(receiver, sender)
        exp = kernels.affinity(distance, bandwidth, truncation, implementation)
        return (exp * IO["grad_weight"]).sum()

    grads = jax.grad(loss, (0, 1, 2))(IO["receiver"], IO["sender"], BANDWIDTH)
    key = name(implementation, truncation)
    for grad, which in zip(grads, ("receiver", "sender", "bandwidth"), strict=True):
        assert_close(grad, IO[f"{key}.grad_exp.{which}"], GRADIENT_TOLERANCE, which)


def attention_loss(log, weight):
    """The loss behind the recorded `grad_att`: attention with scores `weight`, summed with its
    cosine, over the receivers that have a sender inside the truncation."""
    rows = np.arange(log.shape[-2]) != EMPTY_ROW
    inside = ~jnp.isneginf(log)
    exp = jnp.where(inside, jnp.exp(weight + jnp.where(inside, log, 0.0)), 0.0)
    attention = exp / jnp.where(rows[:, None], exp.sum(-1, keepdims=True), 1.0)
    return jnp.where(rows[:, None], attention * jnp.cos(weight), 0.0).sum()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_gradients_through_attention(implementation, truncation):
    def loss(receiver, sender, bandwidth):
        log = log_kernel(receiver, sender, bandwidth, implementation, truncation)
        return attention_loss(normalised(log), IO["grad_weight"])

    grads = jax.grad(loss, (0, 1, 2))(IO["receiver"], IO["sender"], BANDWIDTH)
    key = name(implementation, truncation)
    for grad, which in zip(grads, ("receiver", "sender", "bandwidth"), strict=True):
        assert_close(grad, IO[f"{key}.grad_att.{which}"], GRADIENT_TOLERANCE, which)


def test_training_samples():
    def sampled(receiver, sender, bandwidth):
        log = log_kernel(receiver, sender, bandwidth, "direct", 0.9)
        return normalised(kernels.sample(log, IO["train.uniform"], 0.5))

    args = (IO["receiver"], IO["sender"], BANDWIDTH)
    assert_close(sampled(*args), IO["train.log_normalised"], OUTPUT_TOLERANCE)
    grads = jax.grad(lambda *a: attention_loss(sampled(*a), IO["train.grad_weight"]), (0, 1, 2))(
        *args
    )
    for grad, which in zip(grads, ("receiver", "sender", "bandwidth"), strict=True):
        assert_close(grad, IO[f"train.grad_att.{which}"], GRADIENT_TOLERANCE, which)


def test_a_fully_truncated_receiver_gets_nothing_and_no_nan():
    def attended(receiver, sender, bandwidth):
        log = log_kernel(receiver, sender, bandwidth, "direct", 0.9)
        q, k = jnp.ones((2, 9, 1, 4)), jnp.ones((2, 14, 1, 4))
        return attend(q, k, jnp.ones((2, 14, 1, 4)), log)

    args = (IO["receiver"], IO["sender"], BANDWIDTH)
    message = np.asarray(attended(*args))
    assert (message[:, EMPTY_ROW] == 0).all()
    assert_close(np.delete(message, EMPTY_ROW, 1), np.ones((2, 8, 1, 4)), OUTPUT_TOLERANCE)
    for grad in jax.grad(lambda *a: jnp.square(attended(*a)).sum(), (0, 1, 2))(*args):
        assert np.isfinite(grad).all()
