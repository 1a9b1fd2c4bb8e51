"""Layers: each fast form equals the plain one; stochastic depth; stacked layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2mkd_jax.models import chain, layers
from m2mkd_jax.parallel import backend
from tests.random_params import random_params
from tests.support import OUTPUT_TOLERANCE, assert_close, assert_trees_close

LAYERS, BATCH, WIDTH = 3, 4, 6


def normal(seed: int, *shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gelu_of_16_bits_is_rounded_once(dtype):
    """Value and derivative of x Phi(x), from the standard library's erf."""
    x = jnp.linspace(-6, 6, 481).astype(dtype)
    wide = np.asarray(x, np.float64)
    phi = np.asarray([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in wide])
    density = np.exp(-(wide**2) / 2) / math.sqrt(2 * math.pi)
    y, slope = jax.vmap(jax.value_and_grad(layers.gelu))(x)
    assert y.dtype == slope.dtype == dtype
    half = float(jnp.finfo(dtype).eps) / 2
    for found, exact in ((y, wide * phi), (slope, phi + wide * density)):
        # Half of a step of these floats, and float32's own rounding near zero.
        error = np.abs(np.asarray(found, np.float64) - exact)
        assert (error <= half * np.abs(exact) + 2e-6).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm(dtype, platform):
    """Against float64, of numbers far from zero, where E[x^2] - E[x]^2 has no digits left."""
    norm = layers.layer_norm(5, 1e-5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = normal(1, 5), normal(2, 5)
    x = (normal(0, 3, 4, 5) + 1000.0).astype(dtype)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    with jax.numpy_dtype_promotion("strict"), backend.tracing_for(platform):
        y = norm(x)
    assert y.dtype == jnp.float32  # of 16-bit numbers with a float32 scale
    assert_close(y, expected, 1e-4)  # float32's own step at 1000 is 6e-5


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_layer_norm_of_16_bits_is_rounded_once(platform):
    norm = layers.layer_norm(64, 1e-5, rngs=nnx.Rngs(0))
    x = normal(0, 8, 64).astype(jnp.bfloat16)
    expected = norm(x.astype(jnp.float32))
    for parameter in (norm.scale, norm.bias):
        parameter.set_value(parameter[...].astype(jnp.bfloat16))
    with backend.tracing_for(platform):
        assert (norm(x) == expected.astype(jnp.bfloat16)).all()


def test_layer_norm_of_an_accelerator_has_the_gradients_of_a_cpu():
    norm = layers.layer_norm(12, 1e-5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(norm)
    state = jax.tree.map(lambda a: a + 0.3 * normal(3, *a.shape), state)
    x, weight = normal(0, 2, 3, 12) + 5.0, normal(1, 2, 3, 12)

    def gradient(platform):
        with backend.tracing_for(platform):
            loss = lambda state, x: (nnx.merge(graph, state)(x) * weight).sum()
            return jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)

    assert_trees_close(gradient("gpu"), gradient("cpu"), 1e-5)


def test_patches_are_a_strided_convolution():
    def build(rngs):
        init = {"kernel_init": layers.torch_init, "bias_init": nnx.initializers.zeros}
        return layers.Patches(4, 3, WIDTH, **init, rngs=rngs)

    parts = chain.abstract(build)
    params = random_params(parts.params, 0)
    x, weight = normal(1, 2, 8, 12, 3), normal(2, 2, 2, 3, WIDTH)

    def patches(params, x):
        return chain.merge(parts.graph, params, {})(x)

    def convolution(params, x):
        kernel = params["linear"]["kernel"].reshape(4, 4, 3, WIDTH)
        names = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=names)
        return y + params["linear"]["bias"][None, None, None]

    def run(f):
        loss = lambda params, x: ((weight * f(params, x)).sum(), f(params, x))
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    assert_trees_close(run(patches), run(convolution), OUTPUT_TOLERANCE)


def test_drop_path_drops_whole_samples():
    count, rate = 20_000, 0.3
    x = jnp.abs(normal(0, count, 2, 3)) + 1.0
    y = np.asarray(jax.jit(layers.drop_path)(x, rate, jax.random.key(1)))
    dropped = (y == 0).all((1, 2))
    # A sample is either all zero or all there, divided by the keep probability.
    np.testing.assert_allclose(y[~dropped], np.asarray(x)[~dropped] / (1 - rate), rtol=1e-6)
    # Five standard deviations of a binomial share.
    assert abs(dropped.mean() - rate) < 5 * (rate * (1 - rate) / count) ** 0.5


