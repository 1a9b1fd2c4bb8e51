"""The smallest config with every phase: three modules, a few steps each."""

from m2mkd_jax.config.defaults import base


def get_config():
    config = base()
    config.name = "tiny"
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "e2e_kd", "eval")
    data = config.data
    data.name, data.image_size, data.classes = "digits", 16, 10
    data.train_images, data.test_images = 160, 100
    data.augment.crop, data.augment.shift = "shift", 1
    teacher = config.teacher
    teacher.patch, teacher.width, teacher.heads = 8, 16, 2
    teacher.depths = (1, 2, 1)
    nac = config.nac
    nac.state_dim = nac.code_dim = 16
    nac.heads, nac.head_dim, nac.signature_dim = 2, 8, 8
    nac.input_latents, nac.mediator_latents, nac.output_latents = 4, 8, 4
    nac.iterations, nac.position_dim, nac.tokenizer_depths = 1, 4, (1, 1)
    nac.prior, nac.options = "barabasi-albert", {"m": 2}
    config.regulariser.kind = "hinge"
    for recipe in config.recipes.values():
        recipe.epochs, recipe.batch, recipe.lr_per, recipe.lr = 4, 16, 0, 1e-3
        recipe.mixup = recipe.cutmix = 0.0  # drawing from Beta takes long to compile
    config.recipes.ft.mixup, config.recipes.ft.cutmix = 0.8, 1.0
    config.recipes.m2mkd.accumulate, config.recipes.m2mkd.drop_path = 2, 0.1
    config.recipes.m2mkd.modules = {"1": {"epochs": 3, "clip": 1.0}}
    config.recipes.e2e.ema, config.recipes.e2e.drop_path = 0.9, 0.1
    config.evaluation.batch = 64
    config.evaluation.every = 1
    config.log_every = 5
    return config
