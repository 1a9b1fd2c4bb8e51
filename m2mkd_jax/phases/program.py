"""The one loss: some stages of a chain are trained, against labels and perhaps a teacher chain.

Axes: B batch, H height, W width, K classes, U latents, L layers with experts, E experts.

Every phase of m2mKD is a `Program`; below this file nobody knows which phase runs. Parameters of
all chains live in two dicts keyed by stage name, `trainable[name]` and `frozen[name]`, so that a
stage shared by the student's and the teacher's chain exists once and no gradient or optimizer
state is kept for what stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
        kind, alpha, temperature: see objectives/distillation.py.
        regulariser: (stages by name) -> scalar to add to the loss, or None.
        balance: what of `Stage.observed` is added to the loss, summed over layers, and its weight.
        dtype: compute type of activations and parameters; logits and losses are float32.
        sampled_evaluation: draw the noise that the published evaluation draws.
    """

    graphs: Mapping[str, nnx.GraphDef]
    student: tuple[str, ...]
    trainable: tuple[str, ...]
    rates: tuple = ()
    teacher: tuple[str, ...] = ()
    kind: str = "none"
    alpha: float = 0.5
    temperature: float = 1.0
    regulariser: Callable[[Mapping[str, nnx.Module]], jax.Array] | None = None
    balance: Mapping[str, float] = field(default_factory=dict)
    dtype: jnp.dtype = field(default=jnp.float32)
    sampled_evaluation: bool = False

    def __post_init__(self):
        assert not self.rates or len(self.rates) == len(self.student)

    def run(self, names, trainable: dict, frozen: dict, x, rates=None, key=None, train=False):
        """Runs the stages `names` in the compute type."""
        return self.observe(names, trainable, frozen, x, rates, key, train)[0]

    def observe(self, names, trainable: dict, frozen: dict, x, rates=None, key=None, train=False):
        """`run`, and what the stages let see of themselves: name -> (L, ...) over all layers."""
        groups: list[tuple[bool, list, list]] = []
        for i, name in enumerate(names):
            trained = name in self.trainable
            params = frozen[name].get("params", {})
            if trained:  # the whole stage, or a part of it
                params = chain.overlaid(params, trainable[name])
            params = layers.all_gather_params(chain.cast_compute(params, self.dtype))
            stage = chain.merge(self.graphs[name], params, frozen[name]["fixed"])
            # Joined are only stages that are trained alike: what is frozen needs no gradients.
            if not groups or groups[-1][0] != trained:
                groups.append((trained, [], []))
            groups[-1][1].append(stage)
            groups[-1][2].append(rates[i] if rates else None)
        stages, ramps = [], []
        for _, members, their_rates in groups:
            members, their_rates = chain.join(members, their_rates)
            stages += members
            ramps += their_rates
        x, seen = chain.run_observed(stages, x, rates=ramps, key=key, train=train)
        seen = [observed for observed in seen if observed]
        return x, jax.tree.map(lambda *layers: jnp.concatenate(layers), *seen) if seen else {}

    @property
    def shared(self) -> int:
        """How many leading stages student and teacher share and run alike: computed once."""
        shared = 0
        for i, (a, b) in enumerate(zip(self.student, self.teacher, strict=False)):
            noisy = bool(self.rates) and self.rates[i] is not None and any(self.rates[i])
            if a != b or a in self.trainable or noisy:
                break
            shared += 1
        return shared

    def loss(self, trainable: dict, frozen: dict, batch: dict, key) -> tuple[jax.Array, dict]:
        """Mean loss of a batch and its parts (scalars).

        Args:
            trainable: {stage: params}.
            frozen: {stage: {"params", "fixed"}}; of a trainable stage "fixed", and "params" where
                only a part of them is trained.
            batch: "image" (B, H, W, 3) normalised, "target" (B, K) rows that sum to one.
            key: for drop-path and the network's own noise; None switches all of it off.
        """
        shared = self.shared
        x = batch["image"].astype(self.dtype)
        x = self.run(self.student[:shared], trainable, frozen, x)
        rates = self.rates[shared:] or None
        names = self.student[shared:]
        logits, seen = self.observe(names, trainable, frozen, x, rates, key, train=key is not None)
        loss = classification.soft_cross_entropy(logits, batch["target"])
        hits = jnp.argmax(logits, -1) == jnp.argmax(batch["target"], -1)
        metrics = {"classification_loss": loss, "accuracy": hits.mean()}
        metrics |= {f"router/{name}": layers for name, layers in seen.items()}
        if self.teacher:
            target = self.run(self.teacher[shared:], trainable, frozen, x)
            target = jax.lax.stop_gradient(target)
            loss = distillation.distill(
                loss, logits, target, self.kind, self.alpha, self.temperature
            )
            agree = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
            metrics |= {"teacher_agreement": agree.mean()}
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

    def logits(self, trainable: dict, frozen: dict, images: jax.Array, key=None) -> jax.Array:
        """Evaluation: images (B, H, W, 3) normalised -> logits (B, K)."""
        key = key if self.sampled_evaluation else None
        return self.run(self.student, trainable, frozen, images.astype(self.dtype), key=key)
