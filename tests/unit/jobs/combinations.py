"""Combinations of options at tiny sizes: refused at once in one line, or every job of them runs.

"Runs" costs no training: stages are filled with random numbers, the weights of finished jobs are
kept in memory, and of the step there are only shapes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import PHASES, base, renditions_data
from m2mkd_jax.conversion.open_weights import Weights
from m2mkd_jax.data.few_shot import draw_tasks
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.evaluation import evaluation_batch
from m2mkd_jax.jobs.few_shot import Episode
from m2mkd_jax.jobs.plan import Job, Kind, Plan, jobs_to_run
from m2mkd_jax.jobs.run import Run, count_updates, image_source
from m2mkd_jax.jobs.setup import make_program, set_up
from m2mkd_jax.models import chain
from m2mkd_jax.parallel.mesh import make_mesh
from m2mkd_jax.phases.initial_weights import load_stage, load_stages
from m2mkd_jax.phases.phase import Phase, WeightsFrom
from m2mkd_jax.phases.weight_files import job_directory
from tests.e2e import tiny, tiny_vmoe

DENSE = "examples.dense_students:DenseStudents"


def dense() -> ConfigDict:
    """The smallest config of the example's students."""
    config, like = base(DENSE), vmoe()
    for key, value in like.items():
        if key not in ("family", "vmoe"):
            config[key] = value
    fields = config.dense
    fields.patch, fields.width, fields.heads, fields.depths = 8, 8, 2, (1, 1, 2)
    return config


def vmoe() -> ConfigDict:
    """The smallest V-MoE's config, without what excludes other options."""
    config = tiny_vmoe.get_config()
    config.vmoe.keep_stitches = False
    for recipe in config.recipes.values():
        recipe.importance_weight = recipe.load_weight = 0.0
    return config


FAMILIES = {"nac": tiny.get_config, "vmoe": vmoe, "dense": dense}

