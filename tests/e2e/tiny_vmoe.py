"""The smallest V-MoE config with every phase: three modules, a few steps each."""

from m2mkd_jax.config.defaults import base


def get_config():
    config = base()
    config.name = "tiny_vmoe"
    config.family = "vmoe"
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "eval")
    data = config.data
    data.name, data.image_size, data.classes = "digits", 16, 10
    data.train_images, data.test_images = 160, 100
    data.augment.crop, data.augment.shift = "shift", 1
    teacher, vmoe = config.teacher, config.vmoe
    for network in (teacher, vmoe):
        network.patch, network.width, network.heads = 8, 16, 2
    teacher.depths, vmoe.depths = (1, 2, 1), (1, 1, 2)
    # One dense block; three tokens of four find a place.
    vmoe.moe_pos, vmoe.experts, vmoe.router = (0, 2, 3), 4, "vmoe"
    vmoe.dispatch, vmoe.capacity_factor = "capacity", 0.75
    vmoe.keep_stitches = True
    for recipe in config.recipes.values():
        recipe.epochs, recipe.batch, recipe.lr_per, recipe.lr = 2, 16, 0, 1e-3
        recipe.mixup = recipe.cutmix = 0.0  # drawing from Beta takes long to compile
        recipe.importance_weight = recipe.load_weight = 0.01
    config.recipes.m2mkd.epochs = 6
    config.recipes.m2mkd.modules = {"1": {"epochs": 4, "clip": 1.0}}
    config.recipes.m2mkd.drop_path = config.recipes.e2e.drop_path = 0.1
    config.evaluation.batch = 64
    config.log_every = 5
    return config
