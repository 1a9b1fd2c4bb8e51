"""m2mKD for a small NAC on 10,000 images of Fashion-MNIST, three end-to-end seeds, and scratch.

    python -m m2mkd_jax.main --config=configs/nac_fashion.py --workdir=runs/nac_fashion

The sizes and rates are those at which the published modules were seen to work at this scale: a
weak meta model spoils all that follows, and module 0, the teacher's and the student's, needs two
to three times the epochs of the others. Evaluated on all 10,000 test images.
"""

from m2mkd_jax.config import base


def get_config():
    config = base()
    config.name = "nac_fashion"
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "eval")
    config.e2e_seeds = 3

    data = config.data
    data.name, data.image_size, data.classes = "fashion_mnist", 32, 10
    data.train_images = 10_000
    data.mean, data.std = (0.286, 0.286, 0.286), (0.353, 0.353, 0.353)
    data.augment.crop, data.augment.shift = "shift", 2

    teacher = config.teacher
    teacher.patch, teacher.width, teacher.heads = 8, 64, 4
    teacher.depths = (2, 2, 2, 2, 2, 2)

    student = config.student
    student.state_dim = student.code_dim = 64
    student.heads, student.head_dim = 2, 32
    student.input_latents, student.mediator_latents, student.output_latents = 16, 32, 16
    student.iterations, student.position_dim = 4, 16
    student.prior = "barabasi-albert"
    student.options = {"m": 2}
    config.regulariser.kind = "hinge"

    for recipe in config.recipes.values():
        recipe.batch, recipe.lr_per = 50, 0
        recipe.mixup = recipe.cutmix = 0.0
        recipe.min_lr, recipe.warmup_lr = 1e-5, 1e-5
    recipes = config.recipes
    recipes.pt.epochs, recipes.pt.lr, recipes.pt.warmup_epochs = 18, 3e-3, 1
    recipes.mt.epochs, recipes.mt.lr, recipes.mt.warmup_epochs = 3, 2e-3, 0.5
    recipes.mt.modules = {"0": {"epochs": 9}}
    recipes.ft.epochs, recipes.ft.lr, recipes.ft.clip = 5, 1e-3, 1.0
    recipes.m2mkd.epochs, recipes.m2mkd.lr, recipes.m2mkd.warmup_epochs = 4, 2e-3, 0.5
    # Fine-tuning moves module 0 away from the meta model, so that its hybrid is a poor mark for the
    # read-in student, which learns from the labels too: it gets its full time.
    recipes.m2mkd.stop_within = 0.002
    recipes.m2mkd.modules = {"0": {"epochs": 12, "lr": 3e-3, "stop_within": 0.0}}
    recipes.e2e.epochs, recipes.e2e.lr, recipes.e2e.warmup_epochs = 3, 5e-3, 0.5
    recipes.e2e.decay_rule, recipes.e2e.drop_path = "all", 0.1
    config.evaluation.every = 1
    config.evaluation.batch = 1000
    config.log_every = 100
    return config
