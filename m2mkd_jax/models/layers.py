"""Layers shared by the vision transformers and by the NAC.

Axes: B batch, H height, W width, C channels in, D channels out, N tokens, L stacked layers; in
attention H heads, C channels of a head.

Flax's own Linear and LayerNorm are used wherever they compute what PyTorch computes; this file
holds what they lack: PyTorch's default initialisation, per-sample stochastic depth, patches as a
matrix product, a depthwise convolution that is fast on a CPU, and attention that is on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from m2mkd_jax import tree_paths

# PyTorch's LayerNorm subtracts the mean before squaring; E[x^2] - E[x]^2 would lose digits.
EXACT_VARIANCE = {"use_fast_variance": False}

# normal(0.02) cut at +-2 (a hundred sigma), which is what the published initialiser does.
transformer_init = nnx.initializers.normal(0.02)
# Kaiming uniform with a = sqrt(5): uniform within 1/sqrt(fan_in), PyTorch's default.
torch_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# Below so many tokens fused attention has nothing to gain.
SHORTEST = 64


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU; the tanh form would not match PyTorch."""
    return jax.nn.gelu(x, approximate=False)


def torch_bias_init(fan_in: int) -> Callable:
    """Uniform within 1/sqrt(fan_in): PyTorch's default for the bias of a layer with that fan-in."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def torch_linear(c: int, d: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer (C -> D) with PyTorch's default initialisation of weight and bias."""
    return nnx.Linear(c, d, kernel_init=torch_init, bias_init=torch_bias_init(c), rngs=rngs)


