"""A NAC and its students in PyTorch; see docs/reference.md#nac, docs/reference.md#nac-students."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers.layers import Rates
from benchmarks.peers.nac_layers import LatentLayer, OutputPooling, ReadIn
from benchmarks.peers.nac_tokenizer import Tokenizer
from m2mkd_jax.models.nac.spec import NACSpec

GROUPS = ("input", "mediator", "output")
EPS = torch.finfo(torch.float32).eps
Shape = Sequence[int]


def distances(receivers: torch.Tensor, senders: torch.Tensor) -> torch.Tensor:
    """1 - cosine, (U, C) and (V, C) -> (U, V), in float32."""
    with torch.autocast(receivers.device.type, enabled=False):
        return 1.0 - F.normalize(receivers, dim=-1) @ F.normalize(senders, dim=-1).T


def jitter(codes: torch.Tensor, scale: float, train: bool) -> torch.Tensor:
    """See docs/reference.md#nac-code-noise."""
    if not train:
        return codes
    return codes + scale * codes.detach().abs() * torch.empty_like(codes).uniform_(-1.0, 1.0)


def sample(log_kernel: torch.Tensor, batch: int, temperature: float) -> torch.Tensor:
    """Log of a relaxed Bernoulli sample per image, (U, V) -> (B, U, V)."""
    p = log_kernel.exp()
    p = (p + (p.clamp(0.0, 1.0) - p).detach()).clamp(EPS, 1.0 - EPS)
    u = torch.rand((batch, *p.shape), device=p.device).clamp_(EPS, 1.0 - EPS)
    return F.logsigmoid((u.logit_() + p.logit()) / temperature)


class Latents(nn.Module):
    """Signatures and codes of a group of latents."""

    def __init__(self, count: int, spec: NACSpec):
        super().__init__()
        self.codes_ = nn.Parameter(torch.randn(count, spec.code_dim))
        self.signatures_ = nn.Parameter(torch.randn(count, spec.signature_dim))


class Seeder(nn.Module):
    """See docs/reference.md#nac-seeder."""

    def __init__(self, spec: NACSpec):
        super().__init__()
        self.layernorm = nn.LayerNorm(spec.code_dim)
        self.code_to_state_mu = nn.Linear(spec.code_dim, spec.state_dim)
        self.code_to_state_logvar = nn.Linear(spec.code_dim, spec.state_dim)

    def forward(self, codes: torch.Tensor, batch: int, train: bool) -> torch.Tensor:
        codes = self.layernorm(codes)
        mean = self.code_to_state_mu(codes)
        states = mean.expand(batch, -1, -1)
        if not train:
            return states
        deviation = (0.5 * self.code_to_state_logvar(codes)).exp()
        return states + torch.randn_like(states) * deviation


class NAC(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K)."""

    def __init__(self, spec: NACSpec, literal: bool = False):
        super().__init__()
        shared = spec.share_propagators or spec.share_ffn or spec.codes_per_iteration
        if shared or not (spec.seeder and spec.input_output and spec.persistent_inputs):
            raise ValueError("the peer has the published options of a NAC alone")
        if (
            spec.output != "pooling"
            or spec.truncation_implementation != "direct"
            or spec.remat == "always"
        ):
            raise ValueError("the peer has the published options of a NAC alone")
        self.spec = spec
        for group in GROUPS:
            latents = Latents(getattr(spec, f"{group}_latents"), spec)
            setattr(self, f"{group}_latents", latents)
        self.latent_seeder = Seeder(spec)
        self.read_in = ReadIn(spec, literal)
        self.propagators = nn.ModuleList(
            LatentLayer(spec, propagator=True, kernel=True) for _ in range(spec.iterations)
        )
        self.read_out = LatentLayer(spec, propagator=False, kernel=True)
        self.input_tokenizer, self.output_tokenizer = Tokenizer(spec), OutputPooling(spec)

    def propagator_kernel(
        self, distance: torch.Tensor, bandwidth: torch.Tensor, batch: int, train: bool
    ) -> torch.Tensor:
        """Log kernel, (U, V), or (B, U, V) if sampled; see docs/reference.md#nac-kernel."""
        spec, log = self.spec, -distance / bandwidth
        if spec.truncation is not None:
            outside = -log > spec.truncation / bandwidth.detach()
            log = log.masked_fill(outside, -torch.inf)
        if train and spec.stochastic_kernel:
            return sample(log, batch, spec.kernel_temperature)
        return log

    def forward(
        self, images: torch.Tensor, rates: Rates = None, train: bool = False
    ) -> torch.Tensor:
        spec, batch = self.spec, len(images)
        noisy = lambda codes: jitter(codes, spec.code_noise, train)
        groups = [getattr(self, f"{group}_latents") for group in GROUPS]
        input_codes, mediator_codes, output_codes = (group.codes_ for group in groups)
        inputs, mediators, outputs = (
            self.latent_seeder(noisy(group.codes_), batch, train) for group in groups
        )
        inputs = self.read_in(inputs, noisy(input_codes), self.input_tokenizer(images))
        signatures = torch.cat([group.signatures_ for group in groups[:2]])
        codes = torch.cat([input_codes, mediator_codes])
        distance = distances(groups[1].signatures_, signatures)
        rates = rates if train and rates else [0.0] * spec.iterations
        for layer, rate in zip(self.propagators, rates, strict=True):
            senders, bandwidth = torch.cat([inputs, mediators], 1), layer.latent_attention.kernel
            log_kernel = self.propagator_kernel(distance, bandwidth["bandwidth"], batch, train)
            mediators = layer(
                mediators, noisy(mediator_codes), senders, noisy(codes), log_kernel, rate
            )
        distance = distances(groups[2].signatures_, signatures)
        log_kernel = -distance / self.read_out.latent_attention.kernel["bandwidth"]
        senders = torch.cat([inputs, mediators], 1)
        states = self.read_out(outputs, noisy(output_codes), senders, noisy(codes), log_kernel)
        return self.output_tokenizer(states, train)

    def hinge(self, hinge: float) -> torch.Tensor:
        """See docs/reference.md#nac-hinge."""
        groups = [getattr(self, f"{group}_latents") for group in GROUPS]
        signatures = torch.cat([group.signatures_ for group in groups])
        distance = distances(signatures, signatures).tril(-1)
        return -distance.masked_fill(distance >= hinge, 0.0).sum()


