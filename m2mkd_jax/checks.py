"""The checks that run before any work: a config that cannot run is refused in one line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from ml_collections import ConfigDict

from m2mkd_jax.config import (
    FREE,
    MODULE_PHASES,
    PHASES,
    RECIPES,
    base,
    default_recipe,
    few_shot_data,
    meta_depths,
    module_recipe,
    recipe_name,
    teaching_data,
)
from m2mkd_jax.data.augment import Augmentation
from m2mkd_jax.data.class_lists import PARENTS
from m2mkd_jax.data.few_shot import SELECTIONS
from m2mkd_jax.errors import UserError
from m2mkd_jax.families import FAMILIES, family
from m2mkd_jax.objectives.distillation import KINDS
from m2mkd_jax.ranges import check_value
from m2mkd_jax.specs import require, teacher_spec
from m2mkd_jax.train.optimizer import DECAY_RULES, OPTIMIZERS
from m2mkd_jax.train.schedule import SCHEDULES

REGULARISERS = ("none", "hinge", "stochastic_block", "gaussian_mixture")
PRECISIONS = ("auto", "float32", "bfloat16")


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
    message = f'config.{key}: "{value}" is unknown{_did_you_mean(str(value), allowed)}'
    require(value in allowed, message)


def check_key(key: str, known: Collection[str] = ()) -> None:
    """Raises UserError where `key` (a.b.c) is no key of `base()`, nor below a free one of it."""
    known = known or [name for name, _ in _leaves(base())]
    if key in known or any(key.startswith(f"{k}.") for k in known if k.split(".")[-1] in FREE):
        return
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        raise UserError(f"config.{key} is a group of keys; set one, such as config.{below[0]}")
    close = difflib.get_close_matches(key, known, 1)
    hint = f'did you mean "{close[0]}"?' if close else "every key is listed in m2mkd_jax/config.py"
    raise UserError(f"config.{key} is unknown; {hint}")


def check_values(config: ConfigDict) -> None:
    """Raises UserError for a key that is unknown or not there, and for an impossible value."""
    known, given = dict(_leaves(base())), dict(_leaves(config))
    for key in (*given, *known):
        check_key(key, known)
        require(key in given, f"config.{key} is missing; start from m2mkd_jax.config.base()")
        check_value(key, given[key], known[key])


def check(config: ConfigDict, devices: int = 1) -> None:
    """Refuses what cannot run, before anything does.

    Args:
        config: from a config file.
        devices: how many devices the batch is cut over.

    Raises:
        UserError: one line naming the key.
    """
    check_values(config)
    require(len(config.phases) > 0, "config.phases is empty; nothing would run")
    for phase in config.phases:
        _one_of(phase, PHASES, "phases")
    _one_of(config.distillation.kind, KINDS, "distillation.kind")
    _one_of(config.family, FAMILIES, "family")
    _one_of(config.regulariser.kind, REGULARISERS, "regulariser.kind")
    _one_of(config.precision, PRECISIONS, "precision")
    for name in config.evaluation.renditions:
        _one_of(name, PARENTS, "evaluation.renditions")
        message = f"config.evaluation.renditions: {name} needs a network of {PARENTS[name]}"
        require(config.data.name == PARENTS[name], message)
    for name in RECIPES:
        if any(recipe_name(phase) == name for phase in config.phases):
            _check_recipe(config, name, devices)
    _check_networks(config, devices)


def _check_recipe(config: ConfigDict, name: str, devices: int) -> None:
    known = default_recipe()
    modules = len(config.teacher.depths)
    for index, changes in config.recipes[name].modules.items():
        where = f"recipes.{name}.modules.{index}"
        require(isinstance(changes, ConfigDict), f"config.{where} is {changes!r}; not a dict")
        require(name in MODULE_PHASES, f"config.{where}: {name} has no modules")
        require(
            index.isdigit() and int(index) < modules,
            f"config.{where}: there are {modules} modules, 0 to {modules - 1}",
        )
        for key in changes:
            require(key in known, f"config.{where}.{key} is unknown{_did_you_mean(key, known)}")
            check_value(f"{where}.{key}", changes[key], known[key])
    for index in [None, *range(modules)] if name in MODULE_PHASES else [None]:
        recipe = module_recipe(config, name, index)
        where = f"config.recipes.{name}"
        _one_of(recipe.optimizer, OPTIMIZERS, f"recipes.{name}.optimizer")
        _one_of(recipe.schedule, SCHEDULES, f"recipes.{name}.schedule")
        _one_of(recipe.decay_rule, DECAY_RULES, f"recipes.{name}.decay_rule")
        require(recipe.epochs > 0, f"{where}.epochs is {recipe.epochs}; it must be above 0")
        require(
            0 <= recipe.warmup_epochs <= recipe.epochs,
            f"{where}.warmup_epochs is {recipe.warmup_epochs} of {recipe.epochs} epochs",
        )
        parts = recipe.accumulate * devices
        require(
            recipe.batch > 0 and recipe.batch % parts == 0,
            f"{where}.batch is {recipe.batch}; it must be above 0 and a multiple of {parts} "
            f"(accumulate {recipe.accumulate} x devices {devices})",
        )
        if recipe.stop_within:
            _check_stop(config, name)


def _check_stop(config: ConfigDict, name: str) -> None:
    """Raises UserError where there is nothing to stop at, or no evaluation to stop after."""
    key = f"config.recipes.{name}.stop_within"
    require(name in MODULE_PHASES, f"{key}: only mt and m2mkd have a reference to stop at")
    require(
        name != "mt" or not config.init.meta,
        f"{key}: the accuracy to stop at is that of pt, which config.init.meta makes unnecessary",
    )
    require(
        config.evaluation.every > 0,
        f"{key} is looked at every config.evaluation.every epochs, which is 0",
    )


def _check_few_shot(config: ConfigDict, students) -> None:
    few, data = config.few_shot, few_shot_data(config)
    _ = students.head  # there is one
    _one_of(few.selection, SELECTIONS, "few_shot.selection")
    _one_of(few.network.split("/")[0], [p for p in PHASES if p[:3] == "e2e"], "few_shot.network")
    Augmentation.from_config(data)
    require(
        data.image_size == config.data.image_size,
        f"config.few_shot.data.image_size is {data.image_size}; the network takes "
        f"{config.data.image_size}",
    )
    require(
        2 <= few.ways <= data.classes,
        f"config.few_shot.ways is {few.ways} of config.few_shot.data.classes {data.classes}",
    )
    require(
        few.shots > 0 and few.episodes > 0,
        f"config.few_shot: {few.shots} shots and {few.episodes} episodes; both must be above 0",
    )
    require(
        config.recipes.fewshot.batch <= few.ways * few.shots,
        f"config.recipes.fewshot.batch is {config.recipes.fewshot.batch} and there are "
        f"{few.ways * few.shots} support images",
    )


def _check_networks(config: ConfigDict, devices: int) -> None:
    teacher, modules = config.teacher, len(config.teacher.depths)
    phases = set(config.phases)
    teaching = bool({"pt", "mt", "ft", "m2mkd", "e2e_kd", "e2e_upcycled"} & phases)
    for key in ("data", "teaching_data") if teaching else ("data",):
        data = teaching_data(config) if key == "teaching_data" else config.data
        sized = data.image_size > 0 and data.classes > 1
        require(sized, f"config.{key} needs image_size and classes")
        Augmentation.from_config(data)
    if teaching:
        require(modules >= 2, "config.teacher.depths must name at least two modules")
        require(
            len(meta_depths(config)) == modules,
            f"config.teacher.meta_depths has {len(meta_depths(config))} modules, "
            f"config.teacher.depths {modules}",
        )
        _, depth = teacher_spec(config)
        require(
            depth is None or sum(teacher.depths) == depth,
            f"config.teacher.depths sum to {sum(teacher.depths)}; {teacher.variant} has {depth}",
        )
    students = family(config)
    students.check(teaching, devices)
    if "fewshot" in phases:
        _check_few_shot(config, students)
    if "m2mkd" in phases or config.init.students:
        require(
            not teaching or modules == students.modules,
            f"config.teacher.depths names {modules} modules; the student needs "
            f"{students.modules} ({students.parts})",
        )
    for phase in ("e2e_kd", "e2e_upcycled"):
        taught = teaching_data(config)
        require(
            phase not in phases
            or (taught.classes, taught.image_size) == (config.data.classes, config.data.image_size),
            f"config.phases: {phase} needs a teacher of the same task; it was taught "
            f"{taught.classes} classes at {taught.image_size} px, the network learns "
            f"{config.data.classes} at {config.data.image_size} px",
        )
