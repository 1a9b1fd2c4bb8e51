"""Several programs as one: chains that begin alike are run once, equal stages in one batch.

The modules of m2mkd and of mt run on one meta model. What the chains of two jobs have in common up
to a stage is computed once; and where several chains run the same frozen stage at the same place,
it runs once over all of them, stacked along a new leading axis, so that its weights are read once;
on a CPU it runs for one after the other, whose activations then stay in the cache.

Axes: B batch, H height, W width, N tokens, D channels, K classes.

Source: arXiv 2402.16918, section 3; docs/reference.md#losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from m2mkd_jax.parallel import backend
from m2mkd_jax.phases.program import Program, batch_of, concatenated

# The stages that a chain has run, in order: (); ("meta_0",); ("meta_0", "student_1"); ...
Path = tuple[str, ...]
# (path, input of its last stage, key) -> output and auxiliary outputs of that stage
RunStage = Callable[[Path, jax.Array, jax.Array | None], tuple[jax.Array, dict]]


@dataclass(frozen=True)
class JointProgram:
    """Programs that train on the same images, each with trained stages of its own.

    Stages of the same name are the same in all programs, and a trained stage has one program.

    Attributes:
        programs: by job.
    """

    programs: Mapping[str, Program]

    @property
    def dtype(self) -> jnp.dtype:
        """Compute type of activations and parameters."""
        return next(iter(self.programs.values())).dtype

    def given(self, frozen: dict, images: jax.Array) -> dict[str, dict[str, jax.Array]]:
        """What the frozen stages give the trained ones; no gradient goes through it.

        Args:
            frozen: {stage: {"params", "fixed"}}.
            images: (B, H, W, C), normalised.

        Returns:
            By job: "tokens", input of the student chain's first stage that is not the teacher's,
            and where there is a teacher "logits" (B, K), which it gives; and where tokens are
            matched "module" (B, N, D), which the teacher's module gives.
        """
        wanted = {}
        for job, program in self.programs.items():
            paths = {"tokens": program.student[: program.shared]}
            paths |= {"logits": program.teacher} if program.teacher else {}
            if program.matches_tokens:
                paths["module"] = program.teacher[: program.shared + 1]
            wanted[job] = paths
        run = self._runner({}, frozen)
        chains = [path for of_job in wanted.values() for path in of_job.values()]
        outputs, _ = follow(chains, {(): images.astype(self.dtype)}, run)
        return {
            job: {name: outputs[path] for name, path in of_job.items()}
            for job, of_job in wanted.items()
        }

    def loss(
        self, trainable: dict, frozen: dict, batch: dict, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
        """The sum of the programs' losses, and the metrics of each.

        Args:
            trainable: {job: {stage: params}}.
            frozen: {stage: {"params", "fixed"}}; of a trainable stage "fixed".
            batch: as for `Program.loss`, and for `batch_of`; and, as kept from an earlier run of
                the frozen stages, "tokens/JOB" and "logits/JOB". Images are not needed where the
                tokens of all jobs are kept.
            key: as for `Program.loss`; each program draws what it would draw by itself.

        Returns:
            The sum, and each program's metrics as `Program.loss` gives them, by job.
        """
        given = self._kept(batch) or self.given(frozen, batch["image"])
        starts = {p.student[: p.shared]: given[job]["tokens"] for job, p in self.programs.items()}
        run = self._runner(trainable, frozen, key is not None)
        keys = {} if key is None else self._keys(key)
        outputs, seen = follow([p.student for p in self.programs.values()], starts, run, keys)
        total, metrics = jnp.zeros(()), {}
        for job, program in self.programs.items():
            tail = range(program.shared + 1, len(program.student) + 1)
            tokens = None
            if program.matches_tokens:
                tokens = outputs[program.student[: tail[0]]], given[job]["module"]
            loss, metrics[job] = program.objective(
                outputs[program.student],
                given[job].get("logits"),
                concatenated([seen[program.student[:end]] for end in tail]),
                trainable[job],
                frozen,
                batch_of(batch, job),
                tokens,
            )
            total += loss
        return total, metrics

    def _kept(self, batch: dict) -> dict[str, dict[str, jax.Array]]:
        """What `given` returns, where a batch has it; {}: it has not."""
        if not all(f"logits/{job}" in batch for job in self.programs):
            return {}
        return {
            job: {
                "logits": batch[f"logits/{job}"],
                # A job whose student takes images has no tokens.
                "tokens": batch[f"tokens/{job}" if program.shared else "image"].astype(self.dtype),
            }
            for job, program in self.programs.items()
        }

    def logits(
        self, trainable: dict, frozen: dict, images: jax.Array, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Evaluation: images (B, H, W, C), normalised -> logits (B, K) of every student's chain.

        Args:
            trainable: {job: {stage: params}}.
            frozen: {stage: {"params", "fixed"}}.
            images: float32, normalised.
            key: of the published evaluation's noise, which one program alone can draw.
        """
        if len(self.programs) == 1:
            ((job, program),) = self.programs.items()
            return {job: program.logits(trainable.get(job, {}), frozen, images, key)}
        chains = {job: program.student for job, program in self.programs.items()}
        start: dict[Path, jax.Array] = {(): images.astype(self.dtype)}
        outputs, _ = follow(chains.values(), start, self._runner(trainable, frozen))
        return {job: outputs[path] for job, path in chains.items()}

    def only(self, jobs: Iterable[str]) -> JointProgram:
        """The program of some of the jobs."""
        return JointProgram({job: self.programs[job] for job in jobs})

    def _keys(self, key: jax.Array) -> dict[Path, jax.Array]:
        """The key that each stage behind the shared ones draws from, as in `Program.loss`."""
        return {
            program.student[: place + 1]: jax.random.fold_in(key, place - program.shared)
            for program in self.programs.values()
            for place in range(program.shared, len(program.student))
        }

    def _runner(self, trainable: dict, frozen: dict, train: bool = False) -> RunStage:
        """What runs a stage of any of the programs."""
        # A chain's last stage is looked up by the whole chain: only its own program trains it.
        owner: dict[Path, tuple[Program, dict, Any]] = {}
        for job, program in self.programs.items():
            for names in (program.teacher, program.student):
                for place in range(len(names)):
                    own = names is program.student and program.rates
                    rates = program.rates[place] if own else None
                    owner[names[: place + 1]] = program, trainable.get(job, {}), rates

        def run(path: Path, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, dict]:
            program, params, rates = owner[path]
            stage = program.stage(path[-1], params, frozen)
            return stage.with_aux(x, rates=rates if train else None, key=key, train=train)

        return run


