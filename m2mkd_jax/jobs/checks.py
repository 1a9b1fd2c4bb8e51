"""Everything that is refused before any work: first the config, then each job that is to run."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import (
    DETECTION_PHASES,
    MODULE_PHASES,
    PHASES,
    RECIPE,
    RECIPES,
    few_shot_data,
    module_recipe,
    recipe_name,
    teaching_data,
)
from m2mkd_jax.config.values import check_value, check_values
from m2mkd_jax.data.augment import Augmentation
from m2mkd_jax.data.channels import check_channels
from m2mkd_jax.data.class_lists import PARENTS
from m2mkd_jax.data.few_shot import SELECTIONS
from m2mkd_jax.errors import UserError, did_you_mean, located, require, require_known
from m2mkd_jax.evaluate.corruptions import KINDS as CORRUPTIONS
from m2mkd_jax.jobs.changes import check_finished, check_same_config
from m2mkd_jax.jobs.data_checks import (
    check_classes,
    check_normalisation,
    check_same_images,
    missing_data,
)
from m2mkd_jax.jobs.detection_checks import check_detection
from m2mkd_jax.jobs.distillation_checks import check_distillation
from m2mkd_jax.jobs.few_shot import check_episodes
from m2mkd_jax.jobs.kept_targets import check_disk
from m2mkd_jax.jobs.plan import Job, Kind, Plan
from m2mkd_jax.jobs.recipe_checks import check_recipe_choices, check_trained
from m2mkd_jax.jobs.run import Run, count_updates, image_source
from m2mkd_jax.jobs.shape_checks import check_shapes
from m2mkd_jax.jobs.trackers import tracker_class
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import partition
from m2mkd_jax.phases.build import END_TO_END, TEACHER_STAGES
from m2mkd_jax.phases.detection import DENSE
from m2mkd_jax.phases.families import StudentFamily, students, teacher
from m2mkd_jax.phases.initial_weights import check_given, check_measured
from m2mkd_jax.phases.phase import FRESH, StageSpec
from m2mkd_jax.phases.weight_files import init_path, weights_directory
from m2mkd_jax.train.optimizer import DECAY_RULES, OPTIMIZERS
from m2mkd_jax.train.schedule import SCHEDULES

REGULARISERS = ("none", "hinge", "stochastic_block", "gaussian_mixture")
PRECISIONS = ("auto", "float32", "bfloat16")


def validate(config: ConfigDict, devices: int = 1) -> Plan:
    """The jobs of a config that can run.

    Args:
        config: from a config file.
        devices: how many devices the batch is cut over.

    Raises:
        UserError: one line naming the key that cannot be as it is.
    """
    check_config(config, devices)
    plan = Plan(config)
    for name in plan.names:
        job = plan.job(name)
        require(
            job.kind is not Kind.EVALUATION or bool(job.phases),
            f'config.phases: there is no network for "{name}" to measure; set config.init.network, '
            "or add e2e or e2e_scratch",
        )
    check_shapes(plan)
    check_trained(plan)
    return plan


def validate_jobs(
    plan: Plan,
    workdir: Path,
    mesh: Mesh,
    todo: Collection[str],
    stale: Collection[str] = (),
    extended: Collection[str] = (),
) -> None:
    """Refuses what would end one of the jobs early: data, weights, devices, another run's results.

    Args:
        plan: of `validate`.
        workdir: directory of the run.
        mesh: the devices.
        todo: the jobs that are to run.
        stale: jobs that start again, whatever their directories hold.
        extended: jobs that train for more epochs.

    Raises:
        UserError: one line that says what is wrong and where.
    """
    check_same_config(plan, workdir, plan.names, stale, extended)
    if missing := missing_data(plan, todo):
        raise UserError("; ".join(missing))
    check_weights(plan, workdir, todo, [*stale, *extended])
    _check_images(plan, todo)
    check_same_images(plan, workdir, todo, stale)
    check_classes(plan, workdir, todo)
    _check_partition(plan, todo, mesh)
    training = [plan.job(name) for name in todo if plan.job(name).kind is Kind.TRAINING]
    check_disk(Run(plan.config, workdir, mesh), training)


def check_config(config: ConfigDict, devices: int = 1) -> None:
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
        require_known(phase, PHASES, "phases")
    require_known(config.regulariser.kind, REGULARISERS, "regulariser.kind")
    require_known(config.precision, PRECISIONS, "precision")
    for name in config.evaluation.renditions:
        require_known(name, PARENTS, "evaluation.renditions")
        message = f"config.evaluation.renditions: {name} needs a network of {PARENTS[name]}"
        require(config.data.name == PARENTS[name], message)
    for name in config.trackers:
        tracker_class(name)
    batch = config.evaluation.batch
    require(
        not config.evaluation.sampled or batch % devices == 0,
        f"config.evaluation.batch is {batch}; config.evaluation.sampled draws noise batch by batch,"
        f" so that it must be a multiple of the {devices} devices",
    )
    for kind in config.evaluation.corruptions:
        require_known(kind, (*CORRUPTIONS, "all"), "evaluation.corruptions")
    for name in RECIPES:
        if any(recipe_name(phase) == name for phase in config.phases):
            _check_recipe(config, name, devices)
    require(
        not config.init.fresh_head or bool(config.init.network or config.init.modules),
        "config.init.fresh_head: there is nothing to take the rest from; set config.init.modules or"
        " config.init.network",
    )
    _check_networks(config, devices)
    check_distillation(config)
    check_detection(config, devices)


def _check_recipe(config: ConfigDict, name: str, devices: int) -> None:
    modules = teacher(config).modules
    for index, changes in config.recipes[name].modules.items():
        where = f"recipes.{name}.modules.{index}"
        require(isinstance(changes, ConfigDict), f"config.{where} is {changes!r}; not a dict")
        require(name in MODULE_PHASES, f"config.{where}: {name} has no modules")
        require(
            isinstance(index, str),
            f"config.recipes.{name}.modules: {index!r} must be a string, such as "
            "{'0': {'epochs': 2}}",
        )
        require(
            index in map(str, range(modules)),
            f"config.{where}: there are {modules} modules, 0 to {modules - 1}",
        )
        for key in changes:
            known = [k for k in RECIPE if k != "modules"]
            require(key in known, f"config.{where}.{key} is unknown; {did_you_mean(key, known)}")
            check_value(f"{where}.{key}", changes[key], RECIPE[key])
    for index in [None, *range(modules)] if name in MODULE_PHASES else [None]:
        recipe = module_recipe(config, name, index)
        where = f"config.recipes.{name}"
        require_known(recipe.optimizer, OPTIMIZERS, f"recipes.{name}.optimizer")
        require_known(recipe.schedule, SCHEDULES, f"recipes.{name}.schedule")
        require_known(recipe.decay_rule, DECAY_RULES, f"recipes.{name}.decay_rule")
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
        check_recipe_choices(config, name, recipe)


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


def _check_few_shot(config: ConfigDict, family: StudentFamily) -> None:
    few, data = config.few_shot, few_shot_data(config)
    _ = family.head  # there is one
    require_known(few.selection, SELECTIONS, "few_shot.selection")
    phase = few.network.partition("/")[0]
    require_known(phase, list(END_TO_END), "few_shot.network")
    require(
        re.fullmatch(f"{phase}(/[1-9][0-9]*)?", few.network) is not None,
        f'config.few_shot.network: "{few.network}" is no job; the repetitions of {phase} are '
        f"{phase}/1, {phase}/2, ...",
    )
    with located("config.few_shot.data"):
        check_channels(data)
        Augmentation.from_config(data)
    require(
        data.image_size == config.data.image_size,
        f"config.few_shot.data.image_size is {data.image_size}; the network takes "
        f"{config.data.image_size}",
    )
    require(
        data.channels == config.data.channels,
        f"config.few_shot.data.channels is {data.channels}; the network takes "
        f"{config.data.channels}",
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


def _check_network(config: ConfigDict, family: StudentFamily) -> None:
    """Refuses a regulariser without a graph, and stages with names that the teacher's have."""
    network, kind = family.network(FRESH), config.regulariser.kind
    require(
        kind == "none" or network.regulariser is not None,
        f'config.regulariser.kind is {kind}; the network of config.family="{config.family}" has no '
        'graph, only "none" fits',
    )
    for name in network.stages:
        require(
            not name.startswith(TEACHER_STAGES),
            f"config.family: a stage of the network is called {name}, as the teacher's are",
        )


