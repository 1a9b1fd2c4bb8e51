"""What a config may say, its defaults, and the checks that run before any work.

A config is an ml_collections ConfigDict made by `base()`; a config file changes its values. Every
key that exists is in `base()`, with a line on what it means.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.errors import UserError

PHASES = (
    "pt",
    "mt",
    "ft",
    "m2mkd",
    "e2e",
    "e2e_scratch",
    "e2e_kd",
    "e2e_upcycled",
    "fewshot",
    "eval",
)
MODULE_PHASES = ("mt", "m2mkd")  # one job per module
RECIPES = ("pt", "mt", "ft", "m2mkd", "e2e", "fewshot")
# Keys whose subkeys are free.
FREE = ("modules", "options")


def _data() -> dict:
    return dict(
        # digits, fashion_mnist, image_folder, tiny_imagenet, imagenet, cifar100, cub, imagenet_r,
        # tiny_imagenet_r; see data/sources.py
        name="",
        root="",  # directory; "" is the dataset's default
        image_size=0,
        classes=0,
        train_images=0,  # 0: all; else a class-balanced subset
        test_images=0,
        workers=-1,  # processes that decode; 0: threads of this one; -1: as fits the machine
        damaged_share=0.001,  # of the images; so many are replaced, more are an error
        mean=(0.485, 0.456, 0.406),  # ImageNet's, of images in 0..1
        std=(0.229, 0.224, 0.225),
        repeated_augmentation=1,  # 3: the published repeated augmentation; 1: off
        augment=dict(
            crop="none",  # shift, random_resized
            shift=0,  # pixels, for "shift"
            scale=(0.08, 1.0),  # area, for "random_resized"
            flip=False,
            rand_augment="",  # a policy such as rand-m9-mstd0.5-inc1 (the published one); "": off
            color_jitter=0.0,  # brightness, contrast, saturation; only without rand_augment
            erase=0.0,  # probability of random erasing
        ),
    )


def default_recipe() -> dict:
    return dict(
        epochs=0.0,
        batch=0,  # images per optimizer update, over all devices
        accumulate=1,  # parts that a batch is computed in
        optimizer="adamw",  # or sgd
        momentum=0.9,  # sgd
        lr=5e-4,
        lr_per=512,  # lr is for this many images per batch; 0: lr is not scaled
        min_lr=1e-5,
        scale_min_lr=False,  # scale min_lr like lr
        warmup_lr=1e-6,
        warmup_epochs=0.0,
        schedule="clean",  # published, published_nac: the original's staircases
        weight_decay=0.05,
        decay_rule="published",  # published_stage, all, none
        clip=0.0,  # global norm; 0: off
        drop_path=0.0,
        ema=0.0,  # decay of an average of the weights, which is then evaluated; 0: off
        mixup=0.8,
        cutmix=1.0,
        switch_prob=0.5,
        mix_prob=1.0,
        smoothing=0.1,
        # Stop when the hybrid's accuracy is within this of its reference (mt: the meta model's,
        # m2mkd: the teacher hybrid's); 0: never. Looked at every `evaluation.every` epochs.
        stop_within=0.0,
        # Weights of the routers' balance losses (V-MoE), summed over the layers.
        importance_weight=0.0,
        load_weight=0.0,
        modules=dict(),  # per module: {"0": dict(epochs=...)}
    )


def _nac() -> dict:
    return dict(
        state_dim=0,
        code_dim=0,
        signature_dim=64,
        heads=0,
        head_dim=64,
        input_latents=0,
        mediator_latents=0,
        output_latents=0,
        iterations=8,
        ffn_capacity=2.0,
        geglu=True,
        layer_scale=0.1,
        qkv_bias=False,
        modulation="layer_norm",
        gain=0.1,
        add_one=True,
        code_noise=0.05,
        truncation=0.9,
        truncation_implementation="direct",
        stochastic_kernel=True,
        kernel_temperature=0.5,
        seeder=True,
        read_in_residual=True,
        share_propagators=False,
        share_ffn=False,
        codes_per_iteration=False,
        input_output=True,
        persistent_inputs=True,
        tokenizer_depths=(3, 3),
        position_dim=64,
        output="pooling",
        pooling="gumbel",
        remat=False,
        stitch_dim=0,  # 0: the meta model's width, the only one that fits
        prior="none",  # graph of the mediators; see models/nac/priors.py
        options=dict(),  # of the prior
    )


def _vmoe() -> dict:
    return dict(
        variant="",  # see models/variants.py; or "" and the five fields below
        patch=0,
        width=0,
        heads=0,
        qkv_bias=True,
        eps=1e-6,
        depths=(),  # blocks of each student module
        moe_pos=(),  # numbers of the blocks with experts; (): all
        experts=8,
        top_k=2,
        router="published",  # published, vmoe, expert_choice; see models/moe/router.py
        noise=1.0,  # of the vmoe router's logits in training, times 1 / experts
        dispatch="dropless",  # dropless, capacity; see models/moe/dispatch.py
        capacity_factor=1.25,
        group_images=0,  # images that share a capacity; 0: those of one device
        keep_stitches=False,  # end to end too
        remat=False,
    )


# A family's own section of the config: its name, and what makes its keys with their defaults.
SECTIONS = {"nac": _nac, "vmoe": _vmoe}


def import_class(name: str, key: str) -> Any:
    """The class that a value "package.module:Class" names.

    Args:
        name: the value; modules in the working directory are found too.
        key: of the config, for messages.

    Raises:
        UserError: no such module, an error in it, or nothing of that name there.
    """
    module, _, attribute = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):  # `python -m` has it, installed commands do not
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of one's own raises
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f'config.{key}: "{name}" is no importable package.module:Class ({reason})'
        ) from None


def _own_section(family: str, taken: Collection[str]) -> dict[str, ConfigDict]:
    """The config section that a family "package.module:Class" brings, by its name.

    Args:
        family: config.family.
        taken: names that other groups of keys have.

    Raises:
        UserError: there is no such class, or its section has the name of another group.
    """
    students = import_class(family, "family")
    section = getattr(students, "section", "")
    if not section or SECTIONS.get(section) == students.defaults:
        return {}
    if section in taken and section not in SECTIONS:
        raise UserError(
            f'config.family: the section of "{family}" is called "{section}", as other keys are'
        )
    return {section: ConfigDict(students.defaults())}


def base(family: str = "nac") -> ConfigDict:
    """Every key there is, with its default; unknown ones are refused.

    Args:
        family: of the students; "package.module:Class" adds that class's section.

    Raises:
        UserError: there is no such class.
    """
    config = ConfigDict(
        dict(
            name="",
            seed=0,
            phases=("pt", "mt", "ft", "m2mkd", "e2e", "eval"),
            e2e_seeds=1,  # repetitions of the end-to-end phases: e2e, e2e/1, ...
            data=_data(),  # end to end, evaluation
            teaching_data=_data(),  # pt, mt, ft, m2mkd; name "": the same as data
            teacher=dict(
                family="",  # a class of one's own, package.module:Class; "": a vision transformer
                variant="",  # see models/variants.py; or "" and the five fields below
                patch=0,
                width=0,
                heads=0,
                qkv_bias=True,
                eps=1e-6,
                depths=(),  # blocks of each module
                meta_depths=(),  # blocks of each meta module; (): one each
                options=dict(),  # of a teacher of one's own
                remat=False,
            ),
            family=family,  # of the students: nac, vmoe, or package.module:Class
            **{name: make() for name, make in SECTIONS.items()},
            distillation=dict(kind="soft", alpha=0.5, temperature=1.0),
            regulariser=dict(
                kind="none", weight=0.1, hinge=0.4, clusters=8, p_in=0.9, p_out=0.2, components=1
            ),
            recipes={name: default_recipe() for name in RECIPES},
            few_shot=dict(
                network="e2e",  # the job whose network gets a new head for every episode
                data=_data(),  # classes: all that are drawn from; image_size 0: the network's
                ways=8,
                shots=1,  # and 3 times as many queries per class
                episodes=20,
                selection="disjoint",  # published: the support images are queries too
                seed=1,  # of the first episode; the next ones follow
            ),
            init=dict(meta="", teacher="", students="", network=""),  # directories of weights
            evaluation=dict(
                batch=500,
                every=0.0,  # epochs; 0: only at the end
                sampled=False,  # draw seeder and pooling noise, as the published evaluation does
                renditions=(),  # of the job eval: imagenet_r, tiny_imagenet_r; see label_spaces.py
            ),
            checkpoint_minutes=10.0,  # at least this often, besides every evaluation
            log_every=50,  # steps
            precision="auto",  # bfloat16 on GPU and TPU, float32 on CPU
            mesh=dict(
                data=-1,  # devices along 'data'; -1: the rest
                expert=1,  # devices that share the experts of one copy of the network; -1: the rest
                fsdp=False,  # cut large parameters and their optimizer state over 'data'
            ),
        )
    )
    if ":" in family:
        config.update(_own_section(family, config.keys()))
    for recipe in config.recipes.values():
        recipe.modules = ConfigDict(allow_dotted_keys=False)
    return config.lock()


def recipe_name(phase: str) -> str:
    """The recipe that a phase trains by: all end-to-end phases share one."""
    return "e2e" if phase.startswith("e2e") else phase


def own_recipe(config: ConfigDict, phase: str, index: int | None = None) -> ConfigDict:
    """A phase's recipe with what `modules` changes for one of its modules."""
    recipe = ConfigDict(config.recipes[recipe_name(phase)].to_dict())
    changes = recipe.modules.get(str(index), {})
    del recipe.modules
    recipe.update(changes)
    return recipe


def module_recipe(config: ConfigDict, phase: str, index: int | None = None) -> ConfigDict:
    """A phase's recipe with its module's own changes and its learning rates scaled."""
    recipe = own_recipe(config, phase, index)
    if recipe.lr_per:
        if recipe.scale_min_lr:
            recipe.min_lr = scaled_lr(recipe.min_lr, recipe.batch, recipe.lr_per)
        recipe.lr = scaled_lr(recipe.lr, recipe.batch, recipe.lr_per)
    return recipe


def teaching_data(config: ConfigDict) -> ConfigDict:
    """The data of pt, mt, ft and m2mkd."""
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
    """The network's data, but the test images of a set of renditions of its classes."""
    data = ConfigDict(config.data.to_dict())
    data.name, data.root, data.test_images = name, "", 0
    return data


def meta_depths(config: ConfigDict) -> tuple[int, ...]:
    """Blocks of each module of the meta model."""
    return tuple(config.teacher.meta_depths) or (1,) * len(config.teacher.depths)


def scaled_lr(base: float, global_batch: int, per: int = 512) -> float:
    """The linear scaling rule: base * global_batch / per (all devices, accumulation included)."""
    return base * global_batch / per
