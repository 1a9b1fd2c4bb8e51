"""Stages of a V-MoE in PyTorch; see docs/reference.md#vmoe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers.layers import Attention, Mlp, Rates, TransformerEnds, drop_path
from m2mkd_jax.models.moe.spec import VMoESpec


class Stitch(nn.Module):
    """LayerNorm and linear map between two widths."""

    def __init__(self, c: int, d: int):
        super().__init__()
        self.ln, self.fc = nn.LayerNorm(c, 1e-5), nn.Linear(c, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.ln(x))


class Expert(nn.Module):
    """Linear D -> 4D, exact GELU, linear 4D -> D."""

    def __init__(self, width: int):
        super().__init__()
        self.htoh4, self.h4toh = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h4toh(F.gelu(self.htoh4(x)))


class Gate(nn.Module):
    """The router's linear layer, in float32."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.gate = nn.Linear(width, experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.gate.weight.float(), self.gate.bias.float())


class MoE(nn.Module):
    """Tokens sorted by expert, one product per expert and layer; no token is dropped."""

    def __init__(self, spec: VMoESpec):
        super().__init__()
        if spec.router == "expert_choice" or spec.dispatch != "dropless":
            raise ValueError("the peer has token choice without a limit alone")
        self.spec = spec
        self.gate = Gate(spec.vit.width, spec.experts)
        self.experts = nn.ModuleList(Expert(spec.vit.width) for _ in range(spec.experts))
        self.noisy = False

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts (N, K); see docs/reference.md#vmoe-router."""
        logits, spec = self.gate(tokens), self.spec
        if spec.router == "published":
            values, chosen = logits.topk(spec.top_k)
            return values.softmax(-1), chosen
        if self.noisy:
            logits = logits + spec.noise / spec.experts * torch.randn_like(logits)
        return logits.softmax(-1).topk(spec.top_k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        tokens = x.flatten(0, 1)
        weights, chosen = self.route(tokens)
        k, chosen = self.spec.top_k, chosen.flatten()
        order = chosen.argsort(stable=True)
        sizes = torch.bincount(chosen, minlength=self.spec.experts).tolist()
        rows = tokens.index_select(0, order // k).split(sizes)
        rows = torch.cat([expert(r) for expert, r in zip(self.experts, rows, strict=True)])
        rows = rows.index_select(0, order.argsort()).unflatten(0, (-1, k))
        y = (rows.float() * weights[..., None]).sum(1)
        return y.to(x.dtype).view_as(x)


class Block(nn.Module):
    """Attention, then experts or an MLP, each under drop-path, between stitches."""

    def __init__(self, spec: VMoESpec, number: int):
        super().__init__()
        vit, kind = spec.vit, spec.kind(number)
        self.pre_stitch = Stitch(spec.stitch_dim, vit.width) if kind.pre else None
        self.norm1 = nn.LayerNorm(vit.width, vit.eps)
        self.attn = Attention(vit.width, vit.heads, vit.qkv_bias)
        self.norm2 = nn.LayerNorm(vit.width, vit.eps)
        if kind.moe:
            self.moe = MoE(spec)
        else:
            self.mlp = Mlp(vit.width)
        self.post_stitch = Stitch(vit.width, spec.stitch_dim) if kind.post else None
        self.has_experts = kind.moe

    def forward(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        if self.pre_stitch is not None:
            x = self.pre_stitch(x)
        x = x + drop_path(self.attn(self.norm1(x)), rate)
        feed_forward = self.moe if self.has_experts else self.mlp
        x = x + drop_path(feed_forward(self.norm2(x)), rate)
        return x if self.post_stitch is None else self.post_stitch(x)


class VMoEStage(TransformerEnds):
    """Blocks [start, start + depth) of a V-MoE."""

    def __init__(self, spec: VMoESpec, start: int, depth: int, *, first: bool, last: bool):
        super().__init__(spec.vit, first=first, last=last)
        self.blocks = nn.ModuleList(Block(spec, start + i) for i in range(depth))

    def forward(self, x: torch.Tensor, rates: Rates = None, train: bool = False) -> torch.Tensor:
        for block in self.blocks:
            if block.has_experts:
                block.moe.noisy = train
        return super().forward(x, rates, train)
