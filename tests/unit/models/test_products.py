"""Products whose gradients are products with transposed copies on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from m2mkd_jax.models import layers
from m2mkd_jax.parallel import backend
from tests.support import assert_close

RNG = np.random.RandomState(0)
X, KERNEL = (RNG.randn(*shape).astype(np.float32) for shape in ((3, 5, 8), (8, 6)))


def loss(product):
    return lambda x, kernel: jnp.sin(product(x, kernel)).sum()


@pytest.mark.parametrize("devices", [1, 2])
def test_gradients_are_those_of_a_plain_product(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    found = jax.value_and_grad(loss(layers.row_product), (0, 1))(X, KERNEL)
    expected = jax.value_and_grad(loss(jnp.matmul), (0, 1))(X, KERNEL)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), found, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", [False, True])
def test_gradients_in_a_mesh_are_those_of_a_plain_product(kind, split):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    arrays = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((X, P("data")), (KERNEL, P()))
    ]

    def gradients(product):
        if split:
            specs = (P("data"), P())
            product = jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=P("data"))
        return jax.jit(jax.grad(loss(product), (0, 1)))(*arrays)

    with jax.set_mesh(mesh):
        found, expected = gradients(layers.row_product), gradients(jnp.matmul)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), found, expected)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 5, 0), (0, 0)])
def test_a_product_of_nothing(shape):
    kernel = np.ones((shape[-1], 6), np.float32)
    found = layers.row_product(jnp.ones(shape), kernel)
    np.testing.assert_array_equal(found, np.zeros((*shape[:-1], 6)))


def test_second_derivatives_and_mapped_products():
    def of_gradient(product):
        gradient = jax.grad(loss(product), 1)
        return jax.vmap(jax.grad(lambda x, k: jnp.square(gradient(x, k)).sum(), 1), (0, None))

    assert_close(
        of_gradient(layers.row_product)(X, KERNEL), of_gradient(jnp.matmul)(X, KERNEL), 2e-6
    )


def test_a_gradient_sums_over_the_last_axis_of_its_first_operand():
    gradient = backend.jit(jax.grad(loss(layers.row_product), 1))
    text = gradient.lower(X, KERNEL).compile().as_text()
    sums = re.findall(r"lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}", text)
    assert sums and set(sums) == {("1", "0")}, sums


def test_a_transposed_copy_is_made_from_rows_in_memory():
    """Not from what computes them, number by number along the columns."""
    x, kernel = np.ones((640, 64), np.float32), np.ones((64, 48), np.float32)
    gradient = jax.grad(lambda k, x: loss(layers.row_product)(x * x, k))
    text = backend.jit(gradient).lower(kernel, x).compile().as_text()
    functions = re.split(r"\n}", text)
    assert any(" multiply(" in body for body in functions)
    transposed = [body for body in functions if "[64,640]{1,0} copy(" in body]
    assert transposed and not any(" multiply(" in body for body in transposed), transposed


def test_frozen_weights_get_no_gradient():
    x = X[0]
    of_x, of_kernel, both = (
        str(jax.make_jaxpr(jax.grad(loss(layers.row_product), numbers))(x, KERNEL))
        for numbers in (0, 1, (0, 1))
    )
    assert [text.count("dot_general[") for text in (of_x, of_kernel, both)] == [2, 2, 3]
    nothing = jax.grad(lambda x, k: x.sum() + 0 * jnp.round(layers.row_product(x, k)).sum(), (0, 1))
    assert [leaf.tolist() for leaf in nothing(x, KERNEL)] == [
        np.ones_like(x).tolist(),
        np.zeros_like(KERNEL).tolist(),
    ]


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_linear_layer_is_flax_s(use_bias):
    own = layers.Linear(8, 6, use_bias=use_bias, rngs=nnx.Rngs(0))
    flax = nnx.Linear(8, 6, use_bias=use_bias, rngs=nnx.Rngs(0))
    assert_close(own(X), flax(X), 1e-6)
    found, expected = (nnx.grad(lambda layer: jnp.sin(layer(X)).sum())(m) for m in (own, flax))
    jax.tree.map(
        lambda a, b: assert_close(a, b, 1e-6), nnx.to_pure_dict(found), nnx.to_pure_dict(expected)
    )


def test_sixteen_bit_products_stay_as_they_are():
    half = [jnp.asarray(a, jnp.bfloat16) for a in (X, KERNEL)]
    assert layers.row_product(*half).dtype == jnp.bfloat16
    assert jax.jvp(layers.row_product, half, half)[0].dtype == jnp.bfloat16
