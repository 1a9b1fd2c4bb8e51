"""Detection of digits on textured canvases, with the taught V-MoE as backbone, beside scratch.

Command:  python -m m2mkd_jax.main --config=configs/detect_digits.py --workdir=runs/detect_digits
Hardware: one core of an AMD EPYC with AVX-512, beside other work.
Time:     4 minutes for pt to e2e, 11 to 15 minutes for a detector.
Result:   200 test scenes, three seeds: box AP50 0.864 +- 0.006, mask AP50 0.840 +- 0.002 with
          the taught V-MoE; 0.861 +- 0.004 and 0.838 +- 0.008 from scratch.

A V-MoE like that of vmoe_digits, with patches of 16 pixels on digits of 48, is taught by a small
ViT; its blocks become the backbone of a Mask R-CNN on generated scenes of 128 pixels.
detection.seeds=3 repeats both detectors with other seeds.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base


def get_config() -> ConfigDict:
    config = base()
    config.name = "detect_digits"
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "detect", "detect_scratch", "eval")

    data = config.data
    data.name, data.image_size, data.classes = "digits", 48, 10
    data.validation = 0.1
    data.mean, data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    data.augment.crop, data.augment.shift = "shift", 3

    presets.small_vmoe(config)
    config.teacher.patch = config.vmoe.patch = 16
    config.teacher.width, config.vmoe.width = 128, 96
    train = config.recipes
    train.pt.epochs, train.pt.lr, train.pt.warmup_epochs = 24, 2e-3, 2
    train.mt.epochs, train.mt.lr, train.mt.warmup_epochs = 6, 2e-3, 1
    train.mt.modules = {"0": {"epochs": 24}}
    train.ft.epochs, train.ft.lr, train.ft.clip = 6, 1e-3, 1.0
    train.m2mkd.epochs, train.m2mkd.lr, train.m2mkd.warmup_epochs = 6, 2e-3, 1
    train.m2mkd.modules = {"0": {"epochs": 18, "lr": 3e-3}}
    train.e2e.epochs, train.e2e.lr, train.e2e.warmup_epochs = 10, 2e-3, 1
    train.e2e.clip, train.e2e.drop_path = 1.0, 0.0

    scenes = config.detection.data
    scenes.name, scenes.classes, scenes.image_size = "digits_scene", 10, 128
    scenes.train_images, scenes.test_images, scenes.objects = 12_000, 200, 6
    scenes.seed = 1
    scenes.mean, scenes.std = data.mean, data.std
    scenes.augment.resize, scenes.augment.flip = "none", False
    presets.small_detector(config)
    recipe = config.detection.recipe
    # Scenes are made as fast as they are read: each is seen once.
    recipe.epochs, recipe.warmup_epochs, recipe.milestones = 1, 0.05, (0.6, 0.85)
    config.log_every = 50
    return config
