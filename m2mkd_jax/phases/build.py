"""Each phase of m2mKD as a value: which chain runs, what is trained, from where, by which recipe.

The phases, in the order of the paper (section 3):

    pt           meta                                   all trained, labels
    mt/i         meta[:i] + module i + meta[i+1:]       module i, labels
    ft           module 0 .. n-1                        all, labels
    m2mkd/i      meta[:i] + student i + meta[i+1:]      student i, labels and the logits of
                                                        meta[:i] + teacher i + meta[i+1:]
                                                        (config.distillation: another teacher)
    e2e          the network assembled from students    all, labels (+ graph regulariser)
    e2e_scratch  the same network, fresh                all, likewise
    e2e_kd       the same network, fresh                all, likewise, and the teacher's logits
    e2e_upcycled the same network, from the teacher     all, likewise (sparse upcycling, V-MoE)
    detect       a detector on the network of e2e       all, the five losses of Mask R-CNN
    detect_scratch  the same detector, fresh            all, likewise
    fewshot      a trained network                      its head, labels of a few images
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.config import defaults
from m2mkd_jax.models import chain
from m2mkd_jax.phases.detection import detection_phase
from m2mkd_jax.phases.families import students, teacher
from m2mkd_jax.phases.phase import FRESH, Phase, StageSpec, WeightsFrom, alpha_changes

TEACHER_STAGES = ("meta_", "module_")  # what the names of the teacher's stages begin with
END_TO_END = {
    "e2e": WeightsFrom("assembled"),
    "e2e_scratch": FRESH,
    "e2e_kd": FRESH,
    "e2e_upcycled": WeightsFrom("upcycled", "ft"),
}


def build_phase(config: ConfigDict, job: str) -> Phase:
    """The phase of a job that trains (every job but 'eval').

    Raises:
        UserError: the config describes no such networks.
    """
    name, _, index = job.partition("/")
    if name in defaults.DETECTION_PHASES:
        return detection_phase(config, job)
    if name in END_TO_END:
        return _end_to_end(config, job, name, int(index or 0))
    if name in defaults.MODULE_PHASES:
        build_module = {"mt": _module_training, "m2mkd": _distillation}[name]
        return build_module(config, job, int(index))
    return {"pt": _pretraining, "ft": _fine_tuning, "fewshot": _few_shot}[name](config, job)


def _common(config: ConfigDict, job: str, index: int | None = None, **sections: Any) -> dict:
    """The fields that all phases have.

    Args:
        config: of the run.
        job: its name.
        index: of the module, whose own recipe it is.
        sections: values of the config, beside data, recipe and seed, that decide the result.
    """
    phase = job.partition("/")[0]
    recipe_key = defaults.recipe_name(phase)
    data_key, data = "data", config.data
    if phase not in END_TO_END:
        data_key, data = defaults.teaching_data_key(config), defaults.teaching_data(config)
    recipe = defaults.module_recipe(config, phase, index)
    seed = config.seed
    return {
        "job": job,
        "data": data,
        "data_key": data_key,
        "recipe": recipe,
        "recipe_key": f"recipes.{recipe_key}",
        "seed": seed,
        "depends_on": {
            "seed": seed,
            "precision": config.precision,
            "evaluation": {"sampled": config.evaluation.sampled}
            | ({"every": config.evaluation.every} if recipe.stop_within else {}),
            data_key: data,
            f"recipes.{recipe_key}": defaults.own_recipe(config, phase, index),
            **sections,
        },
    }


def _probe(recipe: ConfigDict, stage: str, path: tuple[str, ...]) -> None:
    """Lets a linear probe's recipe train the layer at `path` of the last stage alone."""
    if recipe.linear_probe:
        recipe.train_only = ("/".join((stage, *path, "*")),)


