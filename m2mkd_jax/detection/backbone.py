"""Backbones: the transformer on images of any size, and the simple feature pyramid.

Axes: B images, H height, W width, h and w the same in tokens, D width, C channels of the pyramid,
L blocks.

Source: Li et al. 2022 (arXiv 2203.16527), section 3; docs/detection.md#backbone,
docs/detection.md#pyramid.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2mkd_jax.conversion.resize_positions import bicubic_weights
from m2mkd_jax.detection.attention import MapAttention
from m2mkd_jax.detection.convolution import NORM_EPS, ConvNorm, Upsample, max_pool
from m2mkd_jax.detection.spec import BackboneSpec, MapBlockKind
from m2mkd_jax.errors import require
from m2mkd_jax.models import chain, layers
from m2mkd_jax.models.moe.vmoe import Segment

LEVELS = ("p2", "p3", "p4", "p5", "p6")


class Net(nnx.Module):
    """The transformer: images -> the tokens after the last block, as a map.

    There is no class token, no final norm and no head.
    """

    def __init__(self, spec: BackboneSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        vit = spec.vmoe.vit
        self.patch_embed = layers.Patches(vit.patch, 3, vit.width, rngs=rngs)
        shape = (1, spec.positions, vit.width)
        self.pos_embed = nnx.Param(layers.transformer_init(rngs.params(), shape))
        for i, (kind, count) in enumerate(spec.segments()):
            attention = functools.partial(
                MapAttention,
                window=spec.window if kind.windowed else 0,
                table_side=_table_side(spec, kind),
            )
            segment = Segment(spec.vmoe, kind.block, count, attention=attention, rngs=rngs)
            setattr(self, f"segment_{i}", segment)

    def positions(self, height: int, width: int) -> jax.Array:
        """The position embedding of a map of height x width tokens, (1, height, width, D).

        Bicubic where the size is another than the embedding's.
        """
        rows = self.pos_embed[...][:, int(self.spec.class_position) :]
        side = math.isqrt(rows.shape[1])
        grid = rows.reshape(side, side, -1)
        if (height, width) != (side, side):
            down, across = (bicubic_weights(side, n).astype(np.float32) for n in (height, width))
            grid = jnp.einsum("ui,vj,ijd->uvd", down, across, grid.astype(jnp.float32))
        return grid[None].astype(rows.dtype)

    def __call__(
        self, images: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the map.

        Args:
            images: (B, H, W, 3), normalised; sides are multiples of the patch.
            key: of drop-path and the routers' noise, in training; None in evaluation.

        Returns:
            (B, h, w, D), and the auxiliary outputs of the blocks with experts (moe/blocks.py).

        Raises:
            UserError: a side is no multiple of the patch.
        """
        patch, shape = self.spec.vmoe.vit.patch, images.shape[1:3]
        require(
            not shape[0] % patch and not shape[1] % patch,
            f"images of {shape[0]} x {shape[1]} pixels cannot be cut into patches of {patch}",
        )
        x = self.patch_embed(images)
        positions = self.positions(*x.shape[1:3])
        x = x + jnp.broadcast_to(positions, x.shape).astype(x.dtype)
        depth = self.spec.depth
        keys = None if key is None else jax.random.split(key, depth)
        rates = None
        if keys is not None and self.spec.drop_path:
            rates = jnp.asarray(chain.linear_rates([depth], self.spec.drop_path)[0])
        auxiliary: list[dict[str, jax.Array]] = []
        at = 0
        for i, (kind, count) in enumerate(self.spec.segments()):
            own = slice(at, at + count)
            inputs = (None if a is None else a[own] for a in (rates, keys))
            x, aux = getattr(self, f"segment_{i}")(x, *inputs)
            auxiliary += [aux] if kind.block.moe else []
            at += count
        joined = jax.tree.map(lambda *a: jnp.concatenate(a), *auxiliary) if auxiliary else {}
        return x, joined


def _table_side(spec: BackboneSpec, kind: MapBlockKind) -> int:
    """Side of the maps that a block's relative position tables are for; 0: it has none."""
    if not spec.relative_positions:
        return 0
    return spec.window if kind.windowed else spec.table_image_size // spec.vmoe.vit.patch


class Pyramid(nnx.Module):
    """The simple feature pyramid: levels of strides 4 to 64 from the one map of stride 16."""

    def __init__(self, width: int, channels: int, *, rngs: nnx.Rngs):
        half, quarter = width // 2, width // 4
        self.p2_up1 = Upsample(width, half, rngs=rngs)
        self.p2_norm = layers.layer_norm(half, NORM_EPS, rngs=rngs)
        self.p2_up2 = Upsample(half, quarter, rngs=rngs)
        self.p3_up = Upsample(width, half, rngs=rngs)
        for name, c in (("p2", quarter), ("p3", half), ("p4", width), ("p5", width)):
            setattr(self, f"{name}_reduce", ConvNorm(c, channels, 1, rngs=rngs))
            setattr(self, f"{name}_smooth", ConvNorm(channels, channels, 3, rngs=rngs))

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """(B, h, w, D) -> the levels by name, (B, ., ., C) each."""
        inputs = {
            "p2": self.p2_up2(layers.gelu(self.p2_norm(self.p2_up1(x)))),
            "p3": self.p3_up(x),
            "p4": x,
            "p5": max_pool(x),
        }
        found = {
            name: getattr(self, f"{name}_smooth")(getattr(self, f"{name}_reduce")(y))
            for name, y in inputs.items()
        }
        return found | {"p6": found["p5"][:, ::2, ::2]}


class Backbone(nnx.Module):
    """Transformer and pyramid."""

    def __init__(self, spec: BackboneSpec, *, rngs: nnx.Rngs):
        self.net = Net(spec, rngs=rngs)
        self.pyramid = Pyramid(spec.vmoe.vit.width, spec.channels, rngs=rngs)

    def features(
        self, images: jax.Array, key: jax.Array | None = None
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The map `last_feat` (B, h, w, D) and the levels `p2` to `p6` (B, ., ., C).

        Args:
            images, key: as for `Net`.

        Returns:
            The maps by name, and the auxiliary outputs of `Net`.
        """
        last, aux = self.net(images, key)
        last = last.astype(jnp.float32)  # whatever type the transformer computes in
        return {"last_feat": last} | self.pyramid(last), aux