ALL = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "e2e_kd", "fewshot", "eval")
PHASE_SETS = (
    ALL,
    (*ALL, "e2e_upcycled"),
    ("pt", "mt", "ft", "m2mkd", "e2e", "eval"),
    ("pt", "mt", "ft", "e2e_upcycled"),
    ("pt", "mt", "ft", "e2e_kd", "eval"),
    ("e2e_scratch", "fewshot", "eval"),
    ("m2mkd", "e2e"),
    ("e2e",),
    ("eval",),
    ("fewshot",),
    ("pt",),
)
# key -> values to try; a key of a recipe stands for one phase's, {dir} is filled in.
COMMON: dict[str, tuple[Any, ...]] = {
    "init.meta": ("{given}", "{other}", "/nowhere"),
    "init.teacher": ("{given}", "{other}"),
    "init.students": ("{given}", "{other}"),
    "init.network": ("{given}", "{other}"),
    "e2e_seeds": (2,),
    "seed": (3,),
    "precision": ("bfloat16",),
    "distillation.kind": ("none", "hard", "soft"),
    "distillation.alpha": (0.0, 1.0),
    "regulariser.kind": ("none", "hinge", "stochastic_block", "gaussian_mixture"),
    "regulariser.components": (3, 500),
    "regulariser.clusters": (4, 3),
    "evaluation.every": (0.0, 0.5, 1.0),
    "evaluation.sampled": (True,),
    "evaluation.renditions": (("imagenet_r",), ("nothing",)),
    "evaluation.batch": (7,),
    "teaching_data.name": ("digits", "digitz"),
    "teaching_data.image_size": (16, 32, 20),
    "teaching_data.classes": (10, 7),
    "data.image_size": (32, 20),
    "data.repeated_augmentation": (3,),
    "data.train_images": (0, 40, 12),
    "data.augment.erase": (0.25,),
    "data.augment.crop": ("random_resized", "none", "shrug"),
    "teacher.depths": ((2, 1, 1), (1, 1), (1,), (1, 1, 1, 1), (1, 1, 2)),
    "teacher.meta_depths": ((1, 1, 1), (2, 1, 1), (1, 1)),
    "teacher.patch": (4, 5, 0),
    "teacher.width": (8, 24),
    "teacher.heads": (4, 3),
    "teacher.variant": ("vit_base_patch16_224", "vit_bass"),
    "teacher.remat": ("always",),
    "teacher.qkv_bias": (False,),
    "teacher.options": ({"a": 1},),
    "few_shot.network": ("e2e_scratch", "e2e/1", "e2e/x", "e2e/-1", "pt", "e2e_kd"),
    "few_shot.selection": ("published", "all"),
    "few_shot.ways": (3, 10, 11, 1),
    "few_shot.shots": (2, 30),
    "few_shot.seed": (0,),
    "few_shot.data.image_size": (32,),
    "few_shot.data.classes": (12,),
    "few_shot.data.repeated_augmentation": (3,),
    "mesh.expert": (2, -1),
    "mesh.data": (2,),
    "mesh.fsdp": (True,),
    "family": ("nac", "vmoe"),
}
RECIPE: dict[str, tuple[Any, ...]] = {
    "optimizer": ("sgd",),
    "schedule": ("published", "published_nac"),
    "decay_rule": ("published_stage", "all", "none"),
    "accumulate": (2, 3, 4),
    "batch": (8, 15, 1, 400),
    "epochs": (0.05, 0.5, 0.0),
    "warmup_epochs": (1.0, 9.0),
    "ema": (0.9,),
    "clip": (1.0,),
    "drop_path": (0.1,),
    "mixup": (0.8,),
    "cutmix": (1.0,),
    "smoothing": (0.0,),
    "stop_within": (0.05,),
    "importance_weight": (0.1,),
    "load_weight": (0.1,),
    "lr_per": (512,),
    "scale_min_lr": (True,),
    "modules": (
        {"0": {"epochs": 1}},
        {"1": {"batch": 8, "accumulate": 2}},
        {"2": {"drop_path": 0.1}},
        {"1": {"batch": 9}},
        {"1": {"stop_within": 0.1}},
        {"0": {"modules": {}}},
        {"3": {"lr": 1.0}},
        {"0": {"ema": 0.5, "optimizer": "sgd"}},
        {"0": {"optimizer": "adam"}},
    ),
}
OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "nac": {
        "nac.prior": ("none", "barabasi-albert", "complete", "hypercube", "grid", "barbell"),
        "nac.options": ({}, {"m": 3}, {"m": "a"}, {"dim": 2}, {"p": 0.2}),
        "nac.output": ("first_slot", "pooling"),
        "nac.pooling": ("vanilla", "gumbel"),
        "nac.state_dim": (10, 4, 3, 24),
        "nac.code_dim": (8,),
        "nac.signature_dim": (5,),
        "nac.heads": (1, 3),
        "nac.head_dim": (5,),
        "nac.input_latents": (1, 6),
        "nac.mediator_latents": (1, 9, 16),
        "nac.output_latents": (1,),
        "nac.iterations": (2, 4),
        "nac.share_propagators": (True,),
        "nac.share_ffn": (True,),
        "nac.codes_per_iteration": (True,),
        "nac.seeder": (False,),
        "nac.read_in_residual": (False,),
        "nac.input_output": (False,),
        "nac.persistent_inputs": (False,),
        "nac.truncation": (None, 0.5),
        "nac.truncation_implementation": ("masked",),
        "nac.stochastic_kernel": (False,),
        "nac.modulation": ("l2", "none", "sigmoid", "tanh", "softmax"),
        "nac.tokenizer_depths": ((1,), (1, 1, 1), (0, 1), (), (1, 1, 1, 1)),
        "nac.position_dim": (1, 5),
        "nac.stitch_dim": (16, 8),
        "nac.geglu": (False,),
        "nac.qkv_bias": (True,),
        "nac.ffn_capacity": (0.01, 1.0),
        "nac.layer_scale": (0.0,),
        "nac.code_noise": (0.0,),
        "nac.add_one": (False,),
        "nac.remat": ("always",),
    },
    "vmoe": {
        "vmoe.router": ("published", "vmoe", "expert_choice"),
        "vmoe.dispatch": ("dropless", "capacity"),
        "vmoe.top_k": (1, 3, 5),
        "vmoe.experts": (1, 2, 6),
        "vmoe.moe_pos": ((), (0,), (3,), (4,), (1, 1)),
        "vmoe.depths": ((1, 1, 1), (2, 2), (1, 2, 1), (4,)),
        "vmoe.keep_stitches": (True,),
        "vmoe.group_images": (4, 8, 5),
        "vmoe.capacity_factor": (0.1, 8.0),
        "vmoe.noise": (0.0,),
        "vmoe.width": (8, 24),
        "vmoe.heads": (4, 3),
        "vmoe.patch": (4, 16),
        "vmoe.qkv_bias": (False,),
        "vmoe.eps": (1e-5,),
        "vmoe.remat": ("always",),
        "vmoe.variant": ("vit_base_patch16_224",),
    },
    "dense": {
        "dense.depths": ((1, 1, 1), (1, 1), (1,), ()),
        "dense.width": (16, 9),
        "dense.patch": (4, 16, 0),
        "dense.heads": (1,),
    },
}