def _meta(
    config: ConfigDict, weights: Callable[[int], WeightsFrom] | None = None
) -> dict[str, StageSpec]:
    """The meta model's stages by name, by default with the weights that pt trains."""
    whole = teacher(config)
    return {
        f"meta_{i}": whole.meta(i, weights(i) if weights else WeightsFrom("job", "pt", f"meta_{i}"))
        for i in range(whole.modules)
    }


def _modules(config: ConfigDict, weights: Callable[[int], WeightsFrom]) -> dict[str, StageSpec]:
    """The teacher's stages by name."""
    whole = teacher(config)
    return {f"module_{i}": whole.module(i, weights(i)) for i in range(whole.modules)}


def _fine_tuned(config: ConfigDict) -> dict[str, StageSpec]:
    return _modules(config, lambda i: WeightsFrom("job", "ft", f"module_{i}"))


def _hybrid(config: ConfigDict, index: int, middle: str) -> tuple[str, ...]:
    """Names of the chain that is the meta model but for the stage `middle` at `index`."""
    names = [f"meta_{i}" for i in range(teacher(config).modules)]
    return (*names[:index], middle, *names[index + 1 :])


def _meta_fields(config: ConfigDict) -> dict[str, Any]:
    """What of config.teacher the meta model depends on; of its depths, only how many there are."""
    whole, fields = teacher(config), config.teacher.to_dict()
    return {**fields, "depths": f"{whole.modules} modules", "meta_depths": whole.meta_depths}


def _pretraining(config: ConfigDict, job: str) -> Phase:
    common, whole = _common(config, job, teacher=_meta_fields(config)), teacher(config)
    stages = _meta(config, lambda i: FRESH)
    names = tuple(stages)
    _probe(common["recipe"], names[-1], ("head",))
    return Phase(
        **common,
        stages=stages,
        student=names,
        trainable=names,
        rates=tuple(chain.linear_rates(whole.meta_depths, common["recipe"].drop_path)),
        describe=whole.describe(whole.meta_depths),
    )


def _module_training(config: ConfigDict, job: str, index: int) -> Phase:
    whole, name = teacher(config), f"module_{index}"
    common = _common(config, job, index, teacher=config.teacher)
    recipe = common["recipe"]
    chain_names = _hybrid(config, index, name)
    hybrid_depths = list(whole.meta_depths)
    hybrid_depths[index] = whole.depths[index]
    if recipe.decay_rule == "published":
        # The published optimizer sees one stage, which does not know which of its parameters
        # the whole model exempts: class token and position embedding are decayed.
        recipe.decay_rule = "published_stage"
    return Phase(
        **common,
        stages={
            **{n: stage for n, stage in _meta(config).items() if n in chain_names},
            name: whole.module(index, FRESH),
        },
        student=chain_names,
        trainable=(name,),
        # Over the whole hybrid, and acting in the frozen meta blocks too.
        rates=tuple(chain.linear_rates(hybrid_depths, recipe.drop_path)),
        describe={**whole.describe(whole.depths), "module": index},
    )


def _fine_tuning(config: ConfigDict, job: str) -> Phase:
    common, whole = _common(config, job, teacher=config.teacher), teacher(config)
    stages = _modules(config, lambda i: WeightsFrom("job", f"mt/{i}", f"module_{i}"))
    names = tuple(stages)
    _probe(common["recipe"], names[-1], ("head",))
    return Phase(
        **common,
        stages=stages,
        student=names,
        trainable=names,
        rates=tuple(chain.linear_rates(whole.depths, common["recipe"].drop_path)),
        describe=whole.describe(whole.depths),
    )


