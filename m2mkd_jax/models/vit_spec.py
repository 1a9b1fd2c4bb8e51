"""Hyperparameters of a vision transformer.

Source: docs/reference.md#vit-variants.
"""

from __future__ import annotations

from dataclasses import dataclass

from m2mkd_jax.errors import UserError


@dataclass(frozen=True)
class ViTSpec:
    """Hyperparameters of a vision transformer; `variants.py` has the published ones.

    Attributes:
        image_size: side of the (square) images.
        patch: side of a patch.
        width: channels of the tokens.
        heads: attention heads.
        classes: how many logits the head gives.
        qkv_bias: whether queries, keys and values have a bias.
        eps: of the LayerNorms.
        remat: recompute activations in the backward pass: 'auto', 'always' or 'never'.
        channels: of the images.
    """

    image_size: int
    patch: int
    width: int
    heads: int
    classes: int
    qkv_bias: bool = True
    eps: float = 1e-6
    remat: str = "auto"
    channels: int = 3

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise UserError(
                f"vit: image size {self.image_size} is not a multiple of the patch {self.patch}"
            )
        if self.width % self.heads:
            raise UserError(f"vit: width {self.width} is not a multiple of the {self.heads} heads")

    @property
    def tokens(self) -> int:
        """Length of the token sequence, the class token included."""
        return (self.image_size // self.patch) ** 2 + 1