class Student(nn.Module):
    """Codes and initial states that are drawn once and not trained."""

    def __init__(self, codes: Shape, states: Shape | None):
        super().__init__()
        self.register_buffer("codes", torch.zeros(codes))
        if states:
            self.register_buffer("states", torch.zeros(states))

    def initial_states(self, batch: int) -> torch.Tensor:
        """Image b takes state b modulo their number: (B, U, D)."""
        return self.states[torch.arange(batch, device=self.states.device) % len(self.states)]


class ReadInStudent(Student):
    """See docs/reference.md#nac-student-read-in."""

    def __init__(
        self, spec: NACSpec, stitch_dim: int, codes: Shape, states: Shape, literal: bool = False
    ):
        super().__init__(codes, states)
        self.tokenizer, self.read_in = Tokenizer(spec), ReadIn(spec, literal)
        self.post_stitch = nn.Linear(spec.state_dim, stitch_dim)

    def forward(self, x: torch.Tensor, rates: Rates = None, train: bool = False) -> torch.Tensor:
        del rates, train
        states = self.read_in(self.initial_states(len(x)), self.codes, self.tokenizer(x))
        return self.post_stitch(states)


class MediatorStudent(Student):
    """See docs/reference.md#nac-student-mediator."""

    def __init__(self, spec: NACSpec, stitch_dim: int, codes: Shape, states: None = None):
        super().__init__(codes, states)
        layer = LatentLayer(spec, propagator=True, kernel=False)
        self.latent_attention, self.ffn = layer.latent_attention, layer.ffn
        self.pre_stitch = nn.Linear(stitch_dim, spec.state_dim)
        self.post_stitch = nn.Linear(spec.state_dim, stitch_dim)

    def forward(self, x: torch.Tensor, rates: Rates = None, train: bool = False) -> torch.Tensor:
        rate = rates[0] if train and rates else 0.0
        x, codes = self.pre_stitch(x), self.codes
        states = self.latent_attention(x, codes, x, codes, None, rate)
        return self.post_stitch(self.ffn(states, codes, rate))


class ReadOutStudent(Student):
    """See docs/reference.md#nac-student-read-out."""

    def __init__(self, spec: NACSpec, stitch_dim: int, codes: Shape, states: Shape):
        super().__init__(codes, states)
        layer = LatentLayer(spec, propagator=False, kernel=False)
        self.latent_attention, self.ffn = layer.latent_attention, layer.ffn
        self.pre_stitch, self.tokenizer = nn.Linear(stitch_dim, spec.state_dim), OutputPooling(spec)

    def forward(self, x: torch.Tensor, rates: Rates = None, train: bool = False) -> torch.Tensor:
        del rates
        receivers, senders, codes = self.initial_states(len(x)), self.pre_stitch(x), self.codes
        states = self.latent_attention(receivers, codes, senders, codes[:1], None, 0.0)
        return self.tokenizer(self.ffn(states, codes), train)