def _assembles(config: ConfigDict) -> bool:
    """Whether a network is put together from students, by this run or by one before it."""
    measured = config.few_shot.network.partition("/")[0] if "fewshot" in config.phases else ""
    return "e2e" in {*config.phases, measured} and not config.init.network


TAUGHT = {"pt", "mt", "ft", "m2mkd", "e2e_kd", "e2e_upcycled"}  # phases with a teacher


def _check_networks(config: ConfigDict, devices: int) -> None:
    phases = set(config.phases)
    # A network is assembled from students that this run teaches, or one before it has taught.
    teaching = bool(TAUGHT & phases) or (_assembles(config) and not config.init.students)
    detects = bool(phases & set(DETECTION_PHASES))
    teaching |= detects and config.detection.network == DENSE
    for key in ("data", "teaching_data") if teaching else ("data",):
        data = teaching_data(config) if key == "teaching_data" else config.data
        sized = data.image_size > 0 and data.classes > 1
        require(sized, f"config.{key} needs image_size and classes")
        with located(f"config.{key}"):
            check_channels(data)
            Augmentation.from_config(data)
        require(
            data.channels == config.data.channels,
            f"config.teaching_data.channels is {data.channels} and config.data.channels "
            f"{config.data.channels}: students take the images that their network takes",
        )
    whole, family = teacher(config), students(config)
    if teaching:
        whole.check()
    family.check(teaching, devices)
    _check_network(config, family)
    if "fewshot" in phases:
        _check_few_shot(config, family)
    if "m2mkd" in phases or _assembles(config):
        require(
            not teaching or whole.modules == family.modules,
            f"config.teacher.depths names {whole.modules} modules; the student needs "
            f"{family.modules}" + (f" ({family.parts})" if family.parts else ""),
        )
    if "e2e_upcycled" in phases:
        family.check_upcycling()
    for phase in ("e2e_kd", "e2e_upcycled"):
        taught = teaching_data(config)
        require(
            phase not in phases
            or (taught.classes, taught.image_size) == (config.data.classes, config.data.image_size),
            f"config.phases: {phase} needs a teacher of the same task; it was taught "
            f"{taught.classes} classes at {taught.image_size} px, the network learns "
            f"{config.data.classes} at {config.data.image_size} px",
        )


