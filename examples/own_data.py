"""Config of examples/own_data.sh: a V-MoE on images of one's own, taught by a ViT-S from elsewhere.

The data are class folders (`train/CLASS/*`, `val/CLASS/*`) at `data.root`; the teacher is a
checkpoint of timm's `deit_small_patch16_224`, or another vision transformer, whose head has these
classes, at `init.teacher`. Its sizes are those of `teacher` below.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import base


def get_config() -> ConfigDict:
    config = base()
    config.name = "own_data"
    config.family = "vmoe"
    # The teacher is there: only the meta model is trained before the students.
    config.phases = ("pt", "m2mkd", "e2e", "eval")
    data = config.data
    data.name, data.image_size = "image_folder", 224
    teacher, vmoe = config.teacher, config.vmoe
    teacher.patch, teacher.width, teacher.heads, teacher.depths = 16, 384, 6, (3, 3, 3, 3)
    vmoe.patch, vmoe.width, vmoe.heads, vmoe.depths = 16, 192, 3, (3, 3, 3, 3)
    vmoe.moe_pos, vmoe.experts = (2, 5, 8, 11), 8
    for recipe in config.recipes.values():
        recipe.epochs, recipe.batch = 50, 64
    return config
