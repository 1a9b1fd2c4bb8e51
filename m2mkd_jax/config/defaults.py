"""Every key of the config, with its default, its meaning and its range; docs/config.md lists them.

A config is an ml_collections ConfigDict made by `base()`; a config file changes its values.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.config.data_section import DATA
from m2mkd_jax.config.detection_section import DETECTION
from m2mkd_jax.config.evaluation_section import EVALUATION
from m2mkd_jax.config.family_sections import SECTIONS, own_section
from m2mkd_jax.config.keys import (
    ABOVE_0,
    COUNTS,
    FROM_0,
    INDICES,
    NAMES,
    REMAT,
    SEED,
    SHARE,
    SHARE_OR_MINUS_1,
    Key,
    Keys,
    default_values,
)
from m2mkd_jax.config.recipe_section import RECIPE
from m2mkd_jax.config.run_keys import RUN

PHASES = (
    "pt",
    "mt",
    "ft",
    "m2mkd",
    "e2e",
    "e2e_scratch",
    "e2e_kd",
    "e2e_upcycled",
    "detect",
    "detect_scratch",
    "fewshot",
    "eval",
)
DETECTION_PHASES = ("detect", "detect_scratch")
MODULE_PHASES = ("mt", "m2mkd")  # one job per module
RECIPES = ("pt", "mt", "ft", "m2mkd", "e2e", "fewshot")

TEACHER: Keys = {
    "family": Key("", 'teacher of one\'s own, "package.module:Class"; "": a vision transformer'),
    "variant": Key(
        "", 'a published transformer (models/variants.py); "": patch, width, heads, qkv_bias, eps'
    ),
    "patch": Key(0, "side of a patch in pixels"),
    "width": Key(0, "channels of a token"),
    "heads": Key(0, "attention heads"),
    "qkv_bias": Key(True, "biases in the query, key and value projections"),
    "eps": Key(1e-6, "epsilon of the layer norms", ABOVE_0),
    "depths": Key((), "blocks of each teacher module", COUNTS),
    "meta_depths": Key((), "blocks of each module of the meta model; (): one each", COUNTS),
    "options": Key({}, "of a teacher of one's own"),
    "remat": Key(
        "auto",
        "recompute activations of the blocks in the backward pass; auto: if memory is short",
        REMAT,
    ),
}

DISTILLATION: Keys = {
    "kind": Key(
        "soft",
        "soft: Kullback-Leibler divergence of the teacher's distribution; hard: cross entropy with "
        "its likeliest class; none",
    ),
    "alpha": Key(0.5, "weight of the distillation loss; that of the labels is 1 - alpha", SHARE),
    "alpha_end": Key(
        -1.0,
        "alpha of a job's last optimizer update, to which it goes from `alpha`, linearly by "
        "update; -1: `alpha` throughout, as published",
        SHARE_OR_MINUS_1,
    ),
    "temperature": Key(1.0, "temperature of both distributions, for soft", ABOVE_0),
    "token_weight": Key(
        0.0,
        "weight in m2mkd of the mean squared error between the tokens that a student and its "
        "teacher's module give, each token normalised; not for the last student, which gives "
        "logits, nor one that gives fewer tokens (a NAC's read-in); 0: none, as published",
        FROM_0,
    ),
    "teach_from": Key(
        "ft",
        "phase whose teacher modules teach the students: ft, fine-tuned together as published; mt, "
        "as each was trained inside the meta model, closer to it",
    ),
    "teacher_of": Key(
        (),
        "teacher module that each student imitates in its own place, for experiments; the first "
        "and the last their own; (): all their own, as published",
        INDICES,
    ),
    "joint": Key(
        True,
        "train the pairs m2mkd/i that a run has to do in one program, on the same batches, as many "
        "as fit into memory, and without drop-path the modules mt/i too; each ends with the "
        "weights that it would have by itself",
    ),
    "views": Key(
        0,
        "augmented views of every image in m2mkd, shown in turn, one an epoch; 0: every epoch "
        "augments anew",
        FROM_0,
    ),
    "keep_targets": Key(
        True,
        "with views: compute what the meta model gives the students, and the teacher's logits, "
        "once for each view, and keep them on disk until the job ends; without mixup, cutmix, "
        "erasing, repeated augmentation and token_weight",
    ),
}

REGULARISER: Keys = {
    "kind": Key("none", "loss on the NAC's graph: none, hinge, stochastic_block, gaussian_mixture"),
    "weight": Key(0.1, "weight of that loss", FROM_0),
    "hinge": Key(0.4, "cosine distance below which signatures repel each other, for hinge", FROM_0),
    "clusters": Key(8, "clusters of equal size, for stochastic_block", ABOVE_0),
    "p_in": Key(0.9, "link probability within a cluster, for stochastic_block", SHARE),
    "p_out": Key(0.2, "link probability between clusters, for stochastic_block", SHARE),
    "components": Key(1, "Gaussians, for gaussian_mixture", ABOVE_0),
}

FEW_SHOT: Keys = {
    "network": Key("e2e", "job whose network gets a new head for every episode"),
    "data": DATA,
    "ways": Key(8, "classes of an episode, drawn from data.classes"),
    "shots": Key(1, "support images per class; there are three times as many queries"),
    "episodes": Key(20, "episodes, over which accuracies are averaged"),
    "selection": Key(
        "disjoint",
        "disjoint: support from the training images, queries from the test images; published: both "
        "from the training images, so that support images are queries too",
    ),
    "seed": Key(1, "of the first episode; the following ones count up", SEED),
}

INIT: Keys = {
    "meta": Key("", "weights of the meta model; makes pt unnecessary"),
    "teacher": Key("", "weights of the teacher; makes mt and ft unnecessary"),
    "modules": Key("", "weights of a teacher that ft goes on to train; makes mt unnecessary"),
    "students": Key("", "weights of the students; makes m2mkd unnecessary"),
    "network": Key(
        "", "a whole network that e2e trains on, or that eval measures; makes m2mkd unnecessary"
    ),
    "fresh_head": Key(
        False,
        "take all of init.modules and init.network but the layer that gives the logits, which is a "
        "fresh one: for other classes",
    ),
}

MESH: Keys = {
    "data": Key(-1, "devices along the axis data, over which batches are cut; -1: the remaining"),
    "expert": Key(
        1, "devices that share the experts of one copy of the network; -1: the remaining"
    ),
    "fsdp": Key(False, "cut large parameters and their optimizer state over the axis data"),
}


def all_keys(family: str = "nac") -> Keys:
    """Every key there is, in groups.

    Args:
        family: of the students; "package.module:Class" adds that class's section.

    Raises:
        UserError: there is no such class.
    """
    keys: dict[str, Any] = {
        "name": Key("", "of the run, for people"),
        "seed": Key(0, "of weights, data order, augmentation and noise", SEED),
        "phases": Key(
            ("pt", "mt", "ft", "m2mkd", "e2e", "eval"), f"what is done: {', '.join(PHASES)}", NAMES
        ),
        "e2e_seeds": Key(
            1, "repetitions of every end-to-end phase with other seeds: e2e, e2e/1, ...", ABOVE_0
        ),
        "data": DATA,
        "teaching_data": DATA,
        "teacher": TEACHER,
        "family": Key(family, 'of the students: nac, vmoe, or one\'s own "package.module:Class"'),
        **{name: section() for name, section in SECTIONS.items()},
        "distillation": DISTILLATION,
        "regulariser": REGULARISER,
        "recipes": dict.fromkeys(RECIPES, RECIPE),
        "few_shot": FEW_SHOT,
        "detection": DETECTION,
        "init": INIT,
        "evaluation": EVALUATION,
        **RUN,
        "mesh": MESH,
    }
    return keys | own_section(family, keys) if ":" in family else keys


# What the groups are for.
GROUPS = {
    "data": "The images of the end-to-end phases and of evaluation.",
    "data.augment": "Augmentation of training images, in this order.",
    "teaching_data": 'The images of pt, mt, ft and m2mkd; with name "" those of `data`.',
    "teacher": "The teacher, and the meta model that its modules are trained with.",
    "nac": "Students of the family nac, and the Neural Attentive Circuit made of them.",
    "vmoe": "Students of the family vmoe, and the V-MoE made of them.",
    "distillation": "The loss of m2mkd and e2e_kd.",
    "regulariser": "A loss on the NAC's graph, end to end.",
    "recipes": "How each phase trains; all end-to-end phases train by `recipes.e2e`.",
    "few_shot": "The phase fewshot: heads for classes that the network has not seen.",
    "few_shot.data": "The images of the episodes; image_size 0: the network's. mean and std must "
    "be those of the network.",
    "detection": "The phases detect, whose backbone is a trained network, and detect_scratch, the "
    "same detector from fresh weights; docs/detection.md.",
    "detection.data": "The scenes. mean and std must be those of the network.",
    "detection.data.augment": "How scenes are resized and flipped, and test scenes resized.",
    "detection.model": "The detector beside its transformer.",
    "detection.recipe": "How detectors train.",
    "init": "Directories or files of weights, converted or torch's, in place of phases.",
    "evaluation": "How accuracies are measured.",
    "mesh": "How the devices are arranged; data x expert is their number.",
}


def base(family: str = "nac") -> ConfigDict:
    """The config with every default; keys that it has not are refused.

    Args:
        family: of the students; "package.module:Class" adds that class's section.

    Raises:
        UserError: there is no such class.
    """
    config = ConfigDict(default_values(all_keys(family)))
    for recipe in config.recipes.values():
        recipe.modules = ConfigDict(allow_dotted_keys=False)
    return config.lock()


def recipe_name(phase: str) -> str:
    """The recipe that a phase trains by: all end-to-end phases share one."""
    return "e2e" if phase.startswith("e2e") else phase


def own_recipe(config: ConfigDict, phase: str, index: int | None = None) -> ConfigDict:
    """A phase's recipe with the changes that its `modules` makes for one module.

    Args:
        config: of the run.
        phase: such as m2mkd.
        index: of the module; None: no module's changes.
    """
    recipe = ConfigDict(config.recipes[recipe_name(phase)].to_dict())
    changes = recipe.modules.get(str(index), {})
    del recipe.modules
    recipe.update(changes)
    return recipe


def module_recipe(config: ConfigDict, phase: str, index: int | None = None) -> ConfigDict:
    """The recipe that a phase trains by: `own_recipe` with its learning rates scaled.

    Args:
        config: of the run.
        phase: such as m2mkd.
        index: of the module; None: no module's changes.
    """
    recipe = own_recipe(config, phase, index)
    if recipe.lr_per:
        if recipe.scale_min_lr:
            recipe.min_lr = scaled_lr(recipe.min_lr, recipe.batch, recipe.lr_per)
        recipe.lr = scaled_lr(recipe.lr, recipe.batch, recipe.lr_per)
    return recipe


def teaching_data(config: ConfigDict) -> ConfigDict:
    """The data section of pt, mt, ft and m2mkd."""
    return config.teaching_data if config.teaching_data.name else config.data


def teaching_data_key(config: ConfigDict) -> str:
    """The key that holds `teaching_data`."""
    return "teaching_data" if config.teaching_data.name else "data"


def few_shot_data(config: ConfigDict) -> ConfigDict:
    """The data of few-shot episodes, at the network's image size."""
    data = ConfigDict(config.few_shot.data.to_dict())
    data.image_size = data.image_size or config.data.image_size
    return data


def renditions_data(config: ConfigDict, name: str) -> ConfigDict:
    """config.data with the test images of a set of renditions of its classes.

    Args:
        config: of the run.
        name: of the data set, such as imagenet_r.
    """
    data = ConfigDict(config.data.to_dict())
    data.name, data.root, data.test_images, data.validation = name, "", 0, 0.0
    data.numeric_order = False
    return data


def meta_depths(config: ConfigDict) -> tuple[int, ...]:
    """Blocks of each module of the meta model."""
    return tuple(config.teacher.meta_depths) or (1,) * len(config.teacher.depths)


def scaled_lr(base: float, global_batch: int, per: int = 512) -> float:
    """The linear scaling rule: base * global_batch / per.

    Args:
        base: learning rate for a batch of `per` images.
        global_batch: images per optimizer update, over all devices and accumulated parts.
        per: images.

    Source: docs/reference.md#recipes.
    """
    return base * global_batch / per
