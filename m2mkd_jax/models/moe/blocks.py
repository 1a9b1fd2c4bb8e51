"""Blocks of a V-MoE: attention, then an MLP or a mixture of experts, perhaps between stitches.

Axes: B images, T tokens of an image, G groups of whole images, S tokens of a group, D width,
X stitch width, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
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
        self.linear = nnx.Linear(c, d, kernel_init=layers.transformer_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))


class MoE(nnx.Module):
    """Router and experts in place of an MLP."""

    def __init__(self, spec: VMoESpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.router = router.Router(spec.router_spec(), spec.vit.width, rngs=rngs)
        self.experts = experts.Experts(spec.experts, spec.vit.width, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, dict]:
        """(B, T, D) -> the same, and what happened.

        key: of the router's noise, or None. What happened: the router's scalars, 'load' (E,), the
        share of all assignments that each expert got before any was dropped, 'dead', how many
        experts got none, and 'dropped' (see dispatch.py).
        """
        spec = self.spec
        groups = dispatch.groups(x.shape[0], spec.group)
        tokens = rearrange(x, "(g b) t d -> g (b t) d", g=groups)
        routing, seen = self.router(tokens, key)
        arguments = (tokens, routing, self.experts.weights(), experts.mlp)
        if spec.dispatch == "dropless":
            y, dropped = dispatch.dropless(*arguments)
        else:
            slots = spec.router_spec().capacity(tokens.shape[1])
            y, dropped = dispatch.capacity(*arguments, slots)
        load = router.load(routing, spec.experts)
        seen |= {"load": load, "dead": jnp.sum(load == 0.0, dtype=jnp.float32), "dropped": dropped}
        return rearrange(y, "g (b t) d -> (g b) t d", t=x.shape[1]), seen


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), each under drop-path, between stitches."""

    def __init__(self, spec: VMoESpec, kind: BlockKind, *, rngs: nnx.Rngs):
        vit, self.kind = spec.vit, kind
        if kind.pre:
            self.pre_stitch = Stitch(spec.stitch_dim, vit.width, rngs=rngs)
        self.norm1 = layers.layer_norm(vit.width, vit.eps, rngs=rngs)
        self.attn = Attention(vit, rngs=rngs)
        self.norm2 = layers.layer_norm(vit.width, vit.eps, rngs=rngs)
        if kind.moe:
            self.moe = MoE(spec, rngs=rngs)
        else:
            self.mlp = Mlp(vit.width, rngs=rngs)
        if kind.post:
            self.post_stitch = Stitch(vit.width, spec.stitch_dim, rngs=rngs)

    def __call__(self, x, rate=None, key=None) -> tuple[jax.Array, dict]:
        """Tokens (B, T, D or X) -> tokens (B, T, D or X), and what the experts saw.

        rate: of drop-path, or None. key: of drop-path and the router's noise, or None for neither.
        """
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        drop_keys = keys[:2] if rate is not None else (None, None)
        if self.kind.pre:
            x = self.pre_stitch(x)
        x = x + layers.drop_path(self.attn(self.norm1(x)), rate, drop_keys[0])
        y, seen = self.norm2(x), {}
        if self.kind.moe:
            y, seen = self.moe(y, keys[2])
        else:
            y = self.mlp(y)
        x = x + layers.drop_path(y, rate, drop_keys[1])
        return (self.post_stitch(x) if self.kind.post else x), seen
