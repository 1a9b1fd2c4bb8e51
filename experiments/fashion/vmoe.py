"""The V-MoE of configs/vmoe_fashion.py on 4,000 images, for experiments/fashion/run.py.

Command:  python -m experiments.fashion.run vmoe
Hardware: one core of an AMD EPYC with AVX-512, beside other work.
Time:     37 minutes without the arms.
Result:   accuracy on all 10,000 test images, five seeds: m2mKD 0.7679 +- 0.0056, scratch
          0.6412 +- 0.0294, kd 0.6315 +- 0.0287, upcycled 0.7931 +- 0.0019
          (docs/experiments.md).

Evaluations during training look at 1,200 other images of the 60,000; with a tenth of all they
took more time than the steps. With fewer images an epoch is shorter: the teacher's phases have
twice the epochs, m2mkd half as many again.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config.files import find_config, read_config


def get_config() -> ConfigDict:
    config = read_config(find_config("vmoe_fashion"))
    config.name = "experiments/fashion/vmoe"
    config.e2e_seeds = 5
    config.distillation.token_weight = 0.0  # as published; the arm "tokens" has 1
    config.data.train_images, config.data.validation = 4000, 0.02
    config.evaluation.every = 0.25  # 1/16 of the end-to-end epochs
    train = config.recipes
    train.pt.epochs, train.pt.warmup_epochs = 36, 2
    train.mt.epochs, train.mt.warmup_epochs = 6, 1
    train.mt.modules = {"0": {"epochs": 18}}
    train.ft.epochs = 10
    train.m2mkd.epochs, train.m2mkd.warmup_epochs = 6, 1
    train.m2mkd.modules = {"0": {"epochs": 18, "lr": 3e-3}}
    return config