def test_drop_path_is_the_identity_without_key_or_rate():
    x = normal(0, 5, 2, 3)
    assert (layers.drop_path(x, 0.9, None) == x).all()
    assert (jax.jit(layers.drop_path)(x, 0.0, jax.random.key(0)) == x).all()


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = layers.torch_linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = layers.layer_norm(WIDTH, 1e-6, rngs=rngs)

    def __call__(self, x, shift):
        return x + jnp.tanh(self.linear(self.norm(x)) + layers.align_rank(shift, x))


@pytest.fixture(scope="module")
def stacked():
    parts = chain.abstract(
        lambda rngs: layers.stack(lambda rngs: Layer(rngs=rngs), LAYERS, rngs=rngs)
    )
    return parts.graph, random_params(parts.params, 0)


def scanned(graph, remat):
    def f(params, x, shifts):
        module = chain.merge(graph, params, {})
        apply = lambda layer, x, shift: (layer(x, shift), None)
        return layers.scan_stack(module, x, shifts, apply, remat=remat)[0]

    return f


def looped(params, x, shifts):
    one = chain.abstract(lambda rngs: Layer(rngs=rngs)).graph
    for i in range(LAYERS):
        x = chain.merge(one, jax.tree.map(lambda a, i=i: a[i], params), {})(x, shifts[i])
    return x


@pytest.mark.parametrize("remat", ["never", "always"])
def test_scanned_layers_equal_a_loop(stacked, remat):
    graph, params = stacked
    x, shifts, weight = normal(1, BATCH, WIDTH), normal(2, LAYERS, WIDTH), normal(3, BATCH, WIDTH)

    def run(f):
        loss = lambda *args: ((weight * f(*args)).sum(), f(*args))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, shifts)

    assert_trees_close(run(scanned(graph, remat)), run(looped), OUTPUT_TOLERANCE)


@pytest.mark.parametrize("layers_of_it", [1, LAYERS])
def test_inputs_of_other_layers_are_refused(stacked, layers_of_it):
    graph, params = stacked
    params = jax.tree.map(lambda a: a[:layers_of_it], params)
    with pytest.raises(ValueError):
        scanned(graph, "never")(params, normal(1, BATCH, WIDTH), normal(2, LAYERS + 1, WIDTH))


def test_remat_recomputes(stacked):
    """The rematerialised loop keeps less: a checkpoint is really there."""
    graph, params = stacked
    x, shifts = normal(1, BATCH, WIDTH), normal(2, LAYERS, WIDTH)

    def kept(remat):
        f = scanned(graph, remat)
        residuals = jax.eval_shape(lambda x: jax.vjp(lambda x: f(params, x, shifts), x)[1], x)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("always") < kept("never") == kept("auto")
    with layers.recomputing():
        assert kept("auto") == kept("always")
        assert kept("never") > kept("always")


def test_products_are_kept_and_the_rest_is_computed_again(stacked):
    graph, params = stacked
    x, shifts = normal(1, BATCH, WIDTH), normal(2, LAYERS, WIDTH)

    def gradient(remat):
        f = scanned(graph, remat)
        return str(jax.make_jaxpr(jax.grad(lambda x: f(params, x, shifts).sum()))(x))

    assert gradient("never").count("dot_general[") == 2  # forward and backward
    assert gradient("always").count("dot_general[") == 3
    assert gradient("never").count(" tanh ") == 2


def test_stacked_layers_are_drawn_apart():
    build = lambda rngs: layers.stack(lambda rngs: Layer(rngs=rngs), LAYERS, rngs=rngs)
    kernel = chain.initialise(build, jax.random.key(0)).params["linear"]["kernel"]
    assert kernel.shape == (LAYERS, WIDTH, WIDTH)
    assert not (kernel[0] == kernel[1]).any()
    assert np.abs(kernel).max() <= WIDTH**-0.5  # uniform within 1/sqrt(fan-in), not of the stack