def check_weights(
    plan: Plan, workdir: Path, todo: Collection[str], again: Collection[str] = ()
) -> None:
    """Refuses a job whose weights neither exist nor are about to be made, or do not fit.

    Args:
        plan: of the run.
        workdir: its directory.
        todo: the jobs that are to run.
        again: jobs that start again or go on, whose results are dropped before.

    Raises:
        UserError: one line that names the job.
    """
    jobs = [plan.job(name) for name in todo]
    for job in jobs:
        for needed in job.needs:
            if needed in again and needed not in todo:
                raise UserError(
                    f"--only leaves out {needed}, which is done again and which {job.name} needs; "
                    "name it there too"
                )
            if needed not in todo:
                weights_directory(plan.config, workdir, needed)
                if not init_path(plan.config, needed)[1]:
                    check_finished(workdir, needed)
    training = [job.phase for job in jobs if job.kind is Kind.TRAINING]
    check_given(plan.config, workdir, training)
    for job in jobs:
        for name, stages in _measured(plan.config, job).items():
            if name not in todo:
                check_measured(plan.config, workdir, name, stages)
    check_normalisation(plan, workdir, todo)


def _measured(config: ConfigDict, job: Job) -> dict[str, dict[str, StageSpec]]:
    """Stages of the finished networks that a job measures or gives new heads, by their jobs."""
    if job.kind is Kind.FEW_SHOT:
        return {config.few_shot.network: students(config).network(FRESH).stages}
    if job.kind is Kind.EVALUATION:
        return {p.job: {name: p.stages[name] for name in p.student} for p in job.phases}
    return {}


def _check_partition(plan: Plan, todo: Iterable[str], mesh: Mesh) -> None:
    """Refuses a job whose experts cannot be dealt over the mesh."""
    if mesh.shape["expert"] == 1:
        return
    for job in (plan.job(name) for name in todo):
        for spec in job.phase.stages.values() if job.kind is not Kind.EVALUATION else ():
            partition.shardings(mesh, chain.abstract(spec.build).params, plan.config.mesh.fsdp)


def _check_images(plan: Plan, todo: Iterable[str]) -> None:
    """Opens the images of all jobs, to refuse at once what a late job could not read.

    Images that are not those of the config, or fewer than a batch, are refused too.
    """
    for job in (plan.job(name) for name in todo):
        if job.kind is Kind.FEW_SHOT:
            check_episodes(plan.config, job.phase)
            continue
        for phase in job.phases:
            if job.kind is Kind.TRAINING:
                count_updates(phase)
            with located(f"config.{phase.data_key}"):
                image_source(phase.data, "validation")
                if job.kind is Kind.EVALUATION:
                    image_source(phase.data, "test")
