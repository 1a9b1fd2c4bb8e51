"""Depthwise convolutions written out for a CPU equal XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from m2mkd_jax.models.depthwise import depthwise_conv
from tests.support import OUTPUT_TOLERANCE, assert_close, assert_trees_close

METHODS = ("positions", "shifts")


def normal(seed: int, *shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(x, kernel, weight, method):
    """Of both operands, and the output."""

    def loss(x, kernel):
        y = depthwise_conv(x, kernel, method)
        return (weight * y).sum(), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)


# (H, W) smaller than the kernel, not square, odd; kernels 1, 3 and 7.
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("h, w", [(8, 8), (2, 5), (4, 3)])
def test_forms_and_their_gradients_are_equal(h, w, size):
    x, kernel, weight = normal(0, 2, h, w, 5), normal(1, size, size, 5), normal(2, 2, h, w, 5)
    expected = gradients(x, kernel, weight, "native")
    for method in METHODS:
        assert_trees_close(gradients(x, kernel, weight, method), expected, OUTPUT_TOLERANCE)


def test_it_is_a_convolution_with_zero_padding():
    x, kernel = normal(0, 1, 4, 4, 2), normal(1, 3, 3, 2)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros(x.shape)
    for i in range(3):
        for j in range(3):
            expected += padded[:, i : i + 4, j : j + 4] * np.asarray(kernel[i, j])
    for method in ("native", *METHODS, None):
        actual = jax.jit(lambda x, k, m=method: depthwise_conv(x, k, m))(x, kernel)
        assert_close(actual, expected, OUTPUT_TOLERANCE, str(method))


def test_sums_of_16_bit_numbers_are_rounded_once():
    half = [a.astype(jnp.bfloat16) for a in (normal(0, 2, 9, 9, 3), normal(1, 7, 7, 3))]
    weight = normal(2, 2, 9, 9, 3).astype(jnp.bfloat16)
    found = gradients(*half, weight, "shifts")
    wide = [a.astype(jnp.float32) for a in (*half, weight)]
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(gradients(*wide, "native")), strict=True
    ):
        assert a.dtype == jnp.bfloat16
        error = jnp.abs(a.astype(jnp.float32) - b)
        # Half of a step of bfloat16, and float32's own rounding near zero.
        assert (error <= 2.0**-8 * jnp.abs(b) + 1e-4).all()


def test_kernels_of_several_networks_and_second_derivatives():
    x, kernels = normal(0, 2, 3, 3, 2), normal(1, 2, 3, 3, 2)

    def second(method):
        loss = lambda k: jnp.sin(depthwise_conv(x, k, method)).sum()
        return jax.jit(jax.vmap(jax.jacrev(jax.grad(loss))))(kernels)

    assert_close(second("shifts"), second("native"), OUTPUT_TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 9, 9, 3), (2, 0, 9, 3), (2, 9, 9, 0), (2, 2, 2, 0)])
def test_a_convolution_of_nothing(shape):
    x, kernel = jnp.ones(shape), jnp.ones((3, 3, shape[-1]))
    y, of_both = jax.value_and_grad(lambda *a: depthwise_conv(*a).sum(), argnums=(0, 1))(x, kernel)
    assert y == 0 and [a.shape for a in of_both] == [x.shape, kernel.shape]
    assert not of_both[1].any()


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (0, 0)])
def test_kernels_that_are_not_square_or_not_odd_are_refused(size):
    with pytest.raises(ValueError, match="expected K x K with K odd"):
        depthwise_conv(jnp.ones((2, 9, 9, 3)), jnp.ones((*size, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_operands_of_two_types_are_refused(method):
    with pytest.raises(jax.dtypes.TypePromotionError):
        depthwise_conv(jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3), jnp.bfloat16), method)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("along", ["images", "channels"])
def test_gradients_in_a_mesh(kind, split, along):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    images, channels = (P("data"), P()), (P(None, None, None, "data"), P(None, None, "data"))
    specs = images if along == "images" else channels
    x, kernel = normal(0, 2, 9, 9, 3), normal(1, 3, 3, 3)
    expected = gradients(x, kernel, jnp.ones(()), "native")[0]

    def run(x, kernel):
        conv = depthwise_conv
        if split:
            conv = jax.shard_map(conv, mesh=mesh, in_specs=specs, out_specs=specs[0])
        return jax.jit(jax.grad(lambda *a: conv(*a).sum(), argnums=(0, 1)))(x, kernel)

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, p))
            for a, p in zip((x, kernel), specs, strict=True)
        ]
        assert_trees_close(run(*placed), expected, OUTPUT_TOLERANCE)
