"""Hyperparameters of a Neural Attentive Circuit.

Source: Weiss et al. 2022 (arXiv 2210.08031);
docs/reference.md#nac-configs, docs/reference.md#nac-options.
"""

from __future__ import annotations

from dataclasses import dataclass

from m2mkd_jax.errors import UserError

STEM_STRIDE = 4  # the tokenizer's first convolution
STAGE_STRIDE = 2  # each further stage of the tokenizer halves the grid


@dataclass(frozen=True)
class NACSpec:
    """Hyperparameters of a NAC; in brackets the names of the published code's options.

    Source: docs/reference.md#nac-options.
    """

    image_size: int
    classes: int
    state_dim: int
    code_dim: int
    heads: int
    input_latents: int
    mediator_latents: int
    output_latents: int
    head_dim: int = 64
    signature_dim: int = 64
    iterations: int = 8
    ffn_capacity: float = 2.0
    geglu: bool = True
    layer_scale: float = 0.1
    qkv_bias: bool = False
    # Modulated layers
    modulation: str = "layer_norm"  # [scale_normalization_type]
    gain: float = 0.1  # [scale_gain], learnable
    add_one: bool = True  # [add_one_to_scale]
    code_noise: float = 0.05  # [code_noise_scale]
    # Kernel of the propagators
    truncation: float | None = 0.9
    truncation_implementation: str = "direct"
    stochastic_kernel: bool = True
    kernel_temperature: float = 0.5  # [stochastic_sampling_temperature]
    # Graph
    seeder: bool = True  # [use_latent_seeder]; False: initial states are parameters
    read_in_residual: bool = True
    share_propagators: bool = False  # [share_propagator_weights]
    share_ffn: bool = False  # [share_ffn_between_propagators]
    codes_per_iteration: bool = False  # [not share_codes_between_iterations]
    input_output: bool = True  # [enable_input_output_communication]
    persistent_inputs: bool = True  # [enable_persistent_input_mediator_communication]
    # Tokenizer and output
    tokenizer_depths: tuple[int, ...] = (3, 3)
    position_dim: int = 64
    output: str = "pooling"  # or "first_slot" [FirstSlotAsLogits]
    pooling: str = "gumbel"  # or "vanilla" [softmax_type]
    remat: str = "auto"
    fused: str = "auto"  # propagators in training by models/nac/fused; 'always', 'never'
    channels: int = 3  # of the images

    def __post_init__(self) -> None:
        if not 1 <= len(self.tokenizer_depths) <= 3 or self.state_dim < 4:
            raise UserError(
                f"nac: a tokenizer of {len(self.tokenizer_depths)} stages (tokenizer_depths) for "
                f"states of {self.state_dim}; 1 to 3 stages, of state_dim / 4, / 2 and / 1 channels"
            )
        if self.image_size % self.stride:
            raise UserError(
                f"nac: image size {self.image_size} is not a multiple of the tokenizer's stride "
                f"{self.stride}"
            )
        if self.output == "first_slot" and self.classes != self.state_dim:
            raise UserError(
                f"nac: output 'first_slot' reads {self.classes} logits off a state of "
                f"{self.state_dim}; make state_dim equal to the classes or use 'pooling'"
            )
        if self.hidden_dim < 1:
            raise UserError(
                f"nac: ffn_capacity {self.ffn_capacity:g} of {self.state_dim} channels leaves none"
            )
        choices = {
            "modulation": ("layer_norm", "l2", "none", "sigmoid", "tanh"),
            "truncation_implementation": ("direct", "masked"),
            "output": ("pooling", "first_slot"),
            "pooling": ("gumbel", "vanilla"),
            "fused": ("auto", "always", "never"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise UserError(f'nac: {field} "{getattr(self, field)}" is not one of {allowed}')

    @property
    def stride(self) -> int:
        """Pixels per token along each side."""
        return STEM_STRIDE * STAGE_STRIDE ** (len(self.tokenizer_depths) - 1)

    @property
    def grid(self) -> int:
        """Side of the tokenizer's feature map: one token per cell."""
        return self.image_size // self.stride

    @property
    def tokenizer_widths(self) -> tuple[int, ...]:
        """Channels of every stage of the tokenizer."""
        return tuple(self.state_dim // 2 ** (2 - i) for i in range(len(self.tokenizer_depths)))

    @property
    def token_dim(self) -> int:
        """Channels of a token: features and position."""
        return self.tokenizer_widths[-1] + self.position_dim

    @property
    def inner_dim(self) -> int:
        """Channels of all attention heads together."""
        return self.heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Channels between the two layers of a feed-forward network."""
        return round(self.ffn_capacity * self.state_dim)
