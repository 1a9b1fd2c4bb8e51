"""What a config may say, its defaults, and the checks that run before any work.

A config is an ml_collections ConfigDict made by `base()`; a config file changes its values. Every
key that exists is in `base()`, with a line on what it means.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from ml_collections import ConfigDict

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac import priors
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.variants import vit_variant
from m2mkd_jax.models.vit import ViTSpec
from m2mkd_jax.objectives.distillation import KINDS
from m2mkd_jax.train.optimizer import DECAY_RULES, OPTIMIZERS
from m2mkd_jax.train.schedule import SCHEDULES, scaled_lr

PHASES = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "e2e_kd", "eval")
MODULE_PHASES = ("mt", "m2mkd")  # one job per module
RECIPES = ("pt", "mt", "ft", "m2mkd", "e2e")
REGULARISERS = ("none", "hinge", "stochastic_block", "gaussian_mixture")
PRECISIONS = ("auto", "float32", "bfloat16")
# Keys whose subkeys are free.
FREE = ("modules", "options")


def _data() -> dict:
    return dict(
        name="",  # digits, fashion_mnist, image_folder, tiny_imagenet, imagenet
        root="",  # directory; "" is the dataset's default
        image_size=0,
        classes=0,
        train_images=0,  # 0: all; else a class-balanced subset
        test_images=0,
        workers=0,  # processes that decode; 0: threads of this one
        mean=(0.485, 0.456, 0.406),  # ImageNet's, of images in 0..1
        std=(0.229, 0.224, 0.225),
        repeated_augmentation=1,  # 3: the published repeated augmentation; 1: off
        augment=dict(
            crop="none",  # shift, random_resized
            shift=0,  # pixels, for "shift"
            scale=(0.08, 1.0),  # area, for "random_resized"
            flip=False,
        ),
    )


def _recipe() -> dict:
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
        modules=dict(),  # per module: {"0": dict(epochs=...)}
    )


def base() -> ConfigDict:
    """Every key there is, with its default; unknown ones are refused."""
    config = ConfigDict(
        dict(
            name="",
            seed=0,
            phases=("pt", "mt", "ft", "m2mkd", "e2e", "eval"),
            e2e_seeds=1,  # repetitions of the end-to-end phases: e2e, e2e/1, ...
            data=_data(),  # end to end, evaluation
            teaching_data=_data(),  # pt, mt, ft, m2mkd; name "": the same as data
            teacher=dict(
                variant="",  # see models/variants.py; or "" and the five fields below
                patch=0,
                width=0,
                heads=0,
                qkv_bias=True,
                eps=1e-6,
                depths=(),  # blocks of each module
                meta_depths=(),  # blocks of each meta module; (): one each
                remat=False,
            ),
            student=dict(
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
            ),
            distillation=dict(kind="soft", alpha=0.5, temperature=1.0),
            regulariser=dict(
                kind="none", weight=0.1, hinge=0.4, clusters=8, p_in=0.9, p_out=0.2, components=1
            ),
            recipes={name: _recipe() for name in RECIPES},
            init=dict(meta="", teacher="", students="", network=""),  # directories of weights
            evaluation=dict(
                batch=500,
                every=0.0,  # epochs; 0: only at the end
                sampled=False,  # draw seeder and pooling noise, as the published evaluation does
            ),
            checkpoint_minutes=10.0,  # at least this often, besides every evaluation
            log_every=50,  # steps
            precision="auto",  # bfloat16 on GPU and TPU, float32 on CPU
            expert_parallel=1,  # devices per group of the mesh's expert axis
        )
    )
    for recipe in config.recipes.values():
        recipe.modules = ConfigDict(allow_dotted_keys=False)
    return config.lock()


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key not in FREE:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _did_you_mean(word: str, words) -> str:
    close = difflib.get_close_matches(word, list(words), 1)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(words)}"


def _one_of(value, allowed, key: str) -> None:
    if value not in allowed:
        raise UserError(f'config.{key}: "{value}" is unknown{_did_you_mean(str(value), allowed)}')


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check(config: ConfigDict, devices: int = 1) -> None:
    """Refuses what cannot run, before anything does.

    Args:
        config: from a config file.
        devices: how many devices the batch is cut over.

    Raises:
        UserError: one line naming the key.
    """
    known = dict(_leaves(base()))
    for key, value in _leaves(config):
        _require(key in known, f"config.{key} is unknown{_did_you_mean(key, known)}")
        default = known[key]
        whole_number = isinstance(default, float) and type(value) is int
        optional = key == "student.truncation" and value is None
        _require(
            type(value) is type(default) or whole_number or optional,
            f"config.{key} must be {type(default).__name__}, not {value!r}",
        )
    for phase in config.phases:
        _one_of(phase, PHASES, "phases")
    _one_of(config.distillation.kind, KINDS, "distillation.kind")
    _one_of(config.regulariser.kind, REGULARISERS, "regulariser.kind")
    _one_of(config.precision, PRECISIONS, "precision")
    for name in RECIPES:
        if any(recipe_name(phase) == name for phase in config.phases):
            _check_recipe(config, name, devices)
    _check_networks(config)


def _check_recipe(config: ConfigDict, name: str, devices: int) -> None:
    known = _recipe()
    modules = len(config.teacher.depths)
    for index, changes in config.recipes[name].modules.items():
        where = f"recipes.{name}.modules.{index}"
        _require(name in MODULE_PHASES, f"config.{where}: {name} has no modules")
        _require(
            index.isdigit() and int(index) < modules,
            f"config.{where}: there are {modules} modules, 0 to {modules - 1}",
        )
        for key in changes:
            _require(key in known, f"config.{where}.{key} is unknown{_did_you_mean(key, known)}")
    for index in [None, *range(modules)] if name in MODULE_PHASES else [None]:
        recipe = module_recipe(config, name, index)
        where = f"config.recipes.{name}"
        _one_of(recipe.optimizer, OPTIMIZERS, f"recipes.{name}.optimizer")
        _one_of(recipe.schedule, SCHEDULES, f"recipes.{name}.schedule")
        _one_of(recipe.decay_rule, DECAY_RULES, f"recipes.{name}.decay_rule")
        _require(recipe.epochs > 0, f"{where}.epochs is {recipe.epochs}; it must be above 0")
        _require(
            0 <= recipe.warmup_epochs <= recipe.epochs,
            f"{where}.warmup_epochs is {recipe.warmup_epochs} of {recipe.epochs} epochs",
        )
        parts = recipe.accumulate * devices
        _require(
            recipe.batch > 0 and recipe.accumulate > 0 and recipe.batch % parts == 0,
            f"{where}.batch is {recipe.batch}; it must be a multiple of {parts} "
            f"(accumulate {recipe.accumulate} x devices {devices})",
        )


def _check_networks(config: ConfigDict) -> None:
    teacher, modules = config.teacher, len(config.teacher.depths)
    teaching = {"pt", "mt", "ft", "m2mkd", "e2e_kd"} & set(config.phases)
    for key in ("data", "teaching_data") if teaching else ("data",):
        data = teaching_data(config) if key == "teaching_data" else config.data
        sized = data.image_size > 0 and data.classes > 1
        _require(sized, f"config.{key} needs image_size and classes")
    if teaching:
        _require(modules >= 2, "config.teacher.depths must name at least two modules")
        _require(
            len(meta_depths(config)) == modules,
            f"config.teacher.meta_depths has {len(meta_depths(config))} modules, "
            f"config.teacher.depths {modules}",
        )
        _, depth = teacher_spec(config)
        _require(
            depth is None or sum(teacher.depths) == depth,
            f"config.teacher.depths sum to {sum(teacher.depths)}; {teacher.variant} has {depth}",
        )
    student = config.student
    nac_spec(config, config.data)
    _require(
        student.stitch_dim in (0, teacher_spec(config)[0].width) if teaching else True,
        f"config.student.stitch_dim is {student.stitch_dim}; it must be the meta model's width "
        f"{teacher_spec(config)[0].width if teaching else ''} (or 0 for just that)",
    )
    if "m2mkd" in config.phases or config.init.students:
        _require(
            modules == student.iterations + 2,
            f"config.teacher.depths names {modules} modules; the student needs "
            f"{student.iterations + 2} (read-in, {student.iterations} iterations, read-out)",
        )
        _require(
            not (student.share_propagators or student.share_ffn),
            "config.student: m2mKD teaches every propagator apart; switch share_propagators and "
            "share_ffn off or drop the m2mkd phase",
        )
    priors.build_graph(student.prior, student.mediator_latents, dict(student.options), config.seed)
    if "e2e_kd" in config.phases:
        taught = teaching_data(config)
        _require(
            (taught.classes, taught.image_size) == (config.data.classes, config.data.image_size),
            f"config.phases: e2e_kd needs a teacher of the same task; it was taught "
            f"{taught.classes} classes at {taught.image_size} px, the network learns "
            f"{config.data.classes} at {config.data.image_size} px",
        )


def recipe_name(phase: str) -> str:
    """The recipe that a phase trains by: all end-to-end phases share one."""
    return "e2e" if phase.startswith("e2e") else phase


def module_recipe(config: ConfigDict, phase: str, index: int | None = None) -> ConfigDict:
    """A phase's recipe with its module's own changes and its learning rates scaled."""
    recipe = ConfigDict(config.recipes[recipe_name(phase)].to_dict())
    changes = recipe.modules.get(str(index), {})
    recipe.update(changes)
    if recipe.lr_per:
        if recipe.scale_min_lr:
            recipe.min_lr = scaled_lr(recipe.min_lr, recipe.batch, recipe.lr_per)
        recipe.lr = scaled_lr(recipe.lr, recipe.batch, recipe.lr_per)
    return recipe


def teaching_data(config: ConfigDict) -> ConfigDict:
    """The data of pt, mt, ft and m2mkd."""
    return config.teaching_data if config.teaching_data.name else config.data


def meta_depths(config: ConfigDict) -> tuple[int, ...]:
    return tuple(config.teacher.meta_depths) or (1,) * len(config.teacher.depths)


def teacher_spec(config: ConfigDict) -> tuple[ViTSpec, int | None]:
    """The teacher's fields, and its published depth if it is a published variant."""
    teacher, data = config.teacher, teaching_data(config)
    if teacher.variant:
        spec, depth = vit_variant(teacher.variant, data.classes, teacher.remat)
        _require(
            spec.image_size == data.image_size,
            f"config.teacher.variant {teacher.variant} takes {spec.image_size} px, its data have "
            f"{data.image_size}",
        )
        return spec, depth
    _require(
        min(teacher.patch, teacher.width, teacher.heads) > 0,
        "config.teacher needs a variant, or patch, width and heads",
    )
    fields = (teacher.patch, teacher.width, teacher.heads, data.classes)
    spec = ViTSpec(data.image_size, *fields, teacher.qkv_bias, teacher.eps, teacher.remat)
    return spec, None


def nac_spec(config: ConfigDict, data: ConfigDict) -> NACSpec:
    """The student's fields for some data: the network's own, or what its students are taught on."""
    own = ("stitch_dim", "prior", "options")
    fields = {k: v for k, v in config.student.items() if k not in own}
    for key in ("state_dim", "code_dim", "heads", "input_latents", "mediator_latents",
                "output_latents", "iterations"):  # fmt: skip
        _require(fields[key] > 0, f"config.student.{key} must be above 0")
    fields["tokenizer_depths"] = tuple(fields["tokenizer_depths"])
    return NACSpec(image_size=data.image_size, classes=data.classes, **fields)
