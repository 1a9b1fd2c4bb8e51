"""The NAC of configs/nac_fashion.py on 4,000 images, for experiments/fashion/run.py.

Command:  python -m experiments.fashion.run nac
Hardware: one core of an AMD EPYC with AVX-512, beside other work.
Time:     47 minutes without the arms.
Result:   accuracy on all 10,000 test images, five seeds: m2mKD 0.7944 +- 0.0039, scratch
          0.7614 +- 0.0143, kd 0.7655 +- 0.0308
          (docs/experiments.md).

Evaluations during training look at 1,200 other images of the 60,000; with a tenth of all they
took more time than the steps. With fewer images an epoch is shorter: every phase has more of
them.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config.files import find_config, read_config


def get_config() -> ConfigDict:
    config = read_config(find_config("nac_fashion"))
    config.name = "experiments/fashion/nac"
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "e2e_kd", "eval")
    config.e2e_seeds = 5
    # As published; the arm "alpha_falls" goes from 1 to 0.
    config.distillation.alpha, config.distillation.alpha_end = 0.5, -1.0
    config.data.train_images, config.data.validation = 4000, 0.02
    config.evaluation.every = 0.75  # 1/16 of the end-to-end epochs
    train = config.recipes
    train.pt.epochs, train.pt.warmup_epochs = 36, 2
    train.mt.epochs, train.mt.warmup_epochs = 6, 1
    train.mt.modules = {"0": {"epochs": 18}}
    train.ft.epochs = 10
    train.m2mkd.epochs, train.m2mkd.warmup_epochs = 6, 1
    train.m2mkd.modules = {"0": {"epochs": 18, "lr": 3e-3}}
    train.e2e.epochs, train.e2e.warmup_epochs = 12, 1
    return config
