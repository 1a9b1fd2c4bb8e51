"""The paper's V-MoE on ImageNet, taught by a ViT-L.

Command:  python -m m2mkd_jax.main --config=configs/vmoe_imnet.py[:VARIANT] --workdir=DIR
          VARIANT: base (default; 12 blocks), large (24) or huge (32).
Hardware: not run in full. On one H100 an end-to-end step of 64 images takes 93 ms in bfloat16
          (base).
Time:     not run in full.
Result:   not run in full; published gain of m2mKD over end-to-end training: 3.5 points.

All blocks have 8 experts, top 2. config.vmoe.keep_stitches keeps the students' stitches end to end;
the phase e2e_upcycled starts from the teacher's own MLPs instead (large only, whose blocks are the
teacher's). Needs ImageNet; config.init.teacher and config.init.meta make pt, mt and ft unnecessary.
Source: docs/reference.md#vmoe, docs/reference.md#recipe-table, docs/reference.md#results.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base
from m2mkd_jax.errors import UserError

# patch, width, heads, blocks of each module. The published V-MoE-H has a qkv bias and eps 1e-6,
# which the published ViT-H has not.
VARIANTS = {
    "base": (16, 768, 12, (3, 3, 3, 3)),
    "large": (16, 1024, 16, (6, 6, 6, 6)),
    "huge": (14, 1280, 16, (8, 8, 8, 8)),
}


def get_config(variant: str = "base") -> ConfigDict:
    if (variant or "base") not in VARIANTS:
        raise UserError(f'config argument: no V-MoE "{variant}"; one of {", ".join(VARIANTS)}')
    config = base()
    config.name = f"vmoe_{variant or 'base'}_imnet"
    config.family = "vmoe"
    presets.imagenet(config.data)
    presets.vit_large_teacher(config)
    vmoe = config.vmoe
    vmoe.patch, vmoe.width, vmoe.heads, vmoe.depths = VARIANTS[variant or "base"]
    presets.published_teaching(config)
    presets.published_vmoe_end_to_end(config)
    presets.published_few_shot(config)
    config.evaluation.every = 10.0
    return config
