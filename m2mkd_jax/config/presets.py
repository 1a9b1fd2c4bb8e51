"""Published recipes, networks and graph priors, and small networks; config files call these.

Every function changes the config that it is given.
Source: arXiv 2402.16918; docs/reference.md#recipes, docs/reference.md#nac-configs.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.errors import UserError

# Argument of the NAC configs: graph, its options with 256 mediators, its options with 768.
NAC_PRIORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scale": ("barabasi-albert", {"m": 2}, {"m": 6}),
    "erdos": ("erdos-renyi", {"p": 0.1}, {"p": 0.1}),
    "planted": (
        "planted-partition",
        {"l": 8, "k": 32, "p_in": 0.9, "p_out": 0.2},
        {"l": 12, "k": 64, "p_in": 0.9, "p_out": 0.2},
    ),
    "ring": (
        "ring-of-cliques",
        {"num_cliques": 8, "clique_size": 32},
        {"num_cliques": 12, "clique_size": 64},
    ),
}


def published_teaching(config: ConfigDict) -> None:
    """Recipes of pt, mt, ft and m2mkd: AdamW, cosine, mixup and cutmix, batch 2048 (ft 1024).

    Source: arXiv 2402.16918; docs/reference.md#recipe-table.
    """
    recipes = config.recipes
    for name, epochs, warmup in (
        ("pt", 300, 20),
        ("mt", 100, 20),
        ("ft", 100, 0),
        ("m2mkd", 100, 20),
    ):
        recipe = recipes[name]
        recipe.epochs, recipe.warmup_epochs = epochs, warmup
        recipe.batch, recipe.lr, recipe.min_lr = 2048, 5e-4, 1e-5
        recipe.weight_decay, recipe.drop_path = 0.05, 0.1
    recipes.pt.drop_path = 0.0
    recipes.ft.batch, recipes.ft.clip = 1024, 1.0
    recipes.mt.accumulate = recipes.m2mkd.accumulate = 2


def published_nac_end_to_end(config: ConfigDict, epochs: int, batch: int, decay: float) -> None:
    """Recipe of a NAC end to end: every parameter is decayed, min_lr is scaled with the batch.

    Args:
        config: to change.
        epochs: of training.
        batch: images per optimizer update.
        decay: weight decay.

    Source: arXiv 2402.16918; docs/reference.md#recipe-table.
    """
    recipe = config.recipes.e2e
    recipe.epochs, recipe.warmup_epochs, recipe.batch = epochs, 25, batch
    recipe.lr, recipe.min_lr, recipe.scale_min_lr = 1.2e-3, 4e-5, True
    recipe.weight_decay, recipe.decay_rule, recipe.drop_path = decay, "all", 0.1


def nac_prior(config: ConfigDict, prior: str) -> None:
    """The mediators' graph, and the regulariser published with it.

    Args:
        config: to change; its number of mediators is set.
        prior: of NAC_PRIORS.

    Raises:
        UserError: there is no such prior.

    Source: arXiv 2402.16918; docs/reference.md#nac-configs, docs/reference.md#nac-regularisers.
    """
    if prior not in NAC_PRIORS:
        raise UserError(f'config argument: no prior "{prior}"; one of {", ".join(NAC_PRIORS)}')
    graph, small, large = NAC_PRIORS[prior]
    nac = config.nac
    nac.prior = graph
    nac.options = small if nac.mediator_latents == 256 else large
    if prior == "planted":
        config.regulariser.kind, config.regulariser.weight = "stochastic_block", 1.0
    else:
        config.regulariser.kind, config.regulariser.weight = "hinge", 0.1


def published_augmentation(data: ConfigDict) -> None:
    """Random resized crops, flips, RandAugment, random erasing, repeated augmentation.

    Args:
        data: a section of data keys.

    Source: docs/reference.md#augmentation.
    """
    augment = data.augment
    augment.crop, augment.flip = "random_resized", True
    augment.rand_augment, augment.erase = "rand-m9-mstd0.5-inc1", 0.25
    augment.color_jitter = 0.4  # has an effect without rand_augment only
    data.repeated_augmentation = 3


def imagenet(data: ConfigDict) -> None:
    """ImageNet-1k at 224 px with the published augmentation, for a section of data keys."""
    data.name, data.image_size, data.classes = "imagenet", 224, 1000
    published_augmentation(data)


def published_few_shot(config: ConfigDict) -> None:
    """Heads for 8 classes of CIFAR-100, one image of each: a NAC's by SGD, a V-MoE's by AdamW.

    Source: docs/reference.md#few-shot, docs/reference.md#recipe-table.
    """
    data = config.few_shot.data
    data.name, data.classes = "cifar100", 100
    published_augmentation(data)
    data.repeated_augmentation = 1
    recipe = config.recipes.fewshot
    recipe.batch, recipe.lr_per = 8, 0
    if config.family == "nac":
        recipe.epochs, recipe.optimizer, recipe.decay_rule = 500, "sgd", "none"
        recipe.lr = recipe.min_lr = 3e-4  # constant
        recipe.weight_decay = 0.0
    else:
        recipe.epochs, recipe.warmup_epochs, recipe.lr = 100, 20, 2e-3


def vit_huge_teacher(config: ConfigDict) -> None:
    """ViT-H/14 in ten modules, with a meta model of ten blocks."""
    config.teacher.variant = "vit_huge_patch14_224"
    config.teacher.depths = (4, 3, 3, 3, 3, 3, 3, 3, 3, 4)


def small_nac(config: ConfigDict) -> None:
    """A NAC of width 64 with four propagators, taught by a small ViT in six modules of two blocks.

    The sizes at which the published modules work on Fashion-MNIST at 32 px. The number of latents
    of each group, and epochs and rates of each phase, are left to the config.
    """
    teacher, nac = config.teacher, config.nac
    teacher.patch, teacher.width, teacher.heads = 8, 64, 4
    teacher.depths = (2,) * 6
    nac.state_dim = nac.code_dim = 64
    nac.heads, nac.head_dim = 2, 32
    nac.iterations, nac.position_dim = 4, 16
    nac.prior, nac.options = "barabasi-albert", {"m": 2}
    config.regulariser.kind = "hinge"
    for recipe in config.recipes.values():
        recipe.batch, recipe.lr_per = 50, 0
        recipe.mixup = recipe.cutmix = 0.0
        recipe.min_lr, recipe.warmup_lr = 1e-5, 1e-5


def vit_large_teacher(config: ConfigDict) -> None:
    """ViT-L/16 in four modules, with a meta model of four blocks."""
    config.teacher.variant = "vit_large_patch16_224"
    config.teacher.depths = (6, 6, 6, 6)


def published_vmoe_end_to_end(config: ConfigDict) -> None:
    """Recipe of a V-MoE end to end: no warmup, clipping, batch 1024, drop-path over all blocks.

    Source: arXiv 2402.16918; docs/reference.md#recipe-table.
    """
    recipe = config.recipes.e2e
    recipe.epochs, recipe.warmup_epochs, recipe.batch = 100, 0, 1024
    recipe.lr, recipe.min_lr, recipe.weight_decay = 5e-4, 1e-5, 0.05
    recipe.drop_path, recipe.clip = 0.1, 1.0


def small_vmoe(config: ConfigDict) -> None:
    """A V-MoE of width 48 and four blocks, taught by a ViT of width 64 in four modules of two.

    The students are narrower than the teacher, as in the paper, so that they need stitches. Epochs
    and rates of each phase are left to the config.
    """
    config.family = "vmoe"
    teacher, vmoe = config.teacher, config.vmoe
    teacher.patch, teacher.width, teacher.heads = 8, 64, 4
    teacher.depths = (2,) * 4
    vmoe.patch, vmoe.width, vmoe.heads = 8, 48, 4
    vmoe.depths, vmoe.experts = (1,) * 4, 4
    for recipe in config.recipes.values():
        recipe.batch, recipe.lr_per = 48, 0  # a multiple of 1, 2, 4 and 8 devices
        recipe.mixup = recipe.cutmix = 0.0
        recipe.min_lr, recipe.warmup_lr = 1e-5, 1e-5


def small_detector(config: ConfigDict) -> None:
    """A Mask R-CNN for scenes of 128 px on a small V-MoE; the epochs are left to the config."""
    model, recipe = config.detection.model, config.detection.recipe
    model.channels, model.fc_width = 32, 128
    model.anchor_sizes = (24, 40, 56, 96, 128)
    model.rpn_budget, model.roi_budget = 64, 32
    model.pre_nms, model.post_nms, model.detections = (200, 200), (100, 100), 20
    config.detection.evaluation_batch = 20
    recipe.batch, recipe.lr, recipe.lr_per, recipe.clip = 8, 2e-3, 0, 1.0
    recipe.layer_decay, recipe.weight_decay = 0.9, 0.05


def large_scale_jitter(config: ConfigDict) -> None:
    """COCO 2017 at 1024 px with large-scale jitter; windows, relative positions; batch 64.

    Source: Li et al. 2022 (arXiv 2203.16527), appendix; docs/detection.md#optimizer.
    """
    detection = config.detection
    data, model, recipe = detection.data, detection.model, detection.recipe
    data.name, data.classes, data.image_size = "coco", 80, 1024
    model.window, model.relative_positions = 14, True
    model.global_blocks = (2, 5, 8, 11)
    # 117,266 training images have objects: 1832 batches of 64.
    updates = 117_266 // 64
    recipe.batch, recipe.lr, recipe.lr_per = 64, 1e-4, 64
    recipe.epochs, recipe.warmup_epochs = 184_375 / updates, 250 / updates
    recipe.milestones = (163_889 / updates, 177_546 / updates)
    recipe.layer_decay, recipe.weight_decay, recipe.drop_path = 0.7, 0.1, 0.1
    config.evaluation.every = 5000 / updates
