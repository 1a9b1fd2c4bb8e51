"""What a job is made of: stages by name, where their weights come from, and the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.losses import Program
from m2mkd_jax.models import chain


@dataclass(frozen=True)
class Source:
    """Where a stage's weights come from before the phase starts.

    kind: 'fresh'; 'job' (tree `tree` of the finished job `job`); 'assembled' (a fresh network with
    the weights of all jobs `m2mkd/i`); 'upcycled' (a fresh network with those of the dense `job`).
    """

    kind: str
    job: str = ""
    tree: str = ""


FRESH = Source("fresh")


@dataclass(frozen=True)
class StageRecord:
    """A stage by name: how it is built, and where its weights come from."""

    build: Callable[[nnx.Rngs], chain.Stage]
    source: Source
    title: str


@dataclass(frozen=True)
class Phase:
    """One job. `stages` holds every stage of both chains by name; see losses.Program."""

    job: str
    data: ConfigDict
    recipe: ConfigDict
    stages: dict[str, StageRecord]
    student: tuple[str, ...]
    trainable: tuple[str, ...]
    rates: tuple = ()
    teacher: tuple[str, ...] = ()
    distillation: ConfigDict | None = None
    regularised: str = ""  # name of the stage that the graph regulariser acts on
    head: tuple[str, ...] = ()  # where the only trained part of the trainable stage lies
    seed: int = 0
    describe: dict = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """Jobs whose weights this one starts from, students apart."""
        jobs = [record.source.job for record in self.stages.values() if record.source.job]
        return tuple(dict.fromkeys(jobs))

    def trained(self, params: dict[str, dict]) -> dict[str, dict]:
        """What is trained of the parameters (or shapes) of all stages, by stage."""
        return {name: chain.part(params[name], self.head) for name in self.trainable}

    @property
    def assembled(self) -> tuple[str, ...]:
        """Names of the stages that are assembled from students."""
        return tuple(n for n, r in self.stages.items() if r.source.kind == "assembled")

    def program(self, regulariser, dtype: jnp.dtype, sampled_evaluation: bool) -> Program:
        kind = self.distillation.kind if self.distillation is not None else "none"
        options = {}
        if self.distillation is not None:
            options = dict(
                alpha=self.distillation.alpha, temperature=self.distillation.temperature
            )
        return Program(
            graphs={n: chain.abstract(r.build).graph for n, r in self.stages.items()},
            student=self.student,
            trainable=self.trainable,
            rates=self.rates,
            teacher=self.teacher if kind != "none" else (),
            kind=kind,
            regulariser=regulariser,
            balance={
                "importance_loss": self.recipe.importance_weight,
                "load_loss": self.recipe.load_weight,
            },
            dtype=dtype,
            sampled_evaluation=sampled_evaluation,
            **options,
        )
