"""Staged vision transformers: teacher, meta model, and any division of them into stages.

Axes: B batch, H height, W width, P patch side, N patches, D width, T tokens (N + 1), K classes,
L blocks.

Pre-norm ViT: class token first, learned position embedding, exact GELU, final norm and linear head
on token 0.

Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1; docs/reference.md#vit-block,
docs/reference.md#vit-stages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import attention, batching, chain, layers
from m2mkd_jax.models.vit_spec import ViTSpec


class Attention(nnx.Module):
    """Multi-head self-attention with a fused qkv in the order (3, heads, head_dim)."""

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        init = {"kernel_init": layers.transformer_init, "rngs": rngs}
        self.heads = spec.heads
        self.qkv = layers.Linear(spec.width, 3 * spec.width, use_bias=spec.qkv_bias, **init)
        self.proj = layers.Linear(spec.width, spec.width, **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Split first: the gradient is then one concatenation.
        qkv = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (rearrange(y, "b n (h c) -> b n h c", h=self.heads) for y in qkv)
        x = attention.self_attention(q, k, v)
        return self.proj(rearrange(x, "b n h c -> b n (h c)"))


class Mlp(nnx.Module):
    """Linear D -> 4D, exact GELU, linear 4D -> D."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        init = {"kernel_init": layers.transformer_init, "rngs": rngs}
        self.fc1 = layers.Linear(width, 4 * width, **init)
        self.fc2 = layers.Linear(4 * width, width, **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(layers.gelu(self.fc1(x)))


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), each under drop-path."""

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        self.norm1 = layers.layer_norm(spec.width, spec.eps, rngs=rngs)
        self.attn = Attention(spec, rngs=rngs)
        self.norm2 = layers.layer_norm(spec.width, spec.eps, rngs=rngs)
        self.mlp = Mlp(spec.width, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rate: jax.Array | float | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens (B, T, D) -> tokens (B, T, D); `rate` and `key` are of drop-path."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = x + layers.drop_path(self.attn(self.norm1(x)), rate, keys[0])
        return x + layers.drop_path(self.mlp(self.norm2(x)), rate, keys[1])


class ViTStage(chain.Stage):
    """`depth` consecutive blocks of a vision transformer.

    The first stage has the embedding before its blocks, the last one norm and head after them.

    Source: docs/reference.md#vit-stages.
    """

    def __init__(self, spec: ViTSpec, depth: int, *, first: bool, last: bool, rngs: nnx.Rngs):
        self.spec, self.depth, self.first, self.last = spec, depth, first, last
        d = spec.width
        if first:
            self.patch_embed = layers.Patches(spec.patch, spec.channels, d, rngs=rngs)
            self.cls_token = nnx.Param(layers.transformer_init(rngs.params(), (1, 1, d)))
            shape = (1, spec.tokens, d)
            self.pos_embed = nnx.Param(layers.transformer_init(rngs.params(), shape))
        if depth:
            self.blocks = layers.stack(lambda rngs: Block(spec, rngs=rngs), depth, rngs=rngs)
        if last:
            self.norm = layers.layer_norm(d, spec.eps, rngs=rngs)
            self.head = layers.Linear(
                d, spec.classes, kernel_init=layers.transformer_init, rngs=rngs
            )

    def join(self, after: chain.Stage) -> ViTStage | None:
        """Joins this stage and the next one into one loop over the blocks of both."""
        if self.last or not isinstance(after, ViTStage) or after.first or after.spec != self.spec:
            return None
        mine, theirs = chain.split(self).params, chain.split(after).params
        params = {**mine, **theirs}
        if "blocks" in mine and "blocks" in theirs:
            params["blocks"] = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b]), mine["blocks"], theirs["blocks"]
            )
        graph = _graph(self.spec, self.depth + after.depth, self.first, after.last)
        return chain.merge(graph, params, {})

    def embed(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, C) -> tokens (B, T, D)."""
        patches = rearrange(self.patch_embed(images), "b h w d -> b (h w) d")
        cls = jnp.broadcast_to(self.cls_token[...], (images.shape[0], 1, self.spec.width))
        tokens = jnp.concatenate([cls.astype(patches.dtype), patches], 1)
        return batching.add_to_images(tokens, self.pos_embed[...])

    def features(self, tokens: jax.Array) -> jax.Array:
        """Tokens (B, T, D) -> normalised class token (B, D), the head's input."""
        return self.norm(tokens)[:, 0]

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Images (B, H, W, C) or tokens (B, T, D) -> tokens (B, T, D) or logits (B, K)."""
        if self.first:
            x = self.embed(x)
        if self.depth:
            inputs = None
            if train and key is not None and rates is not None and any(rates):
                inputs = (jnp.asarray(rates), jax.random.split(key, self.depth))
            x, _ = layers.scan_stack(
                self.blocks,
                x,
                inputs,
                lambda block, x, inputs: (block(x, *(inputs or ())), None),
                remat=self.spec.remat,
                short=True,
            )
        if self.last:
            x = self.head(self.features(x)).astype(jnp.float32)
        return x


@functools.cache
def _graph(spec: ViTSpec, depth: int, first: bool, last: bool) -> nnx.GraphDef:
    """Structure of a stage; cached, since tracing is slow."""
    return chain.abstract(
        lambda rngs: ViTStage(spec, depth, first=first, last=last, rngs=rngs)
    ).graph


def build(spec: ViTSpec, depths: Sequence[int], *, rngs: nnx.Rngs) -> list[ViTStage]:
    """The network as stages of the given depths; (1, 1, ..., 1) is the meta model.

    Args:
        spec: hyperparameters of the network.
        depths: blocks of every stage.
        rngs: source of the initial values.
    """
    last = len(depths) - 1
    return [
        ViTStage(spec, depth, first=i == 0, last=i == last, rngs=rngs)
        for i, depth in enumerate(depths)
    ]


def cut(stages: Sequence[ViTStage], depths: Sequence[int]) -> list[ViTStage]:
    """Divides the same network, with the same weights, into stages of other depths.

    Args:
        stages: the whole network, in order.
        depths: blocks of every new stage.

    Raises:
        UserError: the depths do not sum to the network's.
    """
    total = sum(stage.depth for stage in stages)
    if sum(depths) != total:
        raise UserError(f"vit: depths {tuple(depths)} sum to {sum(depths)}, blocks are {total}")
    parts = [chain.split(stage) for stage in stages]
    blocks = [p.params["blocks"] for p in parts if "blocks" in p.params]
    blocks = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *blocks)
    target = nnx.eval_shape(lambda: build(stages[0].spec, depths, rngs=nnx.Rngs(0)))
    result, start = [], 0
    for i, stage in enumerate(target):
        graph = chain.split(stage).graph
        end = start + depths[i]
        params = {}
        if depths[i]:
            params["blocks"] = jax.tree.map(lambda a, s=start, e=end: a[s:e], blocks)
        if i == 0:
            names = ("patch_embed", "cls_token", "pos_embed")
            params |= {name: parts[0].params[name] for name in names}
        if i == len(target) - 1:
            params |= {name: parts[-1].params[name] for name in ("norm", "head")}
        result.append(chain.merge(graph, params, {}))
        start = end
    return result