def layer_norm(c: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(c, epsilon=epsilon, **EXACT_VARIANCE, rngs=rngs)


def drop_path(residual: jax.Array, rate: jax.Array | float, key: jax.Array | None) -> jax.Array:
    """Stochastic depth: zeroes whole samples of `residual` (B, ...) with probability `rate`.

    The kept ones are divided by the keep probability. `key=None` means evaluation: identity.
    """
    if key is None:
        return residual
    keep = 1.0 - rate
    shape = (residual.shape[0],) + (1,) * (residual.ndim - 1)
    kept = jax.random.uniform(key, shape) < keep
    return residual * (kept / keep).astype(residual.dtype)


def self_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v: three times (B, N, H, C) -> (B, N, H, C), softmax in float32.

    By cuDNN where it can be had: about 2.3 times as fast on an H100 (benchmarks/RESULTS.md).
    """
    if not fits_cudnn(q, k):
        return jax.nn.dot_product_attention(q, k, v)
    return evened_attention(q, k, v, "cudnn")


def evened_attention(q, k, v, implementation: str) -> jax.Array:
    """`self_attention` as cuDNN's backward pass takes it: an odd N gets one token that is masked.

    With a class token N is odd for every published transformer.
    """
    b, n = q.shape[:2]
    if n % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full((b,), n, jnp.int32)
    x = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return x[:, :n]


def fits_cudnn(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN's fused attention, forward and backward, takes (B, N, H, C)."""
    n, c = q.shape[1], q.shape[3]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and min(n, k.shape[1]) >= SHORTEST and c % 8 == 0 and c <= 128 and _has_cudnn()


@functools.cache
def _has_cudnn() -> bool:
    """On NVIDIA's GPUs from Ampere (compute capability 8) on; AMD's name theirs by letters."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    return jax.default_backend() == "gpu" and major.isdigit() and int(major) >= 8


def stack(build: Callable[[nnx.Rngs], nnx.Module], count: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules of one kind as one module whose parameters have a leading axis L."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build_all(rngs):
        return build(rngs)

    return build_all(rngs)


def scan_stack(module: nnx.Module, x, inputs, apply: Callable, *, remat: bool = False):
    """Runs stacked layers one after another: x -> apply(layer_0, x, inputs[0]) -> ...

    Args:
        module: made by `stack`.
        x: what flows from layer to layer (any pytree).
        inputs: pytree with a leading axis L (per-layer rates, keys, codes), or None.
        apply: (layer, x, inputs of that layer) -> x.
        remat: recompute a layer's activations in the backward pass instead of keeping them.
    """
    graph, state = nnx.split(module)

    def body(x, layer):
        state, inputs = layer
        return apply(nnx.merge(graph, all_gather_params(state)), x, inputs), None

    return jax.lax.scan(remat_policy(body, remat), x, (state, inputs))[0]


def all_gather_params(weights):
    """Weights as a layer computes with them: what FSDP cut over 'data' is gathered.

    Left to itself the compiler may multiply with the parts instead, and move activations about.
    Experts stay where they are (parallel/partition.py), and so do stacked layers, which are
    gathered one by one when their turn comes.
    """
    if not _data_groups():
        return weights

    def gather(path, leaf):
        names = tree_paths.names(path)
        if tree_paths.is_stacked(names):
            return leaf
        place = PartitionSpec("expert" if "experts" in names else None)
        return jax.lax.with_sharding_constraint(leaf, place)

    return jax.tree_util.tree_map_with_path(gather, weights)


def remat_policy(body: Callable, remat: bool) -> Callable:
    """`body` with what the backward pass finds of it in memory, and what it computes again.

    With `remat` it finds nothing. On a GPU or TPU, where a step waits for memory, it finds the
    results of matrix products and of fused attention. On a CPU it finds everything but gathered
    weights: those of all layers would be on every device at once.
    """
    if remat:
        return jax.checkpoint(body)
    if jax.default_backend() != "cpu":
        # Forward and backward are loops of their own: nothing could be shared among them anyway.
        return jax.checkpoint(body, policy=_is_product, prevent_cse=False)
    if _data_groups():
        return jax.checkpoint(body, policy=_is_no_gathered_weight)
    return body


def _is_product(primitive, *arguments, **parameters) -> bool:
    # jax has no public name for its fused attention.
    fused = primitive.name.startswith("dot_product_attention")
    return fused or jax.checkpoint_policies.dots_saveable(primitive, *arguments, **parameters)


def _is_no_gathered_weight(primitive, *_, **parameters) -> bool:
    # All that is put somewhere and not cut over 'data' is a weight.
    constrained = primitive.name == "sharding_constraint"
    return not constrained or "data" in str(parameters["sharding"].spec)


def _data_groups() -> bool:
    """Whether a mesh in context cuts the batch into groups, over which weights may be cut too."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["data"] > 1


class Patches(nnx.Module):
    """Convolution whose stride is its kernel size, as a matrix product over patches.

    (B, H, W, C) -> (B, H/size, W/size, D). The same numbers as a convolution, without the slow
    strided convolutions (and their gradients) of the CPU backend. Kernel: (size*size*C, D), rows
    ordered (row, column, channel).
    """

    def __init__(self, size: int, c: int, d: int, *, kernel_init, bias_init, rngs: nnx.Rngs):
        self.size = size
        self.linear = nnx.Linear(
            size * size * c, d, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(
            rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=self.size, q=self.size)
        )


class DepthwiseConv(nnx.Module):
    """Depthwise convolution with odd kernel, stride 1, zero padding: (B, H, W, C) -> same shape."""

    def __init__(self, c: int, size: int, *, kernel_init, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, c), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return depthwise_conv(x, self.kernel[...]) + self.bias[...]


def depthwise_conv(x: jax.Array, kernel: jax.Array, method: str | None = None) -> jax.Array:
    """x (B, H, W, C) convolved channel by channel with kernel (K, K, C), zero padded.

    XLA's own depthwise convolution is 10 to 100 times slower than needed on a CPU
    (benchmarks/RESULTS.md), so there it becomes a product with banded matrices: over all positions
    where they are few ('positions'), else over the columns, one kernel row at a time ('columns').
    """
    h, w = x.shape[1:3]
    if method is None:
        if jax.default_backend() != "cpu":
            method = "native"
        else:
            method = "positions" if h * w <= 256 else "columns"
    if method == "native":
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None, :],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
    size = kernel.shape[0]
    across, across_inside = _band(w, size)
    if method == "columns":
        rows = jnp.pad(x, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
        rows = jnp.stack([rows[:, i : i + h] for i in range(size)], axis=-2)
        band = kernel[:, across] * across_inside[None, :, :, None]
        return jnp.einsum("bhwkc,kuwc->bhuc", rows, band)
    down, down_inside = _band(h, size)
    band = kernel[down[:, None, :, None], across[None, :, None, :]]
    band = band * (down_inside[:, None, :, None] & across_inside[None, :, None, :])[..., None]
    band = band.reshape(h * w, h * w, -1)
    return jnp.einsum("bvc,uvc->buc", x.reshape(x.shape[0], h * w, -1), band).reshape(x.shape)


def _band(length: int, size: int) -> tuple[jax.Array, jax.Array]:
    """For each (output, input) position: which kernel entry joins them, and whether one does."""
    position = jnp.arange(length)
    offset = position[None, :] - position[:, None] + size // 2
    return jnp.clip(offset, 0, size - 1), (offset >= 0) & (offset < size)
