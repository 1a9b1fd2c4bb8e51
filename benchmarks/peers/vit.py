"""Stages of a vision transformer in PyTorch; see docs/reference.md#vit."""

from __future__ import annotations

import functools

import torch
from torch import nn

from benchmarks.peers.layers import Attention, Mlp, TransformerEnds, drop_path
from m2mkd_jax.models.vit_spec import ViTSpec


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), each under drop-path."""

    def __init__(self, spec: ViTSpec):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, spec.eps)
        self.attn = Attention(spec.width, spec.heads, spec.qkv_bias)
        self.norm2 = nn.LayerNorm(spec.width, spec.eps)
        self.mlp = Mlp(spec.width)

    def forward(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), rate)
        return x + drop_path(self.mlp(self.norm2(x)), rate)


class ViTStage(TransformerEnds):
    """Consecutive blocks of a vision transformer."""

    def __init__(self, spec: ViTSpec, depth: int, *, first: bool, last: bool, timm: bool = False):
        super().__init__(spec, first=first, last=last)
        make = timm_block if timm else Block
        self.blocks = nn.ModuleList(make(spec) for _ in range(depth))


def timm_block(spec: ViTSpec) -> nn.Module:
    """timm's block, whose parameters have the same names as those of `Block`.

    timm needs torchvision, which the package index has for one build of torch alone, that with
    CUDA. So the tests do without timm, and `Block` is what is timed unless timm is asked for.
    """
    from timm.models.vision_transformer import Block as TimmBlock  # noqa: PLC0415 (an extra)

    class WithRate(TimmBlock):
        def forward(self, x: torch.Tensor, rate: float) -> torch.Tensor:
            x = x + drop_path(self.attn(self.norm1(x)), rate)
            return x + drop_path(self.mlp(self.norm2(x)), rate)

    norm = functools.partial(nn.LayerNorm, eps=spec.eps)
    return WithRate(spec.width, spec.heads, qkv_bias=spec.qkv_bias, norm_layer=norm)
