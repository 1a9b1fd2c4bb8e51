"""The loop whose parameters stay in their stacks, against `jax.lax.scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models import gradients_in_place, layers
from m2mkd_jax.models.gradients_in_place import LayerArray
from m2mkd_jax.models.moe.grouped import grouped_linear
from m2mkd_jax.parallel import backend, gradient_buffers
from tests.support import GRADIENT_TOLERANCE, assert_close, assert_trees_close

LAYERS, EXPERTS, WIDTH, ROWS = 3, 4, 6, 40
SIZES = jnp.asarray([13, 0, 26, 1])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "experts": {"kernel": normal(0, LAYERS, EXPERTS, WIDTH, WIDTH)},
    "idle": {"kernel": normal(1, LAYERS, 2, 5)},
    "plain": {"kernel": normal(2, LAYERS, WIDTH, WIDTH), "bias": normal(3, LAYERS, WIDTH)},
}
X, SHIFTS = normal(4, ROWS, WIDTH), normal(5, LAYERS, WIDTH)
# 'idle' is left in its stack, and nothing reads it.
UNCOPIED = {"experts/kernel", "idle/kernel", "plain/kernel"}


def layer(x, params, shift):
    """Experts by the loop over chunks, a linear map that is copied out, a bias that always is."""
    bias = jnp.zeros((EXPERTS, WIDTH)) + params["plain"]["bias"][None]
    y = grouped_linear(x, params["experts"]["kernel"], bias, SIZES)
    kernel = params["plain"]["kernel"]
    kernel = kernel.copied() if isinstance(kernel, LayerArray) else kernel
    y = jnp.tanh(y) @ kernel + shift[None]
    return x + y, y.sum()


def run(uncopied, remat, params, x, shifts):
    """The loop; without `uncopied`, the library's."""
    policy = functools.partial(layers.apply_remat_policy, remat=remat)
    if not uncopied:
        return jax.lax.scan(policy(lambda x, own: layer(x, *own)), x, (params, shifts))
    stays = lambda names: "/".join(names) in uncopied
    return gradients_in_place.over_layers(layer, x, params, shifts, stays, policy)


def gradient(uncopied, remat="never", params=PARAMS, x=X, buffers=None, used=None):
    """Loss, outputs, and the gradients of parameters, x and shifts."""

    def loss(params, x, shifts):
        named = {
            f"{outer}/{inner}": leaf for outer, own in params.items() for inner, leaf in own.items()
        }
        with gradient_buffers.writing_into(named, buffers or {}, set() if used is None else used):
            y, outputs = run(uncopied, remat, params, x, shifts)
        return (y**2).sum() + outputs[1], outputs

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, SHIFTS)


def assert_same(a, b):
    for one, other in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("remat", ["never", "always"])
def test_it_is_the_scan(remat):
    """To the bit: the same products, and each gradient is written once."""
    one, other = (jax.jit(lambda u=u: gradient(u, remat))() for u in (UNCOPIED, None))
    assert_same(one, other)
    assert not np.any(one[1][0]["idle"]["kernel"])


def test_under_vmap():
    networks = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), PARAMS)
    one, other = (
        jax.jit(jax.vmap(lambda params, u=u: gradient(u, params=params)))(networks)
        for u in (UNCOPIED, None)
    )
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapped", ["x", "shifts"])
def test_under_vmap_with_shared_parameters(mapped):
    """Each example's gradient is in the sum once, whatever layers come after."""
    xs, many = normal(6, 3, ROWS, WIDTH), normal(7, 3, LAYERS, WIDTH)
    axes = (0, None) if mapped == "x" else (None, 0)
    pairs = [(xs[i], SHIFTS) if mapped == "x" else (X, many[i]) for i in range(3)]

    def loss(params, x, shifts):
        y, outputs = run(UNCOPIED, "never", params, x, shifts)
        return (y**2).sum() + outputs[1]

    def of_all(params):
        whole = (xs, SHIFTS) if mapped == "x" else (X, many)
        return jax.vmap(lambda x, shifts: loss(params, x, shifts), axes)(*whole).sum()

    expected = [jax.jit(jax.grad(loss))(PARAMS, *pair) for pair in pairs]
    found = jax.jit(jax.grad(of_all))(PARAMS)
    assert_trees_close(found, jax.tree.map(lambda *a: sum(a), *expected), GRADIENT_TOLERANCE)
    each = jax.vmap(jax.grad(loss), (None, *axes))
    found = jax.jit(each)(PARAMS, *((xs, SHIFTS) if mapped == "x" else (X, many)))
    assert_trees_close(found, jax.tree.map(lambda *a: jnp.stack(a), *expected), GRADIENT_TOLERANCE)


