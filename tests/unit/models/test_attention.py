"""Attention: the one written out, and the library's, which a GPU uses (here by XLA)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals  # public only as a printout

from m2mkd_jax.models import attention, layers
from m2mkd_jax.models.nac.attention import attend, library_attention
from tests.support import OUTPUT_TOLERANCE, assert_close, assert_trees_close

B, U, V, H, C = 3, 6, 10, 2, 8


def normal(seed: int, *shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(attention, *arguments):
    weight = normal(9, *arguments[0].shape)

    def loss(*arguments):
        y = attention(*arguments)
        return (weight.astype(y.dtype) * y).sum(), y

    return jax.grad(loss, argnums=range(len(arguments)), has_aux=True)(*arguments)


BIASES = [None, (B, H, U, V), (B, 1, U, V), (1, H, U, V), (1, 1, U, V)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_written_out_is_the_library_s(shape, dtype):
    """Values and all gradients; some keys are excluded, but never all of a query."""
    arguments = [normal(i, B, n, H, C) for i, n in enumerate((U, V, V))]
    if shape is not None:
        arguments.append(jnp.where(normal(4, *shape) < -1, -jnp.inf, 3 * normal(3, *shape)))
    narrow = [x.astype(dtype) for x in arguments]

    def library(q, k, v, bias=None):
        return jax.nn.dot_product_attention(q, k, v, bias=bias)

    expected = value_and_gradients(library, *(x.astype(jnp.float32) for x in narrow))
    actual = value_and_gradients(attention.written_out, *narrow)
    assert all(x.dtype == dtype for x in jax.tree.leaves(actual))
    actual = jax.tree.map(lambda x: x.astype(jnp.float32), actual)
    assert_trees_close(actual, expected, OUTPUT_TOLERANCE if dtype == jnp.float32 else 2e-2)


def test_a_query_whose_keys_all_have_a_large_negative_bias():
    """All weights are equal then, forward and backward: the bias is no -inf."""
    q, k, v = (normal(i, B, n, H, C) for i, n in enumerate((U, V, V)))
    bias = jnp.full((1, 1, U, V), -3e38)
    weight = normal(9, B, U, H, C)
    grads = jax.grad(lambda *a: (weight * attention.written_out(*a)).sum(), (0, 2))(q, k, v, bias)
    assert_close(grads[1], jnp.broadcast_to(weight.sum(1, keepdims=True) / V, v.shape), 1e-6)


def test_gradients_have_the_types_of_their_arguments():
    q, k, v = (normal(i, B, n, H, C) for i, n in enumerate((U, V, V)))
    narrow = v.astype(jnp.bfloat16)
    grads = jax.grad(lambda *a: attention.written_out(*a).sum(dtype="float32"), (0, 2))(
        q, k, narrow
    )
    assert [g.dtype for g in grads] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("shape", [(1, 1, U, V), (0, 1, U, V)])
def test_no_images(shape):
    q, k, v = (normal(i, 0, n, H, C) for i, n in enumerate((U, V, V)))
    grads, y = value_and_gradients(attention.written_out, q, k, v, jnp.ones(shape))
    assert y.shape == q.shape and grads[3].shape == shape and not grads[3].any()


def test_scores_are_not_kept_for_the_backward_pass():
    """Nothing as large as the scores of all heads is, under the remat policy of the networks."""
    arguments = [normal(i, B, 2 * C, H, C) for i in range(3)]
    run = layers.apply_remat_policy(attention.written_out, "never")
    kept = saved_residuals(run, *arguments)
    assert kept and max(math.prod(shape.shape) for shape, _ in kept) == B * 2 * C * H * C


@pytest.mark.parametrize("shape", [(U, V), (B, U, V)], ids=["one kernel", "one per image"])
def test_library_attention_with_a_kernel(shape):
    """Includes truncated links, a sender without receivers and a receiver without senders."""
    log_kernel = 3 * normal(3, *shape)
    log_kernel = jnp.where(log_kernel < -2, -jnp.inf, log_kernel)
    log_kernel = log_kernel.at[..., 2, :].set(-jnp.inf).at[..., :, 4].set(-jnp.inf)
    arguments = (normal(0, B, U, H, C), normal(1, B, V, H, C), normal(2, B, V, H, C), log_kernel)
    expected = value_and_gradients(attend, *arguments)
    actual = value_and_gradients(lambda *a: library_attention(*a, "xla"), *arguments)
    assert (actual[1][:, 2] == 0).all()
    assert_trees_close(actual, expected, OUTPUT_TOLERANCE)


def test_library_attention_with_a_sampled_kernel():
    """Log probabilities, of which none is -inf."""
    log_kernel = -jnp.abs(3 * normal(3, B, U, V))
    arguments = (normal(0, B, U, H, C), normal(1, B, V, H, C), normal(2, B, V, H, C), log_kernel)
    expected = value_and_gradients(attend, *arguments)
    actual = value_and_gradients(lambda *a: library_attention(*a, "xla", finite=True), *arguments)
    assert_trees_close(actual, expected, OUTPUT_TOLERANCE)


def test_a_constant_in_a_row_of_the_kernel_does_not_matter_in_16_bit():
    q, k, v = (normal(i, B, n, H, C).astype(jnp.bfloat16) for i, n in enumerate((U, V, V)))
    log_kernel = normal(3, U, V)
    near, far = (library_attention(q, k, v, log_kernel + shift, "xla") for shift in (0.0, -1000.0))
    assert_close(far, near, 1e-2)  # bfloat16 near 1000 has steps of 4


@pytest.mark.parametrize("n", [5, 6], ids=["odd", "even"])
def test_padding_of_odd_lengths_changes_nothing(n):
    arguments = [normal(i, B, n, H, C) for i in range(3)]
    expected = value_and_gradients(jax.nn.dot_product_attention, *arguments)
    actual = value_and_gradients(lambda *a: attention.padded_attention(*a, "xla"), *arguments)
    assert_trees_close(actual, expected, OUTPUT_TOLERANCE)
    shapes = [
        eqn.outvars[0].aval.shape
        for eqn in jax.make_jaxpr(lambda *a: attention.padded_attention(*a, "xla"))(*arguments).eqns
    ]
    assert ((B, n + 1, H, C) in shapes) == (n % 2 == 1)


def test_cudnn_is_for_gpus_and_16_bit(monkeypatch):
    half, short = jnp.zeros((B, 64, H, C), jnp.bfloat16), jnp.zeros((B, 63, H, C), jnp.bfloat16)
    assert not attention.fits_cudnn(half, half)
    monkeypatch.setattr(attention, "has_tensor_cores", lambda: True)
    assert attention.fits_cudnn(half, half)
    assert not attention.fits_cudnn(half, short) and not attention.fits_cudnn(short, half)
    for other in (half.astype(jnp.float32), half[..., :6], jnp.tile(half, 17)):
        assert not attention.fits_cudnn(other, other)
