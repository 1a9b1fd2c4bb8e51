"""Neighbouring stages of a phase's chains, joined once before the first step.

Ten stages of like blocks compile as ten loops, and as one loop when joined (`Stage.join`). Joining
concatenates weights, which takes a tenth of a step or more: so a step is given joined weights, and
what is saved for others is split again.

Stages are joined where both chains run them alike: all of them trained or all frozen, in the
student's chain, the teacher's or both, and on the same side of the prefix that the chains share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from m2mkd_jax.models import chain
from m2mkd_jax.parallel import backend
from m2mkd_jax.phases.program import Program

Params = dict[str, Any]


@dataclass(frozen=True)
class Joined:
    """A program on joined stages, and the way from parameters of single stages and back.

    Attributes:
        program: computes what the program on single stages computes.
        groups: name of each stage of `program` -> names of the single stages, in order.
        single: the program on single stages.
        shapes: of the single stages' parameters, by name.
    """

    program: Program
    groups: Mapping[str, tuple[str, ...]]
    single: Program
    shapes: Mapping[str, Params]

    def join(self, params: Params, place: Callable[[Any], Any] | None = None) -> Params:
        """Parameters of single stages, by name -> parameters of the program's stages.

        Args:
            params: arrays or shapes.
            place: shapes of a joined stage's parameters -> their shardings; None: the compiler's
                choice.

        Returns:
            Those of the stages whose parts are in `params`.
        """
        joined = {}
        for name, parts in self.groups.items():
            if parts[0] not in params:
                continue
            own = [params[part] for part in parts]
            if len(parts) == 1:
                joined[name] = own[0]
                continue
            shapes = jax.eval_shape(self._joining(parts), *own)
            if isinstance(jax.tree.leaves(own)[0], jax.ShapeDtypeStruct):
                joined[name] = shapes
            else:
                places = None if place is None else place(shapes)
                joined[name] = backend.jit(
                    self._joining(parts),
                    out_shardings=places,
                    once=True,
                )(*own)
        return joined

    def fixed(self, arrays: Params) -> Params:
        """Fixed arrays by single stage -> by the program's stages; joined ones have none."""
        return {
            name: arrays[parts[0]] if len(parts) == 1 else {}
            for name, parts in self.groups.items()
            if parts[0] in arrays
        }

    def stages(self, single: Params, place: Callable[[Any], Any] | None = None) -> Params:
        """{"params", "fixed"} by single stage -> by the program's stages; `place` as for `join`."""
        params = self.join({name: stage["params"] for name, stage in single.items()}, place)
        fixed = self.fixed({name: stage["fixed"] for name, stage in single.items()})
        return {name: {"params": own, "fixed": fixed[name]} for name, own in params.items()}

    def single_stages(self, stages: Params) -> Params:
        """The inverse of `stages`."""
        params = self.split({name: stage["params"] for name, stage in stages.items()})
        return {
            part: {"params": params[part], "fixed": {} if len(parts) > 1 else stages[name]["fixed"]}
            for name, parts in self.groups.items()
            if name in stages
            for part in parts
        }

    def split(self, params: Params) -> Params:
        """The inverse of `join`."""
        single = {}
        for name, own in params.items():
            parts = self.groups[name]
            if len(parts) == 1:
                single[parts[0]] = own
                continue
            # Joining only moves numbers: its transpose is its inverse.
            back = jax.linear_transpose(self._joining(parts), *(self.shapes[p] for p in parts))
            single |= dict(zip(parts, back(own), strict=True))
        return single

    def _joining(self, parts: Sequence[str]) -> Callable[..., Params]:
        def whole(*params: Params) -> Params:
            ((stage,), _) = chain.join(_merged(self.single, parts, params), None)
            return chain.split(stage).params

        return whole


def _merged(program: Program, names: Sequence[str], params: Sequence[Params]) -> list[chain.Stage]:
    return [chain.merge(program.graphs[n], p, {}) for n, p in zip(names, params, strict=True)]


def join_neighbours(
    program: Program,
    stages: Mapping[str, Params],
    *,
    trained: bool,
    apart: Collection[str] = (),
) -> Joined:
    """Joins the stages of both chains of a program.

    Args:
        program: on single stages.
        stages: {name: {"params", "fixed"}} of all of them, arrays or shapes.
        trained: join trained stages too, which must be whole.
        apart: stages that are joined to no other.
    """
    shapes = {n: jax.eval_shape(lambda p: p, s["params"]) for n, s in stages.items()}
    groups: dict[str, tuple[str, ...]] = {}
    graphs, chains = {}, []
    for names in (program.student, program.teacher):
        rates = dict(zip(names, program.rates if names is program.student else (), strict=False))
        joined_names: list[str] = []
        joined_rates: list[chain.Rates] = []
        for alike in _alike(program, names, stages, trained, apart):
            for parts in _joinable(program, alike, shapes):
                name = parts[0] if len(parts) == 1 else f"{parts[0]}..{parts[-1]}"
                groups[name] = tuple(parts)
                graphs[name], ramp = _structure(program, parts, shapes, rates)
                joined_names.append(name)
                joined_rates.append(ramp)
        chains.append((tuple(joined_names), tuple(joined_rates)))
    (student, ramps), (teacher, _) = chains
    on_joined = replace(
        program,
        graphs=graphs,
        student=student,
        teacher=teacher,
        trainable=tuple(n for n in student if groups[n][0] in program.trainable),
        rates=ramps if program.rates else (),
    )
    return Joined(on_joined, groups, program, shapes)


def _alike(
    program: Program,
    names: Sequence[str],
    stages: Mapping[str, Params],
    trained: bool,
    apart: Collection[str],
) -> Iterator[list[str]]:
    """The chain in runs of stages that may be joined."""
    before: Any = None
    run: list[str] = []
    for i, name in enumerate(names):
        is_trained = name in program.trainable
        whole = trained or not is_trained
        single = bool(stages[name]["fixed"]) or not whole or name in apart
        kind = (
            is_trained,
            name in program.student,
            name in program.teacher,
            i < program.shared,
            name if single else None,
        )
        if run and kind != before:
            yield run
            run = []
        run.append(name)
        before = kind
    if run:
        yield run


def _joinable(
    program: Program, names: Sequence[str], shapes: Mapping[str, Params]
) -> list[list[str]]:
    """A run of stages in groups, each of which joins to one stage."""
    groups: list[list[str]] = []

    def probe(*params: Params) -> None:
        last: chain.Stage | None = None
        for name, stage in zip(names, _merged(program, names, params), strict=True):
            both = last.join(stage) if last is not None else None
            if both is None:
                groups.append([])
            groups[-1].append(name)
            last = stage if both is None else both

    if len(names) == 1:
        return [list(names)]
    jax.eval_shape(probe, *(shapes[name] for name in names))
    return groups


def _structure(
    program: Program,
    parts: Sequence[str],
    shapes: Mapping[str, Params],
    rates: Mapping[str, chain.Rates],
) -> tuple[Any, chain.Rates]:
    """Structure of the stage that the parts join to, and its drop-path rates."""
    if len(parts) == 1:
        return program.graphs[parts[0]], rates.get(parts[0])
    found: list[Any] = []

    def probe(*params: Params) -> None:
        own = [rates.get(part) for part in parts]
        (stage,), ramps = chain.join(_merged(program, parts, params), own)
        found.extend((chain.split(stage).graph, ramps and ramps[0]))

    jax.eval_shape(probe, *(shapes[part] for part in parts))
    return found[0], found[1]
