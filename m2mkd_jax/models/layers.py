"""Layers shared by the vision transformers and by the NAC.

Axes: B batch, H height, W width, C channels in, D channels out, L stacked layers.

Flax's own layers are used wherever they compute what PyTorch computes; this file holds what they
lack: PyTorch's default initialisation, linear layers that are fast on a CPU, per-sample stochastic
depth, and patches as a matrix product.

Source: docs/reference.md#vit-init, docs/reference.md#nac-tokenizer.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from m2mkd_jax import tree_paths
from m2mkd_jax.models import gradients_in_place
from m2mkd_jax.models.products import product
from m2mkd_jax.parallel import backend

Initialiser = Callable[..., jax.Array]

# normal(0.02) cut at +-2 (a hundred sigma), which is what the published initialiser does.
transformer_init = nnx.initializers.normal(0.02)
# Kaiming uniform with a = sqrt(5): uniform within 1/sqrt(fan_in), PyTorch's default.
torch_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


_RECOMPUTING: contextvars.ContextVar[bool] = contextvars.ContextVar("recomputing", default=False)

# Most layers that are compiled one by one.
FEW = 8

# Name of what is kept for the backward pass besides products (jax.ad_checkpoint).
KEPT = "kept"


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, by erf; of 16-bit numbers computed in float32 and rounded once, as torch does.

    jax.nn.gelu takes erfc, for the digits of results below 1e-6, which is slow on a CPU
    (benchmarks/RESULTS.md). Of 16-bit numbers it rounds the erfc too, and XLA stores it on a GPU.
    """
    wide = widened(x)
    half = 0.5 * wide
    return (half + half * jax.lax.erf(wide * 0.5**0.5)).astype(x.dtype)


def align_rank(x: jax.Array, to: jax.Array) -> jax.Array:
    """`x` with leading axes of length 1, so that it has as many axes as `to`."""
    return x.reshape((1,) * (to.ndim - x.ndim) + x.shape)


def torch_bias_init(fan_in: int) -> Initialiser:
    """Uniform within 1/sqrt(fan_in): PyTorch's default for the bias of a layer with that fan-in."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def row_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel: (..., C), (C, D) -> (..., D).

    On a CPU with the leading axes of x as one: with several, XLA computes the kernel's gradient
    from a transposed copy of the output's, at a half to a quarter of the speed
    (benchmarks/RESULTS.md).
    """
    if backend.platform() != "cpu":
        return x @ kernel
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would refuse C = 0
    return product(rows, kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Linear):
    """Flax's Linear, its product as that of `row_product`."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options, dot_general=_row_dot_general)


def _row_dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` as Flax's Linear calls it, without options of its own."""
    assert not any(options.values()), options
    return row_product(x, kernel)


def torch_linear(c: int, d: int, *, rngs: nnx.Rngs) -> Linear:
    """A linear layer (C -> D) with PyTorch's default initialisation of weight and bias."""
    return Linear(c, d, kernel_init=torch_init, bias_init=torch_bias_init(c), rngs=rngs)


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm, computed in the order of PyTorch's, and under strict dtype promotion too.

    Flax multiplies 1 / deviation by the scale first, which on a CPU becomes an array as large as x.
    The mean is subtracted before squaring; E[x^2] - E[x]^2 would lose digits. Of Flax's options it
    has epsilon alone.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., C); of 16-bit numbers computed in float32 and rounded once."""
        scale, bias = self.scale[...], self.bias[...]
        if backend.platform() != "cpu":
            return _normalise(x, scale, bias, self.epsilon)
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(x, scale, bias)
        wide = widened(x)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon)
        scale, bias = (align_rank(a.astype(y.dtype), y) for a in (scale, bias))
        return (y * scale + bias).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm on accelerators, whose mean and deviation of every row are kept.

    Its derivative as XLA finds it computes both again, and reads and writes more arrays.
    """
    return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = widened(x)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    mean, inverse = (checkpoint_name(a, KEPT) for a in (mean, inverse))
    y = (wide - mean) * inverse
    y = y * align_rank(widened(scale), y) + align_rank(widened(bias), y)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(x, scale, bias)
    return y.astype(dtype), (x, scale, bias, mean, inverse)