def _distillation(config: ConfigDict, job: str, index: int) -> Phase:
    family = students(config)
    student_module = family.student(index)
    imitated = _imitated(config, index)
    student, module = f"student_{index}", f"module_{imitated}"
    student_chain, teacher_chain = (_hybrid(config, index, n) for n in (student, module))
    stages = {n: stage for n, stage in _meta(config).items() if n in student_chain}
    source = f"mt/{imitated}" if config.distillation.teach_from == "mt" else "ft"
    stages[module] = teacher(config).module(imitated, WeightsFrom("job", source, module))
    stages[student] = student_module.stage
    return Phase(
        **_common(
            config,
            job,
            index,
            **_family_fields(config),
            teacher=config.teacher,
            distillation=_loss_fields(config) | _changed_fields(config, index),
        ),
        stages=stages,
        student=student_chain,
        trainable=(student,),
        # Teacher and meta run without drop-path.
        rates=tuple(student_module.rates if n == student else None for n in student_chain),
        teacher=teacher_chain,
        distillation=config.distillation,
        views=config.distillation.views,
        describe=student_module.describe,
    )


def _family_fields(config: ConfigDict) -> dict[str, Any]:
    """What of a config the students and their network depend on."""
    section = students(config).section
    fields = {"family": config.family}
    return fields | ({section: config[section]} if section else {})


def _loss_fields(config: ConfigDict) -> dict[str, Any]:
    """What of config.distillation the loss depends on."""
    chosen = config.distillation
    fields = {name: chosen[name] for name in ("kind", "alpha", "temperature")}
    if alpha_changes(chosen):
        fields["alpha_end"] = chosen.alpha_end
    return fields


def _imitated(config: ConfigDict, index: int) -> int:
    """The teacher module that student `index` imitates."""
    order = config.distillation.teacher_of
    return order[index] if order else index


def _changed_fields(config: ConfigDict, index: int) -> dict[str, Any]:
    """What else of config.distillation m2mkd depends on; {}: as published."""
    chosen, imitated = config.distillation, _imitated(config, index)
    fields = {"views": chosen.views} if chosen.views else {}
    fields |= {"teach_from": chosen.teach_from} if chosen.teach_from != "ft" else {}
    if chosen.token_weight and index < teacher(config).modules - 1:
        fields["token_weight"] = chosen.token_weight
    return fields | ({"teacher_of": imitated} if imitated != index else {})


def _few_shot(config: ConfigDict, job: str) -> Phase:
    """The network built for as many classes as an episode has; its head is always a fresh one."""
    few = ConfigDict(config.to_dict())
    few.data.classes = config.few_shot.ways
    family = students(few)
    network = family.network(WeightsFrom("job", config.few_shot.network))
    stage, head = family.head
    common = _common(config, job, **_family_fields(config), few_shot=config.few_shot)
    return Phase(
        **{**common, "data": defaults.few_shot_data(config), "data_key": "few_shot.data"},
        stages=network.stages,
        student=tuple(network.stages),
        trainable=(stage,),
        head=head,
        describe=network.describe,
    )


def _end_to_end(config: ConfigDict, job: str, name: str, seed: int) -> Phase:
    weights = END_TO_END[name]
    given = bool(config.init.network) and weights.kind == "assembled"
    network = students(config).network(weights)
    stages = network.stages
    if given:
        stages = {
            n: dataclasses.replace(stage, weights=WeightsFrom("init", tree=n))
            for n, stage in stages.items()
        }
    names = tuple(stages)
    imitated = _fine_tuned(config) if name == "e2e_kd" else {}
    sections = _family_fields(config) | {"regulariser": config.regulariser}
    if imitated:
        sections |= {"distillation": _loss_fields(config), "teacher": config.teacher}
    common = _common(config, job, **sections)
    if common["recipe"].linear_probe:
        _probe(common["recipe"], *students(config).head)
    return Phase(
        # Every end-to-end run of one seed starts from the same fresh network and graph, so that
        # they differ in what the students brought alone.
        **{**common, "seed": config.seed + seed},
        stages={**stages, **imitated},
        student=names,
        trainable=names,
        rates=network.rates,
        teacher=tuple(imitated),
        distillation=config.distillation if imitated else None,
        regulariser=network.regulariser,
        regulariser_fitted=network.regulariser_fitted,
        describe=network.describe,
    )
