"""What config.distillation may be."""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import module_recipe, teaching_data, teaching_data_key
from m2mkd_jax.errors import require, require_known
from m2mkd_jax.losses.distillation import KINDS
from m2mkd_jax.phases.families import teacher
from m2mkd_jax.phases.phase import alpha_changes

TEACHING_PHASES = ("ft", "mt")


def check_distillation(config: ConfigDict) -> None:
    """Refuses distillation that cannot run.

    Raises:
        UserError: one line naming the key.
    """
    require_known(config.distillation.kind, KINDS, "distillation.kind")
    _check_teachers(config)
    _check_views(config)
    _check_choices(config)


def _check_choices(config: ConfigDict) -> None:
    """Refuses alpha_end and token_weight where they would do nothing, or cannot be done."""
    chosen = config.distillation
    wanted = {
        "alpha_end": alpha_changes(chosen),
        "token_weight": chosen.token_weight > 0,
    }
    for name, on in wanted.items():
        require(
            not on or chosen.kind != "none",
            f"config.distillation.{name} is {chosen[name]}, and with distillation.kind "
            f'"none" there is no teacher; set distillation.kind="soft", or leave {name} out',
        )
    if not wanted["token_weight"]:
        return
    where = f"config.distillation.token_weight is {chosen.token_weight}"
    require(
        teacher(config).modules > 1,
        f"{where}: a teacher of one module gives logits alone; set it to 0",
    )
    require(
        not (chosen.views and chosen.keep_targets),
        f"{where}: tokens of the teacher are not among the kept targets; set "
        "distillation.keep_targets=False, or token_weight to 0",
    )


def _check_teachers(config: ConfigDict) -> None:
    """Refuses teacher modules that there are not, or whose place in the chain is another."""
    chosen, modules = config.distillation, teacher(config).modules
    require_known(chosen.teach_from, TEACHING_PHASES, "distillation.teach_from")
    require(
        chosen.teach_from == "ft" or not config.init.teacher,
        'config.distillation.teach_from is "mt", and config.init.teacher brings one teacher, '
        'whose modules teach as they are; leave teach_from "ft"',
    )
    order = tuple(chosen.teacher_of)
    if not order:
        return
    where = f"config.distillation.teacher_of is {order}"
    require(len(order) == modules, f"{where}: there are {modules} students, one entry for each")
    require(max(order) < modules, f"{where}: teacher modules are 0 to {modules - 1}")
    ends = {0, modules - 1}
    require(
        all((i in ends or j in ends) <= (i == j) for i, j in enumerate(order)),
        f"{where}: the first module alone takes images and the last alone gives logits; begin "
        f"with 0, end with {modules - 1}, and have neither between",
    )


def _check_views(config: ConfigDict) -> None:
    """Refuses kept targets of images that are changed, or mixed with others, in every step."""
    views, data, key = config.distillation.views, teaching_data(config), teaching_data_key(config)
    if not views or not config.distillation.keep_targets or "m2mkd" not in config.phases:
        return
    changes = []
    for index in (None, *range(teacher(config).modules)):
        recipe = module_recipe(config, "m2mkd", index)
        changes += [f"recipes.m2mkd.{name}=0" for name in ("mixup", "cutmix") if recipe[name]]
    if data.augment.erase:
        changes.append(f"{key}.augment.erase=0")
    if data.repeated_augmentation > 1:
        changes.append(f"{key}.repeated_augmentation=1")
    if config.distillation.kind == "none":
        changes.append('distillation.kind="soft"')
    require(
        not changes,
        f"config.distillation.views is {views}: targets are kept for single images as they are; "
        f"set {', '.join(dict.fromkeys(changes))}, or distillation.keep_targets=False",
    )
    require(
        jax.process_count() == 1,
        f"config.distillation.views is {views}: targets are kept by one process, and there are "
        f"{jax.process_count()}; set distillation.keep_targets=False",
    )