def follow(
    paths: Iterable[Path],
    known: Mapping[Path, jax.Array],
    run: RunStage,
    keys: Mapping[Path, jax.Array] | None = None,
) -> tuple[dict[Path, jax.Array], dict[Path, dict]]:
    """Runs chains from where their outputs are known, each common beginning once.

    Args:
        paths: the chains.
        known: outputs by path; of every chain, that of one beginning.
        run: runs the last stage of a path.
        keys: of the randomness of a path's last stage; none: deterministic.

    Returns:
        The outputs of the chains and of all beginnings that were run, and auxiliary outputs.
    """
    outputs, seen, keys = dict(known), {}, keys or {}
    paths = list(paths)
    for length in range(1, max(map(len, paths), default=0) + 1):
        # Ends of equal stages with inputs of equal shapes; a student may give fewer tokens.
        level: dict[tuple, dict[Path, None]] = {}
        for path in paths:
            end = path[:length]
            if len(end) == length and end[:-1] in outputs and end not in outputs:
                level.setdefault((end[-1], outputs[end[:-1]].shape), {})[end] = None
        for ends in map(tuple, level.values()):
            inputs = [outputs[end[:-1]] for end in ends]
            drawn = [keys[end] for end in ends if end in keys]
            results = _side_by_side(run, ends, inputs, drawn)
            for end, (output, aux) in zip(ends, results, strict=True):
                outputs[end], seen[end] = output, aux
    return outputs, seen


def _side_by_side(
    run: RunStage,
    ends: tuple[Path, ...],
    inputs: list[jax.Array],
    keys: list[jax.Array],
) -> list[tuple[jax.Array, dict]]:
    """Output and auxiliary outputs of one stage for each of several inputs; no keys: no noise."""
    if len(ends) == 1 or backend.platform() == "cpu":
        drawn: list[jax.Array | None] = [*keys] or [None] * len(ends)
        return [run(*of_end) for of_end in zip(ends, inputs, drawn, strict=True)]
    x = jnp.stack(inputs)
    if keys:
        stacked = jax.vmap(lambda x, key: run(ends[0], x, key))(x, jnp.stack(keys))
    else:
        stacked = jax.vmap(lambda x: run(ends[0], x, None))(x)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(ends))]
