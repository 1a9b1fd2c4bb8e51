"""Sums over images, written out on a CPU, and the gradient of what all images share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models import batching
from m2mkd_jax.parallel import backend
from tests.support import assert_close


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("batch", [1, 3, batching.WRITTEN_OUT, batching.WRITTEN_OUT + 1])
def test_sum_over_images(batch, platform):
    x = np.random.default_rng(batch).normal(size=(batch, 5, 7))
    with backend.tracing_for(platform):
        total = jax.jit(lambda x: batching.sum_over_images(x))(jnp.asarray(x, jnp.float32))
    assert_close(total, x.sum(0), 1e-6)


def test_sixteen_bit_numbers_are_summed_in_float32():
    ones = jnp.ones((300, 2), jnp.bfloat16)  # in bfloat16 256 + 1 is 256
    total = batching.sum_over_images(ones)
    assert total.dtype == jnp.bfloat16 and (total == 300).all()


def test_gradient_of_what_all_images_share():
    x, y = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 3)), jnp.float32) for i in (0, 1))
    expected = jax.grad(lambda x: jnp.sin(jnp.broadcast_to(x, (4, 3)) * y).sum())(x[0])
    actual = jax.grad(lambda x: jnp.sin(batching.for_each_image(x, 4) * y).sum())(x[0])
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [0, 1, 300])
def test_what_is_added_to_all_images(batch, dtype, platform):
    rng = np.random.default_rng(batch)
    x, weight = (jnp.asarray(rng.normal(size=(batch, 3, 4)), dtype) for _ in range(2))
    shared = jnp.asarray(rng.normal(size=(1, 3, 4)), dtype)
    with backend.tracing_for(platform):
        y, pull = jax.vjp(lambda *a: batching.add_to_images(*a), x, shared)
        of_x, of_shared = jax.jit(pull)(weight)
    assert (y == x + shared).all() and (of_x == weight).all()
    expected = np.asarray(weight, np.float64).sum(0, keepdims=True)
    step = 2.0**-8 if dtype == "bfloat16" else 1e-6
    assert of_shared.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(of_shared, np.float64), expected, rtol=step, atol=1e-5)
