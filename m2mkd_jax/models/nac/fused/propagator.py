"""A propagator of a NAC, by fused kernels.

Axes: B batch, I input latents, U mediators, V = I + U senders, C channels in, D channels out,
S code.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from m2mkd_jax.models import layers
from m2mkd_jax.models.nac.fused import layer
from m2mkd_jax.models.nac.fused.programs import Norm
from m2mkd_jax.models.nac.fused.residuals import Residual
from m2mkd_jax.models.nac.modulation import LAYER_NORM_EPS
from m2mkd_jax.parallel.mesh import AXES

if TYPE_CHECKING:
    from m2mkd_jax.models.nac.attention import LatentLayer
    from m2mkd_jax.models.nac.modulation import ModulatedLinear


class Linear(NamedTuple):
    """Modulation (U, C), kernel (C, D) and bias (D,) of a modulated linear layer."""

    modulation: jax.Array
    kernel: jax.Array
    bias: jax.Array | None

    @classmethod
    def of(cls, layer: ModulatedLinear, codes: jax.Array) -> Linear:
        """Of a layer for codes (U, S)."""
        bias = None if layer.bias is None else layer.bias[...]
        return cls(layer.modulation(codes), layer.kernel[...], bias)

    @property
    def shift(self) -> jax.Array:
        """The bias of a layer that has one."""
        assert self.bias is not None
        return self.bias


class Weights(NamedTuple):
    """What all images share in a propagator.

    Attributes:
        norm: of mediators and input latents.
        projections: of query, key and value.
        exit: of the attention.
        gamma: layer scale (D,) of the attention.
        ffn_norm, fc1, fc2, ffn_gamma: of the feed-forward network.
    """

    norm: Norm
    projections: tuple[Linear, Linear, Linear]
    exit: Linear
    gamma: jax.Array
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear
    ffn_gamma: jax.Array


def weights_of(propagator: LatentLayer, codes: jax.Array, sender_codes: jax.Array) -> Weights:
    """What all images share, for codes of mediators (U, S) and of all senders (V, S).

    Source: docs/reference.md#nac-propagator, docs/reference.md#nac-ffn.
    """
    own, ffn = propagator.attention, propagator.ffn
    assert ffn is not None, "fused kernels are not made for a shared feed-forward network"
    return Weights(
        norm=Norm(own.receiver_norm.scale[...], own.receiver_norm.bias[...]),
        projections=(
            Linear.of(own.query, codes),
            Linear.of(own.key, sender_codes),
            Linear.of(own.value, sender_codes),
        ),
        exit=Linear.of(own.exit, codes),
        gamma=own.gamma[...],
        ffn_norm=Norm(ffn.norm.scale[...], ffn.norm.bias[...]),
        fc1=Linear.of(ffn.fc1, codes),
        fc2=Linear.of(ffn.fc2, codes),
        ffn_gamma=ffn.gamma[...],
    )


def propagate(
    weights: Weights,
    inputs: jax.Array,
    mediators: jax.Array,
    log_kernel: jax.Array,
    heads: int,
    keep: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """A propagator whose senders are the input latents and the mediators.

    Source: docs/reference.md#nac-propagator, docs/reference.md#nac-ffn.

    Args:
        weights: made by `weights_of`.
        inputs: states (B, I, D).
        mediators: states (B, U, D).
        log_kernel: sampled, (B, U, V).
        heads: of the attention.
        keep: drop-path, made by `keep_factors`; None for no drop-path.

    Returns:
        New states of the mediators (B, U, D).
    """
    if keep is None:
        keep = (jnp.ones((len(mediators),), jnp.float32),) * 2
    compute = functools.partial(_propagate, heads=heads)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # XLA cannot divide a kernel among devices: each computes its own images.
        images, whole = PartitionSpec(AXES), PartitionSpec()
        compute = jax.shard_map(
            compute, in_specs=(images, whole), out_specs=images, check_vma=False
        )
    return compute((inputs, mediators, log_kernel, *keep), weights)


def _propagate(images: tuple[jax.Array, ...], w: Weights, heads: int) -> jax.Array:
    """`propagate` on one device's images, with drop-path's factors (B,) of either branch."""
    inputs, mediators, log_kernel, keep, ffn_keep = images
    modulations, kernels, biases = zip(*w.projections, strict=True)
    products, states = layer.project_senders(
        inputs, mediators, w.norm, modulations, kernels, LAYER_NORM_EPS
    )
    q, k, v = (
        x if bias is None else x + layers.align_rank(bias, x)
        for x, bias in zip(products, biases, strict=True)
    )
    message = layer.attend(q, k, v, log_kernel, heads)
    states, h = layer.add_and_project(
        states,
        layer.project_message(message, w.exit.modulation, w.exit.kernel),
        Residual(w.gamma, w.exit.shift, keep),
        w.ffn_norm,
        w.fc1.modulation,
        w.fc1.kernel,
        LAYER_NORM_EPS,
    )
    y = layer.project_geglu(h, w.fc1.shift, w.fc2.modulation, w.fc2.kernel)
    return layer.add(states, y, Residual(w.ffn_gamma, w.fc2.shift, ffn_keep))


def keep_factors(
    batch: int, rate: jax.Array | float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors (B,) of drop-path, float32: of the attention and of the feed-forward network.

    Args:
        batch: B.
        rate: probability that an image's branch is dropped.
        key: of both draws.
    """
    factors = [
        layers.drop_path_factors((batch, 1, 1), rate, k)[:, 0, 0] for k in jax.random.split(key)
    ]
    return factors[0], factors[1]
