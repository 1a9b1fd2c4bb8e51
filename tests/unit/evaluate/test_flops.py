"""Counts of FLOPs and of kept activations against closed forms."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from m2mkd_jax.evaluate.flops import count_flops, kept_bytes
from m2mkd_jax.models.moe.grouped import METHODS, grouped_linear

B, C, D, L = 3, 5, 7, 4


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_matrix_product():
    assert count_flops(jnp.dot, shape(B, C), shape(C, D)) == 2 * B * C * D
    batched = lambda x, y: jnp.einsum("lbc,lcd->lbd", x, y)
    assert count_flops(batched, shape(L, B, C), shape(L, C, D)) == 2 * L * B * C * D
    assert count_flops(jnp.add, shape(B, C), shape(B, C)) == 0


def test_loops_count_every_round():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert count_flops(loop, shape(B, C), shape(L, C, C)) == 2 * L * B * C * C
    nested = lambda x, w: jax.lax.scan(lambda x, _: (loop(x, w), None), x, None, length=6)[0]
    assert count_flops(nested, shape(B, C), shape(L, C, C)) == 6 * 2 * L * B * C * C


def test_inside_jit_vmap_and_remat():
    f = jax.jit(jax.vmap(jax.checkpoint(lambda x, w: x @ w), (0, None)))
    assert count_flops(f, shape(L, B, C), shape(C, D)) == 2 * L * B * C * D


def test_what_is_cut_over_devices_counts_on_all_of_them():
    mesh = AbstractMesh((2, 4), ("data", "expert"))

    def local(x, w, cut):
        spec = PartitionSpec(cut)
        product = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
        specs = {"in_specs": (spec, PartitionSpec()), "out_specs": spec}
        return jax.shard_map(product, mesh=mesh, check_vma=False, **specs)(x, w)

    expected = 2 * L * 8 * C * C
    cut = functools.partial(local, cut=("data", "expert"))
    assert count_flops(cut, shape(8, C), shape(L, C, C)) == expected
    # Cut over four, and done twice.
    cut = functools.partial(local, cut="expert")
    assert count_flops(cut, shape(8, C), shape(L, C, C)) == 2 * expected


def test_convolutions():
    def conv(x, k, groups=1):
        return jax.lax.conv_general_dilated(
            x,
            k,
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    expected = 2 * (B * 4 * 4 * D) * (3 * 3 * C)
    assert count_flops(conv, shape(B, 8, 8, C), shape(3, 3, C, D)) == expected
    depthwise = lambda x, k: conv(x, k, groups=C)
    assert count_flops(depthwise, shape(B, 8, 8, C), shape(3, 3, 1, C)) == 2 * (B * 16 * C) * 9


@pytest.mark.parametrize("groups", [1, C])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_gradients_of_patches_cost_what_the_patches_do(side, groups):
    """Of images and of kernel once each; zeros between strided outputs cost nothing."""

    def conv(x, k):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (side, side), "VALID", dimension_numbers=names, feature_group_count=groups
        )

    args = shape(B, 6, 12, C), shape(side, side, C // groups, 2 * C)
    forward = 2 * B * 6 * 12 * C // groups * 2 * C
    assert count_flops(conv, *args) == forward
    grad = jax.grad(lambda x, k: jnp.square(conv(x, k)).sum(), argnums=(0, 1))
    assert count_flops(grad, *args) == 3 * forward


@pytest.mark.parametrize("method", METHODS)
def test_each_row_by_one_expert(method):
    """Every row counts once, whatever the number of experts; the bias of 'ragged' is a product."""
    rows, experts = 40, 4
    shapes = (
        shape(rows, C),
        shape(experts, C, D),
        shape(experts, D),
        shape(experts, dtype=jnp.int32),
    )
    bias = 2 * rows * experts * D if method == "ragged" else 0
    product = 2 * rows * C * D

    def linear(x, w, b, sizes):
        return grouped_linear(x, w, b, sizes, method)

    assert count_flops(linear, *shapes) == product + bias
    loss = lambda *a: jnp.square(linear(*a)).sum()
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert count_flops(gradient, *shapes) == 3 * product + 2 * bias


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, 0), (0, 0, 0, None)])
@pytest.mark.parametrize("method", ["chunks", "batched"])
def test_each_row_by_one_expert_of_several_networks(method, axes):
    """Mapped over three networks, which may have weights or numbers of rows in common."""
    rows, experts, networks = 40, 4, 3
    shapes = [
        shape(rows, C),
        shape(experts, C, D),
        shape(experts, D),
        shape(experts, dtype=jnp.int32),
    ]

    def loss(x, w, b, sizes):
        return jnp.square(grouped_linear(x, w, b, sizes, method)).sum()

    gradient = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)), axes)
    shapes = [
        shape(networks, *s.shape, dtype=s.dtype) if axis == 0 else s
        for s, axis in zip(shapes, axes, strict=True)
    ]
    assert count_flops(gradient, *shapes) == networks * 3 * (2 * rows * C * D)


def test_each_row_by_one_expert_recomputed():
    """A rematerialised loop over layers: four products instead of three."""

    def two_layers(x, w, b, sizes):
        linear = lambda x, _: (jnp.sin(grouped_linear(x, w, b, sizes, "chunks")), 0)
        return jnp.square(jax.lax.scan(jax.checkpoint(linear), x, length=2)[0]).sum()

    gradient = jax.value_and_grad(two_layers, argnums=(0, 1, 2))
    shapes = (shape(40, C), shape(4, C, C), shape(4, C), shape(4, dtype=jnp.int32))
    assert count_flops(gradient, *shapes) == 2 * 4 * (2 * 40 * C * C)


def test_backward():
    def loss(x, w):
        return (x @ w).sum()

    forward = 2 * B * C * D
    grad = jax.value_and_grad(lambda x, w: jnp.square(x @ w).sum(), argnums=(0, 1))
    assert count_flops(grad, shape(B, C), shape(C, D)) == 3 * forward
    one = jax.value_and_grad(lambda w, x: jnp.square(x @ w).sum())
    assert count_flops(one, shape(C, D), shape(B, C)) == 2 * forward
    assert count_flops(lambda x, w: jax.vjp(loss, x, w)[0], shape(B, C), shape(C, D)) == forward


def test_backward_of_a_loop_with_and_without_remat():
    def loss(remat):
        def body(x, w):
            return jnp.tanh(x @ w), None

        body = jax.checkpoint(body) if remat else body
        return lambda w, x: jax.lax.scan(body, x, w)[0].sum()

    args, forward = (shape(L, C, C), shape(B, C)), 2 * L * B * C * C
    assert count_flops(jax.value_and_grad(loss(False)), *args) == 3 * forward
    assert count_flops(jax.value_and_grad(loss(True)), *args) == 4 * forward


def test_kept_bytes():
    def loss(w, rounds, remat=False):
        body = lambda x, _: (jnp.sin(x @ w), None)
        body = jax.checkpoint(body) if remat else body
        return jax.lax.scan(body, jnp.ones((64, C)), None, length=rounds)[0].sum()

    kept = {n: kept_bytes(lambda w, n=n: loss(w, n), shape(C, C)) for n in (1, 4, 8)}
    activation = 4 * 64 * C
    # Each round keeps the product's input and the cosine of its output.
    assert kept[8] - kept[4] == 4 * 2 * activation
    assert kept_bytes(lambda w: loss(w, 8, True), shape(C, C)) < kept[8]
    # Nothing but a parameter: nothing is kept beside it.
    assert kept_bytes(lambda w: jnp.square(w).sum(), shape(C, C)) == 0
