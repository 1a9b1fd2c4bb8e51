"""m2mKD for a small V-MoE on 10,000 images of Fashion-MNIST, with scratch, logit KD and upcycling.

Command:  python -m m2mkd_jax.main --config=configs/vmoe_fashion.py --workdir=runs/vmoe_fashion
Hardware: not run in full.
Time:     not run in full.
Result:   not run in full; the job eval measures on all 10,000 test images.

The V-MoE has the teacher's width and depth, which sparse upcycling needs.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base


def get_config() -> ConfigDict:
    config = base()
    config.name = "vmoe_fashion"
    config.phases = (
        "pt",
        "mt",
        "ft",
        "m2mkd",
        "e2e",
        "e2e_scratch",
        "e2e_kd",
        "e2e_upcycled",
        "eval",
    )

    data = config.data
    data.name, data.image_size, data.classes = "fashion_mnist", 32, 10
    data.train_images = 10_000
    data.mean, data.std = (0.286, 0.286, 0.286), (0.353, 0.353, 0.353)
    data.augment.crop, data.augment.shift = "shift", 2

    presets.small_vmoe(config)
    config.vmoe.width, config.vmoe.depths = 64, (2,) * 4
    config.distillation.token_weight = 1.0  # better than 0: docs/experiments.md#meaning

    train = config.recipes
    train.pt.epochs, train.pt.lr, train.pt.warmup_epochs = 18, 3e-3, 1
    train.mt.epochs, train.mt.lr, train.mt.warmup_epochs = 3, 2e-3, 0.5
    train.mt.modules = {"0": {"epochs": 9}}
    train.ft.epochs, train.ft.lr, train.ft.clip = 5, 1e-3, 1.0
    train.m2mkd.epochs, train.m2mkd.lr, train.m2mkd.warmup_epochs = 4, 2e-3, 0.5
    train.m2mkd.modules = {"0": {"epochs": 12, "lr": 3e-3}}
    train.e2e.epochs, train.e2e.lr, train.e2e.warmup_epochs = 4, 2e-3, 0.5
    train.e2e.clip, train.e2e.drop_path = 1.0, 0.0
    config.evaluation.every = 1
    config.evaluation.batch = 1000
    config.log_every = 100
    return config
