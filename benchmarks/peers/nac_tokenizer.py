"""The tokenizer of a NAC in PyTorch; see docs/reference.md#nac-tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from m2mkd_jax.models.nac.spec import STAGE_STRIDE, STEM_STRIDE, NACSpec

EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution and MLP; channels last between them."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, EPS)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Backbone(nn.Module):
    """Downsampling and blocks, stage by stage."""

    def __init__(self, spec: NACSpec):
        super().__init__()
        widths = (3, *spec.tokenizer_widths)
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(spec.tokenizer_depths):
            c, d, stride = widths[i], widths[i + 1], STEM_STRIDE if i == 0 else STAGE_STRIDE
            conv, norm = nn.Conv2d(c, d, stride, stride), ChannelNorm(c if i else d, EPS)
            self.downsample_layers.append(nn.Sequential(*([norm, conv] if i else [conv, norm])))
            self.stages.append(nn.Sequential(*(ConvNeXtBlock(d) for _ in range(depth))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x


class Tokenizer(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, V, T)."""

    def __init__(self, spec: NACSpec):
        super().__init__()
        self.backbone = Backbone(spec)
        grid = nn.Parameter(torch.zeros(spec.position_dim, spec.grid, spec.grid))
        self.positional_grid = nn.ParameterDict({"grid": grid})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.backbone(images.contiguous(memory_format=torch.channels_last))
        grid = self.positional_grid["grid"].to(x.dtype).expand(len(x), -1, -1, -1)
        x, grid = (part.flatten(2).transpose(1, 2) for part in (x, grid))
        return torch.cat([x, grid], -1)
