"""The published vision transformer variants.

Source: docs/reference.md#vit-variants.
"""

from __future__ import annotations

from m2mkd_jax.errors import UserError, did_you_mean
from m2mkd_jax.models.vit_spec import ViTSpec

# name: image size, patch, width, depth, heads, qkv bias, LayerNorm eps
_TABLE: dict[str, tuple[int, int, int, int, int, bool, float]] = {
    "deit_tiny_patch16_224": (224, 16, 192, 12, 3, True, 1e-6),
    "deit_small_patch16_224": (224, 16, 384, 12, 6, True, 1e-6),
    "deit_base_patch16_224": (224, 16, 768, 12, 12, True, 1e-6),
    "vit_base_patch16_224": (224, 16, 768, 12, 12, True, 1e-6),
    "vit_base_patch16_384": (384, 16, 768, 12, 12, True, 1e-6),
    "vit_large_patch16_224": (224, 16, 1024, 24, 16, True, 1e-6),
    "vit_large_patch16_384": (384, 16, 1024, 24, 16, True, 1e-6),
    "vit_huge_patch14_224": (224, 14, 1280, 32, 16, False, 1e-5),
    "vit_huge_patch14_392": (392, 14, 1280, 32, 16, False, 1e-5),
}
NAMES = tuple(_TABLE)


def vit_variant(name: str, classes: int, remat: str = "auto") -> tuple[ViTSpec, int]:
    """Spec and published depth of a variant.

    Args:
        name: one of NAMES.
        classes: how many logits the head gives.
        remat: see vit_spec.ViTSpec.

    Raises:
        UserError: no such variant.
    """
    if name not in _TABLE:
        raise UserError(f'no variant "{name}"; {did_you_mean(name, NAMES)}')
    size, patch, width, depth, heads, bias, eps = _TABLE[name]
    return ViTSpec(size, patch, width, heads, classes, bias, eps, remat), depth


def name_of(spec: ViTSpec) -> str:
    """Name of the variant with these fields, classes and remat aside; "" if there is none."""
    for name in NAMES:
        if vit_variant(name, spec.classes, spec.remat)[0] == spec:
            return name
    return ""