def draw(family: str, seed: int) -> tuple[ConfigDict, dict[str, Any]]:
    """A tiny config with a few random changes, and those changes by key.

    Args:
        family: one of FAMILIES.
        seed: of the draw.
    """
    rng, config = random.Random(f"{family} {seed}"), FAMILIES[family]()
    options = {**COMMON, **OWN[family]}
    for name in config.recipes:
        options |= {f"recipes.{name}.{key}": values for key, values in RECIPE.items()}
    phases = rng.choice(PHASE_SETS)
    if rng.random() < 0.2:
        phases = tuple(p for p in PHASES if rng.random() < 0.5) or ("pt",)
    changes: dict[str, Any] = {"phases": phases}
    if "pt" not in phases and rng.random() < 0.7:  # mostly refused otherwise
        names = ("network",) if "m2mkd" not in phases else ("meta", "teacher")
        changes |= {f"init.{name}": "{given}" for name in names}
    # A third of the keys drawn are the family's own, which are fewer than those of recipes.
    pools = (list(COMMON), list(OWN[family]), list(options))
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))):
        key = rng.choice(rng.choice(pools))
        changes[key] = rng.choice(options[key])
    if "fewshot" in phases:
        few_shot(config)
    return config, changes


def few_shot(config: ConfigDict) -> None:
    """Makes the config's few-shot episodes tiny."""
    few, recipe = config.few_shot, config.recipes.fewshot
    few.data.name, few.data.classes, few.ways, few.episodes = "digits", 10, 4, 2
    few.data.train_images, few.data.test_images = 160, 100
    recipe.batch, recipe.epochs = 4, 2
    recipe.importance_weight = recipe.load_weight = 0.0


def apply(config: ConfigDict, changes: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """Makes the changes; `places` are directories to put in place of {name}."""
    with config.unlocked(), config.ignore_type():
        for key, value in changes.items():
            *path, last = key.split(".")
            group = config
            for name in path:
                group = group[name]
            group[last] = value.format(**places) if isinstance(value, str) else value


def random_stage(build: Callable, name: str, seed: int = 0) -> dict[str, dict]:
    """{"params", "fixed"} of random numbers in the shapes of a stage."""
    parts, rng = chain.abstract(build), np.random.default_rng([seed, *name.encode()])
    trees = {"params": parts.params, "fixed": parts.fixed}
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), trees)


