"""Layers that several of the PyTorch networks have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from m2mkd_jax.models.vit_spec import ViTSpec

Rates = Sequence[float] | None  # of drop-path, one per block; None: no drop-path


def drop_path(residual: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth per image; see docs/reference.md#vit-drop-path."""
    if not rate:
        return residual
    shape = (residual.shape[0],) + (1,) * (residual.dim() - 1)
    kept = residual.new_empty(shape).bernoulli_(1.0 - rate)
    return residual * kept.div_(1.0 - rate)


def heads_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, heads * C) -> (B, heads, N, C)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_last(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, C) -> (B, N, heads * C)."""
    return x.transpose(1, 2).flatten(2)


def run_block(block: Callable, x: torch.Tensor, rate: float, remat: bool) -> torch.Tensor:
    """A block, recomputed in the backward pass if `remat`."""
    if remat and torch.is_grad_enabled():
        return checkpoint(block, x, rate, use_reentrant=False)
    return block(x, rate)


class Attention(nn.Module):
    """Self-attention with a fused qkv; see docs/reference.md#vit-block."""

    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads_first(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.proj(heads_last(F.scaled_dot_product_attention(q, k, v)))


class Mlp(nn.Module):
    """Linear D -> 4D, exact GELU, linear 4D -> D."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Convolution whose stride is the patch."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, N, D)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class TransformerEnds(nn.Module):
    """The embedding of a first stage, norm and head of a last one; subclasses have `blocks`."""

    def __init__(self, vit: ViTSpec, *, first: bool, last: bool):
        super().__init__()
        self.first, self.last, self.remat = first, last, vit.remat == "always"
        if first:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, vit.width))
            self.pos_embed = nn.Parameter(torch.zeros(1, vit.tokens, vit.width))
            self.patch_embed = PatchEmbed(vit.patch, vit.width)
        if last:
            self.norm = nn.LayerNorm(vit.width, vit.eps)
            self.head = nn.Linear(vit.width, vit.classes)

    def forward(self, x: torch.Tensor, rates: Rates = None, train: bool = False) -> torch.Tensor:
        """Images (B, 3, H, W) or tokens (B, N, D) -> tokens or logits (B, K)."""
        if self.first:
            cls = self.cls_token.expand(len(x), -1, -1)
            x = torch.cat([cls, self.patch_embed(x)], 1) + self.pos_embed
        if not (train and rates):
            rates = [0.0] * len(self.blocks)
        for block, rate in zip(self.blocks, rates, strict=True):
            x = run_block(block, x, rate, self.remat)
        return self.head(self.norm(x[:, 0])).float() if self.last else x
