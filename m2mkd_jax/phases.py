"""Each phase of m2mKD as a record: which chain runs, what is trained, from where, by which recipe.

The phases, in the order of the paper (section 3):

    pt           meta                                   all trained, labels
    mt/i         meta[:i] + module i + meta[i+1:]       module i, labels
    ft           module 0 .. n-1                        all, labels
    m2mkd/i      meta[:i] + student i + meta[i+1:]      student i, labels and the logits of
                                                        meta[:i] + teacher i + meta[i+1:]
    e2e          the network assembled from students    all, labels (+ graph regulariser)
    e2e_scratch  the same network, fresh                all, likewise
    e2e_kd       the same network, fresh                all, likewise, and the teacher's logits
    e2e_upcycled the same network, from the teacher     all, likewise (sparse upcycling, V-MoE)
    fewshot      a trained network                      its head, labels of a few images
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from m2mkd_jax import config as configs
from m2mkd_jax.errors import UserError
from m2mkd_jax.families import family
from m2mkd_jax.models import chain, vit
from m2mkd_jax.records import FRESH, Phase, Source, StageRecord
from m2mkd_jax.specs import teacher_spec

END_TO_END = {
    "e2e": Source("assembled"),
    "e2e_scratch": FRESH,
    "e2e_kd": FRESH,
    "e2e_upcycled": Source("upcycled", "ft"),
}


def job_names(config: ConfigDict) -> list[str]:
    """All jobs of a config, in the order in which they can run."""
    modules = len(config.teacher.depths)
    names = []
    for phase in configs.PHASES:
        if phase not in config.phases or phase in unnecessary(config):
            continue
        if phase in configs.MODULE_PHASES:
            names += [f"{phase}/{i}" for i in range(modules)]
        elif phase.startswith("e2e"):
            names += [phase] + [f"{phase}/{seed}" for seed in range(1, config.e2e_seeds)]
        else:
            names.append(phase)
    return names


def unnecessary(config: ConfigDict) -> set[str]:
    """Phases whose weights `config.init` brings."""
    init, skip = config.init, set()
    if init.meta:
        skip |= {"pt"}
    if init.teacher:
        skip |= {"mt", "ft"} | (set() if "m2mkd" in config.phases else {"pt"})
    if init.students or init.network:
        skip |= {"m2mkd"}
        if not {"e2e_kd", "e2e_upcycled"} & set(config.phases):
            skip |= {"pt", "mt", "ft"}
    return skip


def select(config: ConfigDict, only: str) -> list[str]:
    """The jobs that `--only=a,b` names; a phase's name selects all of its jobs.

    Raises:
        UserError: no such job, or commas alone.
    """
    names = job_names(config)
    chosen: list[str] = []
    words = [word.strip() for word in only.split(",") if word.strip()]
    if only and not words:
        raise UserError(f'--only: "{only}" names no job; jobs: {", ".join(names)}')
    for word in words:
        found = [n for n in names if n == word or n.split("/")[0] == word]
        if not found:
            close = difflib.get_close_matches(word, [*names, *config.phases], 1)
            hint = f'did you mean "{close[0]}"?' if close else f"jobs: {', '.join(names)}"
            raise UserError(f'--only: no job "{word}"; {hint}')
        chosen += found
    return [n for n in names if n in chosen] if chosen else names


def build_phase(config: ConfigDict, job: str) -> Phase:
    """The record of a training job (every job but 'eval')."""
    name, _, index = job.partition("/")
    if name.startswith("e2e"):
        return _end_to_end(config, job, name, int(index or 0))
    if name == "fewshot":
        return _few_shot(config, job)
    return {"pt": _pretraining, "mt": _module_training, "ft": _fine_tuning, "m2mkd": _teaching}[
        name
    ](config, job, *([int(index)] if index else []))


def _vit_records(config: ConfigDict, depths, prefix: str, source: Callable[[int], Source]) -> dict:
    spec, _ = teacher_spec(config)
    last = len(depths) - 1

    return {
        f"{prefix}_{i}": StageRecord(
            _vit_builder(spec, depth, i == 0, i == last), source(i), f"ViT, {depth} block(s)"
        )
        for i, depth in enumerate(depths)
    }


# Equal stages get the same builder, so that chain.abstract traces each of them once.
@functools.cache
def _vit_builder(spec: vit.ViTSpec, depth: int, first: bool, last: bool):
    return lambda rngs: vit.ViTStage(spec, depth, first=first, last=last, rngs=rngs)


def _meta(config: ConfigDict, source=lambda i: Source("job", "pt", f"meta_{i}")) -> dict:
    return _vit_records(config, configs.meta_depths(config), "meta", source)


def _vit_description(config: ConfigDict, depths) -> dict:
    spec, _ = teacher_spec(config)
    return {"kind": "vit", "spec": dataclasses.asdict(spec), "depths": list(depths)}


def _pretraining(config: ConfigDict, job: str) -> Phase:
    recipe, depths = configs.module_recipe(config, "pt"), configs.meta_depths(config)
    stages = _meta(config, lambda i: FRESH)
    names = tuple(stages)
    return Phase(
        job,
        configs.teaching_data(config),
        recipe,
        stages,
        student=names,
        trainable=names,
        rates=tuple(chain.linear_rates(depths, recipe.drop_path)),
        seed=config.seed,
        describe=_vit_description(config, depths),
    )


def _hybrid(config: ConfigDict, index: int, middle: str) -> tuple[str, ...]:
    names = [f"meta_{i}" for i in range(len(config.teacher.depths))]
    return (*names[:index], middle, *names[index + 1 :])


def _module_training(config: ConfigDict, job: str, index: int) -> Phase:
    recipe = configs.module_recipe(config, "mt", index)
    depths, name = config.teacher.depths, f"module_{index}"
    modules = _vit_records(config, depths, "module", lambda i: FRESH)
    chain_names = _hybrid(config, index, name)
    meta = {n: r for n, r in _meta(config).items() if n in chain_names}
    hybrid_depths = list(configs.meta_depths(config))
    hybrid_depths[index] = depths[index]
    if recipe.decay_rule == "published":
        # The published optimizer sees one stage, which does not know which of its parameters
        # the whole model exempts: class token and position embedding are decayed.
        recipe.decay_rule = "published_stage"
    return Phase(
        job,
        configs.teaching_data(config),
        recipe,
        {**meta, name: modules[name]},
        student=chain_names,
        trainable=(name,),
        # Over the whole hybrid, and acting in the frozen meta blocks too.
        rates=tuple(chain.linear_rates(hybrid_depths, recipe.drop_path)),
        seed=config.seed,
        describe={**_vit_description(config, depths), "module": index},
    )


def _fine_tuning(config: ConfigDict, job: str) -> Phase:
    recipe, depths = configs.module_recipe(config, "ft"), config.teacher.depths
    stages = _vit_records(
        config, depths, "module", lambda i: Source("job", f"mt/{i}", f"module_{i}")
    )
    names = tuple(stages)
    return Phase(
        job,
        configs.teaching_data(config),
        recipe,
        stages,
        student=names,
        trainable=names,
        rates=tuple(chain.linear_rates(depths, recipe.drop_path)),
        seed=config.seed,
        describe=_vit_description(config, depths),
    )


def _teacher_modules(config: ConfigDict) -> dict:
    return _vit_records(
        config, config.teacher.depths, "module", lambda i: Source("job", "ft", f"module_{i}")
    )


def _teaching(config: ConfigDict, job: str, index: int) -> Phase:
    recipe, student = configs.module_recipe(config, "m2mkd", index), family(config).student(index)
    pupil, teacher = f"student_{index}", f"module_{index}"
    student_chain, teacher_chain = (_hybrid(config, index, n) for n in (pupil, teacher))
    stages = {n: r for n, r in _meta(config).items() if n in student_chain}
    stages[teacher] = _teacher_modules(config)[teacher]
    stages[pupil] = student.record
    return Phase(
        job,
        configs.teaching_data(config),
        recipe,
        stages,
        student=student_chain,
        trainable=(pupil,),
        # Teacher and meta run without drop-path.
        rates=tuple(student.rates if n == pupil else None for n in student_chain),
        teacher=teacher_chain,
        distillation=config.distillation,
        seed=config.seed,
        describe=student.describe,
    )


def _few_shot(config: ConfigDict, job: str) -> Phase:
    """The network built for as many classes as an episode has; its head is always a fresh one."""
    few = ConfigDict(config.to_dict())
    few.data.classes = config.few_shot.ways
    network = family(few).network(Source("job", config.few_shot.network))
    stage, head = family(few).head
    return Phase(
        job,
        configs.few_shot_data(config),
        configs.module_recipe(config, "fewshot"),
        network.stages,
        student=tuple(network.stages),
        trainable=(stage,),
        head=head,
        seed=config.seed,
        describe=network.describe,
    )


def _end_to_end(config: ConfigDict, job: str, name: str, seed: int) -> Phase:
    network = family(config).network(END_TO_END[name])
    names = tuple(network.stages)
    teacher = _teacher_modules(config) if name == "e2e_kd" else {}
    return Phase(
        job,
        config.data,
        configs.module_recipe(config, "e2e"),
        {**network.stages, **teacher},
        student=names,
        trainable=names,
        rates=network.rates,
        teacher=tuple(teacher),
        distillation=config.distillation if teacher else None,
        regularised=network.regularised,
        # Every end-to-end run of one seed starts from the same fresh network and graph, so that
        # they differ in what the students brought alone.
        seed=config.seed + seed,
        describe=network.describe,
    )
