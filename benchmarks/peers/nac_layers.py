"""Layers of a NAC in PyTorch, from docs/reference.md#nac; parameters are named as published."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers.layers import drop_path, heads_first, heads_last
from m2mkd_jax.models.nac.spec import NACSpec


class ModulatedLinear(nn.Module):
    """y = W (x * m) + b, m = g * LN0(S c) + 1; see docs/reference.md#nac-modulated-linear."""

    def __init__(self, c: int, d: int, spec: NACSpec, bias: bool = True):
        super().__init__()
        self.native_weight = nn.Parameter(torch.empty(d, c))
        self.native_bias = nn.Parameter(torch.zeros(d)) if bias else None
        self.scale_gain = nn.Parameter(torch.tensor(spec.gain))
        self.scale = nn.Linear(spec.code_dim, c, bias=False)
        nn.init.kaiming_uniform_(self.native_weight, a=math.sqrt(5))

    def modulation(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (U, S) -> m (U, C), in float32."""
        with torch.autocast(codes.device.type, enabled=False):
            scale = F.linear(codes.float(), self.scale.weight.float())
            return self.scale_gain * F.layer_norm(scale, scale.shape[-1:]) + 1.0

    def forward(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return F.linear(x * self.modulation(codes), self.native_weight, self.native_bias)


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * x


class ModulatedFFN(nn.Module):
    """See docs/reference.md#nac-ffn."""

    def __init__(self, spec: NACSpec):
        super().__init__()
        d, hidden = spec.state_dim, spec.hidden_dim
        self.layernorm = nn.LayerNorm(d)
        first, second = ModulatedLinear(d, 2 * hidden, spec), ModulatedLinear(hidden, d, spec)
        self.ffn = nn.ModuleDict({"0": first, "2": second})
        self.layer_scale = LayerScale(d)

    def forward(self, states: torch.Tensor, codes: torch.Tensor, rate: float = 0.0) -> torch.Tensor:
        x, gate = self.ffn["0"](self.layernorm(states), codes).chunk(2, -1)
        y = self.layer_scale(self.ffn["2"](x * F.gelu(gate), codes))
        return states + drop_path(y, rate)


class AttentionParameters(nn.Module):
    """Norms, four modulated projections and layer scale.

    Args:
        spec: hyperparameters.
        senders: channels of the senders.
        sender_norm: senders have a norm of their own.
        kernel: there is a bandwidth.
    """

    def __init__(self, spec: NACSpec, senders: int, *, sender_norm: bool, kernel: bool):
        super().__init__()
        if not spec.geglu or spec.qkv_bias or spec.modulation != "layer_norm" or not spec.add_one:
            raise ValueError("the peer has the published options of a NAC alone")
        d, inner, self.heads = spec.state_dim, spec.inner_dim, spec.heads
        if kernel:
            self.kernel = nn.ParameterDict({"bandwidth": nn.Parameter(torch.tensor(1.0))})
        self.receiver_layernorm = nn.LayerNorm(d)
        self.sender_layernorm = nn.LayerNorm(senders) if sender_norm else None
        self.query_compiler = ModulatedLinear(d, inner, spec, bias=False)
        self.key_compiler = ModulatedLinear(senders, inner, spec, bias=False)
        self.value_compiler = ModulatedLinear(senders, inner, spec, bias=False)
        self.exit_layer = ModulatedLinear(inner, d, spec)
        self.layer_scale = LayerScale(d)


class LatentAttention(AttentionParameters):
    """See docs/reference.md#nac-propagator."""

    def __init__(self, spec: NACSpec, *, sender_norm: bool, kernel: bool, residual: bool):
        super().__init__(spec, spec.state_dim, sender_norm=sender_norm, kernel=kernel)
        self.residual = residual

    def forward(
        self,
        receivers: torch.Tensor,
        receiver_codes: torch.Tensor,
        senders: torch.Tensor,
        sender_codes: torch.Tensor,
        log_kernel: torch.Tensor | None,
        rate: float,
    ) -> torch.Tensor:
        u = self.receiver_layernorm(receivers)
        v = (self.sender_layernorm or self.receiver_layernorm)(senders)
        q = heads_first(self.query_compiler(u, receiver_codes), self.heads)
        k = heads_first(self.key_compiler(v, sender_codes), self.heads)
        v = heads_first(self.value_compiler(v, sender_codes), self.heads)
        if log_kernel is not None:
            log_kernel = log_kernel.unsqueeze(-3).to(q.dtype)
        message = heads_last(F.scaled_dot_product_attention(q, k, v, attn_mask=log_kernel))
        message = self.layer_scale(self.exit_layer(message, receiver_codes))
        return receivers + drop_path(message, rate) if self.residual else message


class LatentLayer(nn.Module):
    """Latent attention and feed-forward network: a propagator or a read-out."""

    def __init__(self, spec: NACSpec, *, propagator: bool, kernel: bool):
        super().__init__()
        self.latent_attention = LatentAttention(
            spec, sender_norm=not propagator, kernel=kernel, residual=propagator
        )
        self.ffn = ModulatedFFN(spec)

    def forward(
        self,
        receivers: torch.Tensor,
        receiver_codes: torch.Tensor,
        senders: torch.Tensor,
        sender_codes: torch.Tensor,
        log_kernel: torch.Tensor,
        rate: float = 0.0,
    ) -> torch.Tensor:
        states = self.latent_attention(
            receivers, receiver_codes, senders, sender_codes, log_kernel, rate
        )
        return self.ffn(states, receiver_codes, rate)


class ReadInAttention(AttentionParameters):
    """See docs/reference.md#nac-read-in.

    `literal` computes keys and values of every pair of latent and token, as published; otherwise
    scale and weight are folded into the query before the attention and into the message after it,
    as docs/design.md#nac-read-in-rewritten has it.
    """

    def __init__(self, spec: NACSpec, literal: bool):
        super().__init__(spec, spec.token_dim, sender_norm=True, kernel=False)
        self.literal, self.residual = literal, spec.read_in_residual

    def forward(
        self, receivers: torch.Tensor, codes: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        q = self.query_compiler(self.receiver_layernorm(receivers), codes)
        attend = self.attend_literally if self.literal else self.attend
        message = attend(q.unflatten(-1, (self.heads, -1)), codes, self.sender_layernorm(tokens))
        message = self.layer_scale(self.exit_layer(message.flatten(2), codes))
        return receivers + message if self.residual else message

    def attend(self, q: torch.Tensor, codes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Queries (B, U, H, C), tokens (B, V, T) -> (B, U, H, C)."""
        key, value = (
            layer.native_weight.unflatten(0, (self.heads, -1))
            for layer in (self.key_compiler, self.value_compiler)
        )
        scale = q.shape[-1] ** -0.5
        folded = torch.einsum("buhc,hct->buht", q, key)
        folded = folded * self.key_compiler.modulation(codes)[:, None].to(q.dtype)
        # All heads of all latents attend to the same tokens: one head of U * H queries.
        rows, x = folded.flatten(1, 2).to(x.dtype)[:, None], x[:, None]
        mean = F.scaled_dot_product_attention(rows, x, x, scale=scale)[:, 0].view_as(folded)
        mean = mean * self.value_compiler.modulation(codes)[:, None].to(mean.dtype)
        return torch.einsum("buht,hct->buhc", mean, value)

    def attend_literally(
        self, q: torch.Tensor, codes: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """Queries (B, U, H, C), tokens (B, V, T) -> (B, U, H, C)."""
        keys, values = (
            F.linear(x[:, None] * layer.modulation(codes)[:, None], layer.native_weight)
            .unflatten(-1, (self.heads, -1))
            .transpose(2, 3)
            for layer in (self.key_compiler, self.value_compiler)
        )  # (B, U, H, V, C)
        return F.scaled_dot_product_attention(q[:, :, :, None].to(keys.dtype), keys, values)[
            ..., 0, :
        ]


class ReadIn(nn.Module):
    """Read-in attention and feed-forward network."""

    def __init__(self, spec: NACSpec, literal: bool):
        super().__init__()
        self.read_in_attention = ReadInAttention(spec, literal)
        self.ffn = ModulatedFFN(spec)

    def forward(
        self, receivers: torch.Tensor, codes: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        return self.ffn(self.read_in_attention(receivers, codes, tokens), codes)


class OutputPooling(nn.Module):
    """See docs/reference.md#nac-output."""

    def __init__(self, spec: NACSpec):
        super().__init__()
        self.gumbel = spec.pooling == "gumbel"
        self.confidence_scorer = nn.Linear(spec.state_dim, 1)
        self.to_logits = nn.Linear(spec.state_dim, spec.classes)

    def forward(self, states: torch.Tensor, train: bool) -> torch.Tensor:
        confidence = self.confidence_scorer(states)[..., 0].float()
        if train and self.gumbel:
            confidence = confidence - torch.empty_like(confidence).exponential_().log()
        weights = confidence.softmax(-1).to(states.dtype)
        return self.to_logits((weights[:, None] @ states)[:, 0]).float()
