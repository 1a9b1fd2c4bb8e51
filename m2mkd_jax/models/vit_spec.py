"""Fields of a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

from m2mkd_jax.errors import UserError


@dataclass(frozen=True)
class ViTSpec:
    """Fields of a vision transformer; `variants.py` has the published ones."""

    image_size: int
    patch: int
    width: int
    heads: int
    classes: int
    qkv_bias: bool = True
    eps: float = 1e-6
    remat: bool = False

    def __post_init__(self):
        if self.image_size % self.patch:
            raise UserError(
                f"vit: image size {self.image_size} is not a multiple of the patch {self.patch}"
            )
        if self.width % self.heads:
            raise UserError(f"vit: width {self.width} is not a multiple of the {self.heads} heads")

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1