class Memory:
    """Finished weights by directory, in place of files."""

    def __init__(self) -> None:
        self.weights: dict[str, Weights] = {}
        self.seen: set[str] = set()

    def finish(self, workdir: Path, phase: Phase) -> None:
        """Leaves random weights of a phase, as a finished job does."""
        directory = job_directory(workdir, phase.job) / "weights"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "description.json").write_text("{}")
        stages = {n: random_stage(phase.stages[n].build, n) for n in phase.trainable}
        trees = {n: {k: tree for k, tree in s.items() if tree} for n, s in stages.items()}
        self.weights[str(directory)] = Weights({**phase.describe}, trees)

    def open(self, path: str | Path, *args: Any, **kwargs: Any) -> Weights:
        """In place of conversion.open_weights."""
        return self.weights[str(path)]

    def run(self, config: ConfigDict, workdir: Path) -> Plan:
        """Every job of a config in turn, up to its compiled step.

        Raises:
            UserError: before any of them, where the config is refused.
        """
        mesh = make_mesh(data=config.mesh.data, expert=config.mesh.expert)
        plan = checks.validate(config, mesh.size)
        todo = jobs_to_run(plan, workdir)
        checks.validate_jobs(plan, workdir, mesh, todo)
        try:
            for name in plan.names:
                job = plan.job(name)
                {Kind.TRAINING: self._train, Kind.FEW_SHOT: _episode, Kind.EVALUATION: _measure}[
                    job.kind
                ](Run(config, workdir, mesh), job)
        except UserError as error:
            raise AssertionError(f"{name} is refused too late: {error}") from error
        return plan

    def _train(self, run: Run, job: Job) -> None:
        phase = job.phase
        stages, _ = load_stages(run.config, run.workdir, phase)
        updates = count_updates(phase)
        key = json.dumps([run.config.regulariser.to_dict(), job.inputs["config"]], sort_keys=True)
        if key not in self.seen:
            setup = set_up(run.config, phase, stages, updates_per_epoch=updates)
            step(setup, phase, phase.data)
            self.seen.add(key)
        self.finish(run.workdir, phase)


def install(monkeypatch: Any) -> Memory:
    """A memory in place of weights in files, and random stages in place of fresh ones."""
    memory = Memory()

    def fresh(config: ConfigDict, spec: Any, name: str, seed: int, shardings: Any = None) -> dict:
        return random_stage(spec.build, name, seed)

    monkeypatch.setattr("m2mkd_jax.phases.weight_files.open_weights", memory.open)
    monkeypatch.setattr("m2mkd_jax.phases.initial_weights.fresh_stage", fresh)
    # A step whose memory is to be checked is compiled, even where only its shapes are asked for.
    monkeypatch.setattr("m2mkd_jax.jobs.fitting.device_memory", lambda: 0)
    return memory


def step(setup: Any, phase: Phase, data: ConfigDict) -> None:
    """The shapes of a training step and of an evaluation."""
    images, size = phase.recipe.batch // phase.recipe.accumulate, data.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }
    state = setup.abstract_state
    after, metrics = jax.eval_shape(setup.make_step(data), state, setup.abstract_frozen, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == () and setup.rate(0) >= 0


def _episode(run: Run, job: Job) -> None:
    episode = Episode(run, job.phase)
    assert episode.steps > 0
    step(episode._setup, job.phase, episode._data)
    sources = (image_source(job.phase.data, split) for split in ("train", "test"))
    assert len(list(draw_tasks(*sources, run.config.few_shot))) == run.config.few_shot.episodes


def _measure(run: Run, job: Job) -> None:
    for phase in job.phases:
        stages = {
            name: load_stage(
                run.config,
                run.workdir,
                WeightsFrom("job", phase.job, name),
                chain.abstract(phase.stages[name].build),
            )
            for name in phase.student
        }
        program, data = make_program(run.config, phase), phase.data
        images = evaluation_batch(run.config, len(image_source(data, "test")), run.mesh)
        x = jax.ShapeDtypeStruct((images, data.image_size, data.image_size, 3), jnp.float32)
        params = {name: stage["params"] for name, stage in stages.items()}
        key = jax.random.key(0)
        logits = jax.eval_shape(program.logits, params, stages, x, key)
        assert logits.shape == (images, data.classes)
    for name in run.config.evaluation.renditions:
        image_source(renditions_data(run.config, name), "test")
