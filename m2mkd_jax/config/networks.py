"""The specs of a config's networks; what cannot be built is refused with the key's name."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import teaching_data
from m2mkd_jax.errors import located, require
from m2mkd_jax.models.moe.spec import VMoESpec, student_spec
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.variants import vit_variant
from m2mkd_jax.models.vit_spec import ViTSpec

LATENTS = ("input_latents", "mediator_latents", "output_latents")


def _transformer(fields: ConfigDict, data: ConfigDict, key: str) -> tuple[ViTSpec, int | None]:
    """The spec of a vision transformer, and its depth where it is a published variant.

    Args:
        fields: config.teacher or config.vmoe.
        data: the images and classes that it is for.
        key: of `fields`, for messages.

    Raises:
        UserError: neither a variant nor sizes are given, or they do not fit the data.
    """
    if fields.variant:
        with located(f"config.{key}.variant"):
            spec, depth = vit_variant(fields.variant, data.classes, fields.remat)
            spec = dataclasses.replace(spec, channels=data.channels)
        require(
            spec.image_size == data.image_size,
            f"config.{key}.variant {fields.variant} takes {spec.image_size} px, its data have "
            f"{data.image_size}",
        )
        return spec, depth
    require(
        min(fields.patch, fields.width, fields.heads) > 0,
        f"config.{key} needs a variant, or patch, width and heads",
    )
    sizes = (fields.patch, fields.width, fields.heads, data.classes)
    with located(f"config.{key}"):
        own = (fields.qkv_bias, fields.eps, fields.remat, data.channels)
        spec = ViTSpec(data.image_size, *sizes, *own)
    return spec, None


def teacher_spec(config: ConfigDict) -> tuple[ViTSpec, int | None]:
    """The teacher's spec, and its depth where it is a published variant (else None).

    Raises:
        UserError: config.teacher cannot be built.
    """
    return _transformer(config.teacher, teaching_data(config), "teacher")


def nac_spec(config: ConfigDict, data: ConfigDict) -> NACSpec:
    """The spec of the NAC.

    Args:
        config: of the run.
        data: the images and classes that it is for: config.data, or for its students those that
            they are taught on.

    Raises:
        UserError: config.nac cannot be built.
    """
    own = ("stitch_dim", "prior", "options")
    fields = {k: v for k, v in config.nac.items() if k not in own}
    for key in ("state_dim", "code_dim", "heads", "iterations", *LATENTS):
        require(fields[key] > 0, f"config.nac.{key} must be above 0")
    fields["tokenizer_depths"] = tuple(fields["tokenizer_depths"])
    with located("config.nac"):
        size = {"image_size": data.image_size, "channels": data.channels}
        return NACSpec(**size, classes=data.classes, **fields)


def vmoe_spec(
    config: ConfigDict, data: ConfigDict, stitch_dim: int = 0
) -> tuple[VMoESpec, int | None]:
    """The spec of the V-MoE, and its depth where it is a published variant (else None).

    Args:
        config: of the run.
        data: whose images and classes it is for.
        stitch_dim: width of the teacher's tokens, for students that are taught, with stitches at
            their open ends; 0: no stitches.

    Raises:
        UserError: config.vmoe cannot be built.
    """
    fields = config.vmoe
    vit, depth = _transformer(fields, data, "vmoe")
    with located("config.vmoe"):
        spec = VMoESpec(
            vit=vit,
            moe_pos=tuple(fields.moe_pos) or tuple(range(sum(fields.depths))),
            experts=fields.experts,
            top_k=fields.top_k,
            router=fields.router,
            noise=fields.noise,
            dispatch=fields.dispatch,
            capacity_factor=fields.capacity_factor,
            group_images=fields.group_images,
        )
        if stitch_dim:
            spec = student_spec(spec, fields.depths, stitch_dim)
    return spec, depth
