"""The one loss of all phases: stages of a chain are trained on labels and a teacher chain's logits.

Axes: B batch, H height, W width, N tokens, D channels, K classes, L layers with experts.

Every phase of m2mKD is a `Program`; nothing that uses one knows which phase it is. Parameters of
both chains are kept in two dicts by stage name, `trainable` and `frozen`: a stage that student and
teacher share exists once, and a frozen stage has no gradients and no optimizer state.

Source: arXiv 2402.16918, section 3; docs/reference.md#losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.losses import classification, distillation
from m2mkd_jax.models import chain, layers


@dataclass(frozen=True)
class Program:
    """What a phase computes.

    Attributes:
        graphs: structure of every stage, by name.
        student: names of the chain whose logits are trained.
        trainable: names of the stages that are trained.
        rates: drop-path rates per stage of `student` (None: no drop-path there).
        teacher: names of the chain whose logits are imitated; empty without distillation.
        kind, temperature: see losses/distillation.py.
        alpha: weight of the distillation loss; or training step -> weight.
        token_weight: of `losses.distillation.token_distillation`, see `matches_tokens`.
        regulariser: (stages by name) -> scalar to add to the loss, or None.
        class_weights: (K,), of the classes in the loss of the labels; (): all 1.
        balance: what of `Stage.with_aux` is added to the loss, summed over layers, and its weight.
        dtype: compute type of activations and parameters; logits and losses are float32.
        sampled_evaluation: draw the noise that the published evaluation draws.
    """

    graphs: Mapping[str, nnx.GraphDef]
    student: tuple[str, ...]
    trainable: tuple[str, ...]
    rates: tuple = ()
    teacher: tuple[str, ...] = ()
    kind: str = "none"
    alpha: float | Callable[[jax.Array], jax.Array] = 0.5
    temperature: float = 1.0
    token_weight: float = 0.0
    regulariser: Callable[[Mapping[str, nnx.Module]], jax.Array] | None = None
    class_weights: tuple[float, ...] = ()
    balance: Mapping[str, float] = field(default_factory=dict)
    dtype: jnp.dtype = field(default=jnp.float32)
    sampled_evaluation: bool = False

    def __post_init__(self) -> None:
        assert not self.rates or len(self.rates) == len(self.student)

    def run(
        self,
        names: Sequence[str],
        trainable: dict,
        frozen: dict,
        x: jax.Array,
        rates: Sequence | None = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Runs the stages `names` in the compute type; see `run_with_aux`."""
        return self.run_with_aux(names, trainable, frozen, x, rates, key, train)[0]

    def run_with_aux(
        self,
        names: Sequence[str],
        trainable: dict,
        frozen: dict,
        x: jax.Array,
        rates: Sequence | None = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the stages `names` in the compute type, and also returns their auxiliary outputs.

        Args:
            names: stages in the order in which they run.
            trainable: {stage: params}.
            frozen: {stage: {"params", "fixed"}}.
            x: what the first stage takes: images (B, H, W, C) or tokens (B, N, D).
            rates: drop-path rates of each stage's blocks; None: no drop-path.
            key: of all randomness; None: deterministic.
            train: whether training noise is on.

        Returns:
            What the last stage gives, and auxiliary outputs by name, (L, ...) over all layers.
        """
        outputs, seen = self._run_with_outputs(names, trainable, frozen, x, rates, key, train)
        return (outputs[-1] if outputs else x), seen

    def _run_with_outputs(
        self,
        names: Sequence[str],
        trainable: dict,
        frozen: dict,
        x: jax.Array,
        rates: Sequence | None = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        """`run_with_aux` that returns what every stage gives."""
        stages = [self.stage(name, trainable, frozen) for name in names]
        rates = rates or None
        outputs, seen = chain.run_with_outputs(stages, x, rates=rates, key=key, train=train)
        return outputs, concatenated(seen)

    def stage(self, name: str, trainable: dict, frozen: dict) -> Any:
        """A stage with its parameters, in the compute type."""
        params = frozen[name].get("params", {})
        if name in self.trainable:  # the whole stage, or a part of it
            params = chain.deep_update(params, trainable[name])
        params = layers.all_gather_params(chain.cast_compute(params, self.dtype))
        return chain.merge(self.graphs[name], params, frozen[name]["fixed"])

    @property
    def shared(self) -> int:
        """How many leading stages student and teacher share; they are computed once."""
        shared = 0
        for i, (a, b) in enumerate(zip(self.student, self.teacher, strict=False)):
            noisy = bool(self.rates) and self.rates[i] is not None and any(self.rates[i])
            if a != b or a in self.trainable or noisy:
                break
            shared += 1
        return shared

    @property
    def matches_tokens(self) -> bool:
        """Whether the student's tokens are compared with those of the teacher's module.

        That is, of the first stages that the chains do not share; they are not the last, which give
        logits.
        """
        return bool(self.token_weight and self.teacher) and len(self.student) > self.shared + 1

    def loss(
        self, trainable: dict, frozen: dict, batch: dict, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch, and its parts.

        Args:
            trainable: {stage: params}.
            frozen: {stage: {"params", "fixed"}}; of a trainable stage "fixed", and "params" where
                only a part of them is trained.
            batch: "image" (B, H, W, C) normalised, "target" (B, K) rows that sum to one; and
                "step", the number of the training step from 0, without those that were skipped,
                where alpha depends on it.
            key: for drop-path and the network's own noise; None switches all of it off.

        Returns:
            The loss, and metrics by name: scalars, and of routers (L, ...).
        """
        shared = self.shared
        x = batch["image"].astype(self.dtype)
        x = self.run(self.student[:shared], trainable, frozen, x)
        rates = self.rates[shared:] or None
        names = self.student[shared:]
        outputs, seen = self._run_with_outputs(
            names, trainable, frozen, x, rates, key, train=key is not None
        )
        taught, tokens = None, None
        if self.teacher:
            of_teacher, _ = self._run_with_outputs(self.teacher[shared:], trainable, frozen, x)
            taught = of_teacher[-1]
            tokens = (outputs[0], of_teacher[0]) if self.matches_tokens else None
        return self.objective(outputs[-1], taught, seen, trainable, frozen, batch, tokens)

    def objective(
        self,
        logits: jax.Array,
        taught: jax.Array | None,
        seen: dict,
        trainable: dict,
        frozen: dict,
        batch: dict,
        tokens: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`loss` from what the chains gave.

        Args:
            logits: (B, K), of the student's chain.
            taught: (B, K), of the teacher's; None without one.
            seen: auxiliary outputs of the student's chain, see `run_with_aux`.
            trainable, frozen, batch: as for `loss`.
            tokens: (B, N, D) that the student's stage gave and the teacher's, where they are
                matched; of unequal shapes they are not.

        Returns:
            As `loss`.
        """
        loss = classification.soft_cross_entropy(logits, batch["target"], self.class_weights)
        hits = jnp.argmax(logits, -1) == jnp.argmax(batch["target"], -1)
        metrics = {"classification_loss": loss, "accuracy": hits.mean()}
        metrics |= {f"router/{name}": layers for name, layers in seen.items()}
        if taught is not None:
            taught = jax.lax.stop_gradient(taught)
            alpha: float | jax.Array
            if callable(self.alpha):
                alpha = metrics["alpha"] = self.alpha(batch["step"])
            else:
                alpha = self.alpha
            loss = distillation.distill(loss, logits, taught, self.kind, alpha, self.temperature)
            agree = jnp.argmax(logits, -1) == jnp.argmax(taught, -1)
            metrics |= {"teacher_agreement": agree.mean()}
        if tokens is not None and tokens[0].shape == tokens[1].shape:
            metrics["token_loss"] = distillation.token_distillation(*tokens)
            loss = loss + self.token_weight * metrics["token_loss"]
        for name, weight in self.balance.items():
            if weight and name in seen:
                loss = loss + weight * seen[name].sum()
        if self.regulariser is not None:
            # In float32 whatever the compute type: distances are differences of near-equal sums.
            stages = {
                name: chain.merge(self.graphs[name], trainable[name], frozen[name]["fixed"])
                for name in self.trainable
            }
            metrics["regulariser"] = self.regulariser(stages)
            loss = loss + metrics["regulariser"]
        return loss, metrics | {"loss": loss}

    def logits(
        self, trainable: dict, frozen: dict, images: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Evaluation: images (B, H, W, C), normalised -> logits (B, K).

        Args:
            trainable: {stage: params}.
            frozen: {stage: {"params", "fixed"}}.
            images: float32, normalised.
            key: of the published evaluation's noise; unused unless `sampled_evaluation`.
        """
        key = key if self.sampled_evaluation else None
        return self.run(self.student, trainable, frozen, images.astype(self.dtype), key=key)


def concatenated(seen: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Auxiliary outputs of stages, one after the other: (L, ...) by name over all their layers."""
    seen = [observed for observed in seen if observed]
    return jax.tree.map(lambda *layers: jnp.concatenate(layers), *seen) if seen else {}


def batch_of(batch: dict, job: str) -> dict:
    """A batch of several jobs as one of them takes it.

    Args:
        batch: with "step/JOB" the number of the job's training step from 0, without those that it
            has skipped.
        job: its name.

    Returns:
        The batch with that number as "step", where it has one.
    """
    own = f"step/{job}"
    return {**batch, "step": batch[own]} if own in batch else batch
