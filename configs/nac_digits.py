"""m2mKD for a small NAC on scikit-learn's digits: every phase in minutes on two CPU cores.

    python -m m2mkd_jax.main --config=configs/nac_digits.py --workdir=runs/nac_digits
"""

from m2mkd_jax.config import base


def get_config():
    config = base()
    config.name = "nac_digits"
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "eval")

    data = config.data
    data.name, data.image_size, data.classes = "digits", 32, 10
    data.mean, data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    data.augment.crop, data.augment.shift = "shift", 2

    teacher = config.teacher
    teacher.patch, teacher.width, teacher.heads = 8, 64, 4
    teacher.depths = (2, 2, 2, 2, 2, 2)

    student = config.student
    student.state_dim = student.code_dim = 64
    student.heads, student.head_dim = 2, 32
    student.input_latents, student.mediator_latents, student.output_latents = 8, 16, 8
    student.iterations, student.position_dim = 4, 16
    student.prior = "barabasi-albert"
    student.options = {"m": 2}
    config.regulariser.kind = "hinge"

    for recipe in config.recipes.values():
        recipe.batch, recipe.lr_per = 50, 0
        recipe.mixup = recipe.cutmix = 0.0
        recipe.min_lr, recipe.warmup_lr = 1e-5, 1e-5
    recipes = config.recipes
    recipes.pt.epochs, recipes.pt.lr, recipes.pt.warmup_epochs = 24, 2e-3, 2
    recipes.mt.epochs, recipes.mt.lr, recipes.mt.warmup_epochs = 5, 2e-3, 1
    recipes.mt.modules = {"0": {"epochs": 12}}
    recipes.ft.epochs, recipes.ft.lr, recipes.ft.clip = 6, 1e-3, 1.0
    recipes.m2mkd.epochs, recipes.m2mkd.lr, recipes.m2mkd.warmup_epochs = 6, 2e-3, 1
    recipes.m2mkd.modules = {"0": {"epochs": 18, "lr": 3e-3}}
    recipes.e2e.epochs, recipes.e2e.lr, recipes.e2e.warmup_epochs = 14, 5e-3, 1
    recipes.e2e.decay_rule, recipes.e2e.drop_path = "all", 0.1
    config.log_every = 28
    return config