def test_a_kernel_by_itself_has_second_derivatives():
    kernel, direction = normal(8, EXPERTS, WIDTH, WIDTH), normal(9, EXPERTS, WIDTH, WIDTH)
    owner, bias = jnp.repeat(jnp.arange(EXPERTS), SIZES), jnp.zeros((EXPERTS, WIDTH))

    def loss(linear, kernel):
        return (linear(jnp.tanh(linear(X, kernel)), kernel) ** 2).sum()

    def product(linear):
        gradient = jax.grad(functools.partial(loss, linear))
        return jax.jit(lambda k, d: jax.jvp(gradient, (k,), (d,))[1])(kernel, direction)

    found = product(lambda x, k: grouped_linear(x, k, bias, SIZES, "chunks"))
    assert_close(found, product(lambda x, k: jnp.einsum("nc,ncd->nd", x, k[owner])), 1e-4)


def test_what_is_in_a_buffer_does_not_matter():
    used: set[str] = set()
    buffers = {
        name: jnp.full(PARAMS[name.split("/")[0]]["kernel"].shape, jnp.nan) for name in UNCOPIED
    }
    found = jax.jit(lambda: gradient(UNCOPIED, buffers=buffers, used=used))()
    assert used == UNCOPIED
    assert_same(found, jax.jit(lambda: gradient(None))())


def test_a_parameter_that_is_not_taken_as_it_is_uses_no_buffer():
    used: set[str] = set()
    kernel = PARAMS["experts"]["kernel"]
    buffers = {"experts/kernel": jnp.full(kernel.shape, jnp.nan)}

    def loss(kernel):
        with gradient_buffers.writing_into({"experts/kernel": kernel}, buffers, used):
            params = PARAMS | {"experts": {"kernel": 2 * kernel}}
            return run(UNCOPIED, "never", params, X, SHIFTS)[0].sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(kernel)).all()
    assert not used


def test_a_stack_that_two_loops_read_gets_both_gradients():
    def loss(params, uncopied, buffers):
        named = {"experts/kernel": params["experts"]["kernel"]}
        with gradient_buffers.writing_into(named, buffers, set()):
            once = run(uncopied, "never", params, X, SHIFTS)[0]
            return run(uncopied, "never", params, once, SHIFTS)[0].sum()

    buffers = {"experts/kernel": jnp.full(PARAMS["experts"]["kernel"].shape, jnp.nan)}
    one = jax.jit(jax.grad(lambda p: loss(p, UNCOPIED, buffers)))(PARAMS)
    other = jax.jit(jax.grad(lambda p: loss(p, None, {})))(PARAMS)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_no_layer_is_read_twice():
    """The second gradient would be written over the first."""
    array = LayerArray(PARAMS["experts"]["kernel"], PARAMS["experts"]["kernel"], jnp.int32(1))
    np.testing.assert_array_equal(array.copied(), PARAMS["experts"]["kernel"][1])
    with pytest.raises(AssertionError):
        array.copied()
    with pytest.raises(AssertionError):
        grouped_linear(X, array, jnp.zeros((EXPERTS, WIDTH)), SIZES)


def test_no_stack_of_zeros_and_no_copy_of_one():
    """The gradient's program has one array of a stack's size for each: what it returns."""
    experts = {"kernel": normal(0, 64, EXPERTS, 64, 64)}
    x, stack = normal(1, ROWS, 64), 64 * EXPERTS * 64 * 64 * 4

    def loss(kernel, buffer):
        def body(x, params, _):
            y = grouped_linear(x, params["kernel"], jnp.zeros((EXPERTS, 64)), SIZES)
            return jnp.tanh(y), None

        with gradient_buffers.writing_into({"kernel": kernel}, {"kernel": buffer}, set()):
            stays = lambda names: True
            params = {"kernel": kernel}
            y = gradients_in_place.over_layers(body, x, params, None, stays, lambda body: body)[0]
        return y.sum()

    step = backend.jit(jax.grad(loss), donate_argnums=1)
    plan = step.lower(experts["kernel"], jnp.zeros_like(experts["kernel"])).compile()
    assert plan.memory_analysis().temp_size_in_bytes < stack // 2
