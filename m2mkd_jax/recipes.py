"""The published recipes and graph priors (reference sections 3 and 6), for config files."""

from __future__ import annotations

from ml_collections import ConfigDict

from m2mkd_jax.errors import UserError

# name of the prior argument: graph, options at 256 mediators, options at 768 mediators
NAC_PRIORS = {
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
    """PT, MT, FT and m2mKD as published: AdamW, cosine, mixup and cutmix, batch 2048 (FT 1024)."""
    recipes = config.recipes
    for name, epochs, warmup in (("pt", 300, 20), ("mt", 100, 20), ("ft", 100, 0),
                                 ("m2mkd", 100, 20)):  # fmt: skip
        recipe = recipes[name]
        recipe.epochs, recipe.warmup_epochs = epochs, warmup
        recipe.batch, recipe.lr, recipe.min_lr = 2048, 5e-4, 1e-5
        recipe.weight_decay, recipe.drop_path = 0.05, 0.1
    recipes.pt.drop_path = 0.0
    recipes.ft.batch, recipes.ft.clip = 1024, 1.0
    recipes.mt.accumulate = recipes.m2mkd.accumulate = 2


def published_nac_end_to_end(config: ConfigDict, epochs: int, batch: int, decay: float) -> None:
    """NAC end to end as published: every parameter decayed, min lr scaled with the batch."""
    recipe = config.recipes.e2e
    recipe.epochs, recipe.warmup_epochs, recipe.batch = epochs, 25, batch
    recipe.lr, recipe.min_lr, recipe.scale_min_lr = 1.2e-3, 4e-5, True
    recipe.weight_decay, recipe.decay_rule, recipe.drop_path = decay, "all", 0.1


def nac_prior(config: ConfigDict, prior: str) -> None:
    """The mediators' graph and the regulariser that goes with it.

    Raises:
        UserError: an unknown prior.
    """
    if prior not in NAC_PRIORS:
        raise UserError(f'config argument: no prior "{prior}"; one of {", ".join(NAC_PRIORS)}')
    graph, small, large = NAC_PRIORS[prior]
    student = config.student
    student.prior = graph
    student.options = small if student.mediator_latents == 256 else large
    if prior == "planted":
        config.regulariser.kind, config.regulariser.weight = "stochastic_block", 1.0
    else:
        config.regulariser.kind, config.regulariser.weight = "hinge", 0.1


def imagenet(data: ConfigDict) -> None:
    """ImageNet-1k at 224 px: random resized crops, flips, repeated augmentation."""
    data.name, data.image_size, data.classes = "imagenet", 224, 1000
    data.augment.crop, data.augment.flip = "random_resized", True
    data.repeated_augmentation = 3


def vit_huge_teacher(config: ConfigDict) -> None:
    """ViT-H/14 in ten modules, with a meta model of ten blocks."""
    config.teacher.variant = "vit_huge_patch14_224"
    config.teacher.depths = (4, 3, 3, 3, 3, 3, 3, 3, 3, 4)
    config.teacher.remat = True


def small_nac(config: ConfigDict) -> None:
    """A NAC of width 64 with four propagators, taught by a small ViT in six modules of two blocks.

    The networks and rates at which the published modules were seen to work on Fashion-MNIST at
    32 px. The latents of each group, epochs and rates per phase are left to the config.
    """
    teacher, student = config.teacher, config.student
    teacher.patch, teacher.width, teacher.heads = 8, 64, 4
    teacher.depths = (2,) * 6
    student.state_dim = student.code_dim = 64
    student.heads, student.head_dim = 2, 32
    student.iterations, student.position_dim = 4, 16
    student.prior, student.options = "barabasi-albert", {"m": 2}
    config.regulariser.kind = "hinge"
    for recipe in config.recipes.values():
        recipe.batch, recipe.lr_per = 50, 0
        recipe.mixup = recipe.cutmix = 0.0
        recipe.min_lr, recipe.warmup_lr = 1e-5, 1e-5
