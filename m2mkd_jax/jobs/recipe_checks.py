"""Refuses recipes whose choices exclude each other, or name parts that there are not."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import MODULE_PHASES, teaching_data, teaching_data_key
from m2mkd_jax.errors import located, require
from m2mkd_jax.jobs.plan import Kind, Plan
from m2mkd_jax.jobs.setup import abstract_stages
from m2mkd_jax.train.trained_parts import by_part, layer_scales, trained_mask


def check_recipe_choices(config: ConfigDict, name: str, recipe: Any) -> None:
    """Refuses choices of a recipe that cannot work together, or not in this phase.

    Args:
        config: of the run.
        name: of the recipe.
        recipe: its values, or those of one module.

    Raises:
        UserError: one line that names the key.
    """
    key = f"config.recipes.{name}"
    require(
        recipe.schedule != "one_cycle" or recipe.warmup_epochs > 0,
        f"{key}.schedule is one_cycle, which rises for {key}.warmup_epochs; that is 0",
    )
    whole = name not in (*MODULE_PHASES, "fewshot")
    for field, used in (
        ("linear_probe", recipe.linear_probe),
        ("layer_decay", recipe.layer_decay != 1.0),
    ):
        require(whole or not used, f"{key}.{field}: only pt, ft and e2e train a whole network")
    require(
        recipe.layer_decay == 1.0 or name != "e2e" or config.family != "nac",
        f"{key}.layer_decay counts the blocks of a transformer; a NAC has none",
    )
    require(
        not recipe.linear_probe or not (recipe.train_only or recipe.freeze),
        f"{key}.linear_probe trains the last layer alone; leave {key}.train_only and .freeze empty",
    )
    require(
        name != "fewshot" or not (by_part(recipe) or recipe.class_weights != "none"),
        f"{key}: few-shot episodes train a fresh head on as many images of each class; leave "
        "freeze, train_only and class_weights alone",
    )
    data, where = config.data, "data"
    if name != "e2e":
        data, where = teaching_data(config), teaching_data_key(config)
    require(
        recipe.class_weights == "none" or data.sampler == "shuffle",
        f"{key}.class_weights and config.{where}.sampler are both balanced: each makes up for the "
        "sizes of the classes; set one",
    )


def check_trained(plan: Plan) -> None:
    """Refuses patterns of paths that fit no parameter, and layer_decay of a network without blocks.

    Raises:
        UserError: one line that names the job and the pattern.
    """
    for job in (plan.job(name) for name in plan.names):
        if job.kind is not Kind.TRAINING or not by_part(job.phase.recipe):
            continue
        phase, stages = job.phase, abstract_stages(job.phase)
        with located(f"config.{phase.recipe_key} ({job.name})"):
            params = phase.trained({name: stages[name]["params"] for name in phase.trainable})
            trained_mask(params, phase.recipe)
            if phase.recipe.layer_decay != 1.0:
                layer_scales(params, phase.recipe.layer_decay, phase.trainable)