def _normalise_backward(
    epsilon: float, saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, bias, mean, inverse = saved
    grad, normal = widened(grad), (widened(x) - mean) * inverse
    of_normal = grad * align_rank(widened(scale), grad)
    along = (of_normal * normal).mean(-1, keepdims=True)
    of_x = (of_normal - of_normal.mean(-1, keepdims=True) - normal * along) * inverse
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = (grad * normal).sum(rows), grad.sum(rows)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def widened(x: jax.Array) -> jax.Array:
    """16-bit numbers as float32, others as they are."""
    return x.astype(jnp.float32) if x.dtype.itemsize == 2 else x


def layer_norm(c: int, epsilon: float, *, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm over C channels as PyTorch computes it."""
    return LayerNorm(c, epsilon=epsilon, rngs=rngs)


def drop_path(
    residual: jax.Array, rate: jax.Array | float | None, key: jax.Array | None
) -> jax.Array:
    """Stochastic depth: zeroes whole samples of a residual branch, rescales the others.

    Source: Huang et al. 2016 (arXiv 1603.09382), section 3; docs/reference.md#vit-drop-path.

    Args:
        residual: (B, ...).
        rate: probability that a sample is zeroed; None for no drop-path.
        key: source of the draw; None means evaluation, where `residual` is returned as it is.

    Returns:
        (B, ...), samples that are kept divided by the probability of being kept.
    """
    if key is None or rate is None:
        return residual
    shape = (residual.shape[0],) + (1,) * (residual.ndim - 1)
    return residual * drop_path_factors(shape, rate, key).astype(residual.dtype)


def drop_path_factors(shape: tuple[int, ...], rate: jax.Array | float, key: jax.Array) -> jax.Array:
    """What `drop_path` multiplies by: 0, or 1 / the probability of being kept, float32."""
    keep = 1.0 - rate
    return (jax.random.uniform(key, shape) < keep).astype(jnp.float32) / keep


def stack(build: Callable[[nnx.Rngs], nnx.Module], count: int, *, rngs: nnx.Rngs) -> Any:
    """`count` modules of one kind as one module whose parameters have a leading axis L.

    Args:
        build: makes one module.
        count: L.
        rngs: each module draws from a generator of its own.
    """

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build_all(rngs: nnx.Rngs) -> nnx.Module:
        return build(rngs)

    return build_all(rngs)


def scan_stack(
    module: nnx.Module,
    x: Any,
    inputs: Any,
    apply: Callable[..., tuple[Any, Any]],
    *,
    remat: str = "never",
    short: bool = False,
    uncopied: Callable[[Sequence[Any]], bool] | None = None,
) -> tuple[Any, Any]:
    """Runs stacked layers one after another: x, _ = apply(layer_0, x, inputs[0]) and so on.

    Args:
        module: made by `stack`.
        x: what flows from layer to layer (any pytree).
        inputs: pytree with a leading axis L (per-layer rates, keys, codes), or None.
        apply: (layer, x, inputs of that layer) -> (x, output).
        remat: see `apply_remat_policy`.
        short: few layers (`FEW`) are no loop on accelerators, where what is kept for the backward
            pass would be copied into stacks and back.
        uncopied: of the names on a parameter's path: whether a CPU leaves it in its stack, where
            `apply` takes it as a `gradients_in_place.LayerArray`.

    Returns:
        x after the last layer, and the layers' outputs with a leading axis L.
    """
    graph, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    count = len(jax.tree.leaves(params)[0])

    def layer(x: Any, params: dict, inputs: Any) -> tuple[Any, Any]:
        own = nnx.State(all_gather_params(params))
        return apply(nnx.merge(graph, own), x, inputs)

    policy = functools.partial(apply_remat_policy, remat=remat, looped=count > 1)
    unroll = short and count <= FEW and backend.platform() in ("gpu", "tpu")
    loop = functools.partial(jax.lax.scan, unroll=unroll) if count > 1 else _only_layer
    # Not where memory is counted: what is not needed is left out when a program is compiled.
    if uncopied and backend.is_one_cpu() and not backend.is_named():
        return gradients_in_place.over_layers(layer, x, params, inputs, uncopied, policy, loop)
    return loop(policy(lambda x, own: layer(x, *own)), x, (params, inputs))


def _only_layer(step: Callable[..., tuple[Any, Any]], x: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over one layer, which may change the shape of x.

    Raises:
        ValueError: there are inputs for more layers.
    """
    lengths = {len(leaf) for leaf in jax.tree.leaves(inputs)}
    if lengths != {1}:
        raise ValueError(f"one layer has inputs with leading axes of {sorted(lengths)}")
    x, output = step(x, jax.tree.map(lambda a: a[0], inputs))
    return x, jax.tree.map(lambda a: a[None], output)


def all_gather_params(params: Any) -> Any:
    """All-gathers parameters that FSDP shards over 'data', for a layer to compute with.

    Without the constraint the compiler may multiply with the shards and move activations instead.
    Experts stay sharded (parallel/partition.py), and so do stacked layers, which are gathered one
    at a time inside the scan.
    """
    if not _shards_data():
        return params

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = tree_paths.names(path)
        if tree_paths.is_stacked(names) or not leaf.ndim:
            return leaf
        spec = PartitionSpec("expert" if "experts" in names else None)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(gather, params)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """While a function is traced: recompute where remat is 'auto'."""
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def recomputes(remat: str) -> bool:
    """Whether everything is recomputed: 'always', or 'auto' inside `recomputing`."""
    return remat == "always" or (remat == "auto" and _RECOMPUTING.get())


def apply_remat_policy(
    body: Callable[..., Any], remat: str, *, looped: bool = True
) -> Callable[..., Any]:
    """Applies the rematerialisation policy: what the backward pass reads from memory.

    Where nothing else is said, the results of matrix products and of fused attention are kept, and
    what is named KEPT; the rest costs less to compute again than to write and read. Gathered
    parameters are not kept: those of all layers would be on every device at once.

    Args:
        body: the function to differentiate.
        remat: recompute everything: 'always', 'never', or 'auto', inside `recomputing` only.
        looped: whether it is the body of a `lax.scan`. There forward and backward pass are separate
            loops; elsewhere the compiler would merge what is computed twice, and keep it (as it may
            in an unrolled one).
    """
    if recomputes(remat):
        return jax.checkpoint(body)
    return jax.checkpoint(body, policy=_is_product, prevent_cse=not looped)


def _is_product(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    # jax has no public name for its fused attention.
    fused = primitive.name.startswith("dot_product_attention")
    named = primitive.name == "name" and parameters["name"] == KEPT
    return (
        fused
        or named
        or bool(jax.checkpoint_policies.dots_saveable(primitive, *arguments, **parameters))
    )


def _shards_data() -> bool:
    """Whether the mesh in context has more than one device along 'data'."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["data"] > 1


class Patches(nnx.Module):
    """Convolution whose stride is its kernel size, as a matrix product over patches.

    (B, H, W, C) -> (B, H/size, W/size, D). The same numbers as a convolution, without the slow
    strided convolutions (and their gradients) of the CPU backend. Kernel: (size*size*C, D), rows
    ordered (row, column, channel). Initial weights are by default those of PyTorch's convolution.
    """

    def __init__(
        self,
        size: int,
        c: int,
        d: int,
        *,
        kernel_init: Initialiser = torch_init,
        bias_init: Initialiser | None = None,
        rngs: nnx.Rngs,
    ):
        self.size = size
        fan_in = size * size * c
        bias_init = bias_init or torch_bias_init(fan_in)
        self.linear = Linear(fan_in, d, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(
            rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=self.size, q=self.size)
        )
