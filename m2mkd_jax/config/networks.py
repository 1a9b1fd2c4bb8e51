"""From a config to the fields of its networks."""

from __future__ import annotations

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import teaching_data
from m2mkd_jax.errors import located, require
from m2mkd_jax.models.moe.spec import VMoESpec, student_spec
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.variants import vit_variant
from m2mkd_jax.models.vit_spec import ViTSpec


def _transformer(fields: ConfigDict, data: ConfigDict, key: str) -> tuple[ViTSpec, int | None]:
    """Fields of a vision transformer, and its published depth if it is a published variant."""
    if fields.variant:
        with located(f"config.{key}.variant"):
            spec, depth = vit_variant(fields.variant, data.classes, fields.remat)
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
        spec = ViTSpec(data.image_size, *sizes, fields.qkv_bias, fields.eps, fields.remat)
    return spec, None


def teacher_spec(config: ConfigDict) -> tuple[ViTSpec, int | None]:
    """The teacher's fields, and its published depth if it is a published variant."""
    return _transformer(config.teacher, teaching_data(config), "teacher")


def nac_spec(config: ConfigDict, data: ConfigDict) -> NACSpec:
    """The NAC's fields for some data: the network's own, or what its students are taught on."""
    own = ("stitch_dim", "prior", "options")
    fields = {k: v for k, v in config.nac.items() if k not in own}
    for key in (
        "state_dim",
        "code_dim",
        "heads",
        "input_latents",
        "mediator_latents",
        "output_latents",
        "iterations",
    ):
        require(fields[key] > 0, f"config.nac.{key} must be above 0")
    fields["tokenizer_depths"] = tuple(fields["tokenizer_depths"])
    with located("config.nac"):
        return NACSpec(image_size=data.image_size, classes=data.classes, **fields)


def vmoe_spec(
    config: ConfigDict, data: ConfigDict, stitch_dim: int = 0
) -> tuple[VMoESpec, int | None]:
    """The V-MoE's fields for some data, and its published depth if it is a published variant.

    Args:
        config: of the run.
        data: whose images and classes it is for.
        stitch_dim: width of the teacher's tokens, for students that are taught, with stitches at
            their open ends; 0: no stitches.
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
