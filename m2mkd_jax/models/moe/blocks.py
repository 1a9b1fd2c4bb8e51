"""Blocks of a V-MoE: attention, then an MLP or a mixture of experts, optionally between stitches.

Axes: B images, T tokens of an image, G groups of whole images, S tokens of a group, D width,
X stitch width, E experts.

Source: Riquelme et al. 2021 (arXiv 2106.05974), section 2; docs/reference.md#vmoe,
docs/reference.md#vmoe-stitches.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.models.moe import dispatch, experts, router
from m2mkd_jax.models.moe.spec import BlockKind, VMoESpec
from m2mkd_jax.models.vit import Attention, Mlp

STITCH_EPS = 1e-5


class Stitch(nnx.Module):
    """LayerNorm and linear map between the student's width and the meta model's."""

    def __init__(self, c: int, d: int, *, rngs: nnx.Rngs):
        self.norm = layers.layer_norm(c, STITCH_EPS, rngs=rngs)
        self.linear = layers.Linear(c, d, kernel_init=layers.transformer_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))


class MoE(nnx.Module):
    """Router and experts in place of an MLP."""

    def __init__(self, spec: VMoESpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.router = router.Router(spec.router_spec(), spec.vit.width, rngs=rngs)
        self.experts = experts.Experts(spec.experts, spec.vit.width, rngs=rngs)

    def __call__(
        self, x: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Routes tokens to experts and sums the experts' outputs.

        Without a key, in evaluation, an image does not depend on the others: the tokens' choices
        are all served, whatever the dispatch, and with expert choice each image is a group.

        Args:
            x: (B, T, D), or a map (B, H, W, D).
            key: of the router's noise, in training; None in evaluation.

        Returns:
            An array like x, and auxiliary outputs: the router's scalars (`Router.__call__`); 'load'
            (E,), the share of all assignments per expert before any is dropped; 'dead', the number
            of experts without any; 'dropped' (see dispatch.py).
        """
        spec, training = self.spec, key is not None
        alone = 1 if spec.router == "expert_choice" else 0
        groups = dispatch.groups(x.shape[0], spec.group if training else alone)
        tokens = x.reshape(groups, -1, x.shape[-1])
        routing, aux = self.router(tokens, key)
        arguments = (tokens, routing, self.experts.weights(), experts.mlp)
        if spec.is_dropless(training):
            y, dropped = dispatch.dropless(*arguments)
        else:
            slots = spec.router_spec().capacity(tokens.shape[1])
            y, dropped = dispatch.capacity(*arguments, slots)
        load = router.load(routing, spec.experts)
        aux |= {
            "load": load,
            "dead": jnp.sum((load == 0.0).astype(jnp.float32)),
            "dropped": dropped,
        }
        return y.reshape(x.shape), aux


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), each under drop-path, between stitches.

    Args:
        spec: hyperparameters of the network.
        kind: structure of the block.
        attention: (spec of the transformer, rngs=) -> the attention layer.
        rngs: source of the initial values.

    Source: docs/reference.md#vit-block, docs/reference.md#vmoe-stitches.
    """

    def __init__(
        self,
        spec: VMoESpec,
        kind: BlockKind,
        *,
        attention: Callable[..., Attention] = Attention,
        rngs: nnx.Rngs,
    ):
        vit, self.kind = spec.vit, kind
        if kind.pre:
            self.pre_stitch = Stitch(spec.stitch_dim, vit.width, rngs=rngs)
        self.norm1 = layers.layer_norm(vit.width, vit.eps, rngs=rngs)
        self.attn = attention(vit, rngs=rngs)
        self.norm2 = layers.layer_norm(vit.width, vit.eps, rngs=rngs)
        if kind.moe:
            self.moe = MoE(spec, rngs=rngs)
        else:
            self.mlp = Mlp(vit.width, rngs=rngs)
        if kind.post:
            self.post_stitch = Stitch(vit.width, spec.stitch_dim, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rate: jax.Array | float | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the block.

        Args:
            x: tokens (B, T, D), or (B, T, X) where the block starts with a stitch; a map has the
                axes H and W in place of T, if the attention takes it.
            rate: of drop-path; None for no drop-path.
            key: of drop-path and the router's noise; None in evaluation, see `MoE`.

        Returns:
            As x, with D channels, or X where the block ends with a stitch, and the auxiliary
            outputs of `MoE`, if it has experts.
        """
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        drop_keys = keys[:2] if rate is not None else (None, None)
        if self.kind.pre:
            x = self.pre_stitch(x)
        x = x + layers.drop_path(self.attn(self.norm1(x)), rate, drop_keys[0])
        y = self.norm2(x)
        aux: dict[str, jax.Array] = {}
        if self.kind.moe:
            y, aux = self.moe(y, keys[2])
        else:
            y = self.mlp(y)
        x = x + layers.drop_path(y, rate, drop_keys[1])
        return (self.post_stitch(x) if self.kind.post else x), aux
