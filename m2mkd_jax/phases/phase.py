"""What a phase is: stages by name, where their weights come from, and the recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.losses.distillation import linear_alpha
from m2mkd_jax.models import chain
from m2mkd_jax.phases.program import Program

# Merged stages by name -> a scalar to add to the loss.
Regulariser = Callable[[Mapping[str, nnx.Module]], jax.Array]


def alpha_changes(distillation: ConfigDict) -> bool:
    """Whether alpha is another at the end of a job than at its beginning."""
    return distillation.alpha_end not in (-1, distillation.alpha)


@dataclass(frozen=True)
class WeightsFrom:
    """Where a stage's weights come from before the phase starts.

    Attributes:
        kind: 'fresh'; 'job' (tree `tree` of the finished job `job`); 'init' (tree `tree` of what
            config.init.network names); 'assembled' (a fresh network with the weights of all jobs
            `m2mkd/i`); 'upcycled' (a fresh network with those of the dense `job`); 'backbone' (a
            fresh detector with the transformer of the network that `job` trained).
    """

    kind: str
    job: str = ""
    tree: str = ""


FRESH = WeightsFrom("fresh")


@dataclass(frozen=True)
class StageSpec:
    """A stage of a phase.

    Attributes:
        build: makes the stage, all of its arrays drawn from the given random streams.
        weights: where its weights come from.
        title: what it is, for people.
    """

    build: Callable[[nnx.Rngs], chain.Stage]
    weights: WeightsFrom
    title: str


@dataclass(frozen=True)
class Phase:
    """One job: which chain runs, what of it is trained, against what, by which recipe.

    Attributes:
        job: name of the job, such as m2mkd/3.
        data: the images (config.data, or what stands in its place).
        data_key: the key of config that holds them.
        recipe: the module's own recipe, learning rates scaled to the batch.
        recipe_key: the key of config that holds it.
        stages: every stage of both chains, by name.
        student, trainable, rates, teacher: see program.Program.
        distillation: config.distillation, or None without a teacher.
        regulariser: (initial stages, merged, by name) -> a term of the loss; None: there is none.
        regulariser_fitted: whether it looks at the initial stages; if not, it is given {}.
        head: path of the only trained part of the trainable stage; (): all of it.
        seed: of fresh weights, data order and training noise.
        views: how many views of an image are shown in turn; 0: new ones in every epoch.
        describe: what is saved with the weights, see models/registry.py.
        depends_on: values of the config that decide the result, by key; see jobs/plan.py.
    """

    job: str
    data: ConfigDict
    data_key: str
    recipe: ConfigDict
    recipe_key: str
    stages: dict[str, StageSpec]
    student: tuple[str, ...]
    trainable: tuple[str, ...]
    rates: tuple = ()
    teacher: tuple[str, ...] = ()
    distillation: ConfigDict | None = None
    regulariser: Callable[[Mapping[str, nnx.Module]], Regulariser] | None = None
    regulariser_fitted: bool = True
    head: tuple[str, ...] = ()
    seed: int = 0
    views: int = 0
    describe: dict = field(default_factory=dict)
    depends_on: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """Jobs whose weights this one starts from, students apart."""
        jobs = [stage.weights.job for stage in self.stages.values() if stage.weights.job]
        return tuple(dict.fromkeys(jobs))

    def trained(self, params: dict[str, dict]) -> dict[str, dict]:
        """What is trained of the parameters (or shapes) of all stages, by stage."""
        return {name: chain.subtree(params[name], self.head) for name in self.trainable}

    @property
    def assembled(self) -> tuple[str, ...]:
        """Names of the stages that are assembled from students."""
        return tuple(n for n, s in self.stages.items() if s.weights.kind == "assembled")

    def program(
        self,
        regulariser: Regulariser | None,
        dtype: jnp.dtype,
        sampled_evaluation: bool,
        updates: int = 1,
    ) -> Program:
        """What is computed in this phase.

        Args:
            regulariser: of the merged stages; None: none.
            dtype: compute type.
            sampled_evaluation: see program.Program.
            updates: of the optimizer in the whole job, over which alpha goes to alpha_end.
        """
        kind = self.distillation.kind if self.distillation is not None else "none"
        return Program(
            graphs={n: chain.abstract(s.build).graph for n, s in self.stages.items()},
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
            **self._distillation_options(updates),
        )

    def _distillation_options(self, updates: int) -> dict[str, Any]:
        """Of config.distillation, what a Program has; {} without a teacher."""
        chosen = self.distillation
        if chosen is None:
            return {}
        alpha: Any = chosen.alpha
        if alpha_changes(chosen):
            alpha = functools.partial(
                linear_alpha,
                first=chosen.alpha,
                last=chosen.alpha_end,
                updates=updates,
                accumulate=self.recipe.accumulate,
            )
        part = len(self.trainable) < len(self.student)  # a module among those of the meta model
        return {
            "alpha": alpha,
            "temperature": chosen.temperature,
            "token_weight": chosen.token_weight if part else 0.0,
        }
