"""Self-attention on feature maps: windows and decomposed relative positions.

Axes: B images, H height and W width in tokens, D width, N heads, C channels of a head, S side of
a window.

Source: Li et al. 2022 (arXiv 2203.16527), section 3; Li et al. 2021 (arXiv 2112.01526), section
4.1; docs/detection.md#vitdet.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from m2mkd_jax.models import attention
from m2mkd_jax.models.vit import Attention
from m2mkd_jax.models.vit_spec import ViTSpec


class MapAttention(Attention):
    """Attention over a feature map, or within windows of it.

    Args:
        spec: of the transformer.
        window: S; 0 for attention over the whole map.
        table_side: side in tokens of the maps that the relative position tables are made for; 0:
            there are no tables.
        rngs: source of the initial values. Tables start at zero.
    """

    def __init__(self, spec: ViTSpec, window: int, table_side: int, *, rngs: nnx.Rngs):
        super().__init__(spec, rngs=rngs)
        self.window = window
        self.has_tables = table_side > 0
        if self.has_tables:
            shape = (2 * table_side - 1, spec.width // spec.heads)
            self.rel_pos_h = nnx.Param(jnp.zeros(shape))
            self.rel_pos_w = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, D) -> (B, H, W, D).

        Windows at the lower and the right edge are filled up with zeros, which take part as tokens.
        """
        if not self.window:
            return self._attend(x)
        h, w = x.shape[1:3]
        side = self.window
        x = jnp.pad(x, ((0, 0), (0, -h % side), (0, -w % side), (0, 0)))
        rows = x.shape[1] // side
        x = rearrange(x, "b (i h) (j w) d -> (b i j) h w d", h=side, w=side)
        x = rearrange(self._attend(x), "(b i j) h w d -> b (i h) (j w) d", i=rows, j=-(-w // side))
        return x[:, :h, :w]

    def _attend(self, x: jax.Array) -> jax.Array:
        h = x.shape[1]
        tokens = rearrange(x, "b h w d -> b (h w) d")
        if not self.has_tables:
            return super().__call__(tokens).reshape(x.shape)
        q, k, v = rearrange(self.qkv(tokens), "b t (i n c) -> i b t n c", i=3, n=self.heads)
        bias = self._relative(rearrange(q, "b (h w) n c -> b h w n c", h=h))
        y = attention.written_out(q, k, v, bias)
        return self.proj(rearrange(y, "b (h w) n c -> b h w (n c)", h=h))

    def _relative(self, q: jax.Array) -> jax.Array:
        """What relative positions add to the logits: (B, H, W, N, C) -> (B, N, H W, H W)."""
        h, w = q.shape[1:3]
        rows = _table(self.rel_pos_h[...], h).astype(q.dtype)
        columns = _table(self.rel_pos_w[...], w).astype(q.dtype)
        by_row = jnp.einsum("bhwnc,hkc->bnhwk", q, rows)
        by_column = jnp.einsum("bhwnc,wlc->bnhwl", q, columns)
        bias = by_row[..., :, None] + by_column[..., None, :]
        return rearrange(bias, "b n h w k l -> b n (h w) (k l)")


def _table(table: jax.Array, length: int) -> jax.Array:
    """The vector of each pair of positions: (2 S - 1, C) -> (length, length, C).

    A table for another length is interpolated linearly.
    """
    rows = 2 * length - 1
    if table.shape[0] != rows:
        weights = linear_weights(table.shape[0], rows)
        table = jnp.asarray(weights, table.dtype) @ table
    position = np.arange(length)
    return table[position[:, None] - position[None, :] + length - 1]


def linear_weights(old: int, new: int) -> np.ndarray:
    """(new, old): the weight of each old entry in each new one; edges are repeated.

    As torch.nn.functional.interpolate(mode="linear"): the centres of entries are aligned.
    """
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(old)[None]), 0).astype(np.float32)
