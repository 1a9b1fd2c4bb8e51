"""The two families of students, NAC and V-MoE, behind one interface.

A family says how student i is built, how the network is built that is trained end to end, and how
the students' weights get into it. Nothing below phases.py and weights.py asks which family it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from m2mkd_jax.config import module_recipe, recipe_name, teaching_data
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe import dispatch, vmoe
from m2mkd_jax.models.nac import priors
from m2mkd_jax.models.nac import students as nac_students
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.objectives.graph import block_matrix
from m2mkd_jax.records import FRESH, Source, StageRecord
from m2mkd_jax.specs import nac_spec, require, teacher_spec, vmoe_spec


@dataclass(frozen=True)
class Student:
    """Student `i`: its stage, its drop-path rates in its hybrid, and what describes its weights."""

    record: StageRecord
    rates: tuple[float, ...] | None
    describe: dict


@dataclass(frozen=True)
class Network:
    """The network trained end to end; `regularised` names the stage with a graph, if any."""

    stages: dict[str, StageRecord]
    rates: tuple
    describe: dict
    regularised: str = ""


# Cached, so that chain.abstract traces equal stages once.
@functools.cache
def _nac_builder(spec: NACSpec):
    return lambda rngs: NAC(spec, rngs=rngs)


@functools.cache
def _nac_student_builder(spec: NACSpec, index: int, modules: int, width: int, states: int):
    return lambda rngs: nac_students.build_student(spec, index, modules, width, states, rngs=rngs)


@functools.cache
def _vmoe_builder(spec: vmoe.VMoESpec, start: int, depth: int, first: bool, last: bool):
    return lambda rngs: vmoe.VMoEStage(spec, start, depth, first=first, last=last, rngs=rngs)


class NACFamily:
    """Read-in, mediators, read-out; one Neural Attentive Circuit end to end."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.modules = config.nac.iterations + 2
        self.group = 0  # images that cannot be computed apart
        self.parts = f"read-in, {config.nac.iterations} iterations, read-out"

    def check(self, teaching: bool, devices: int) -> None:
        """Raises UserError where config.nac does not fit the rest of the config."""
        del devices
        config, nac = self.config, self.config.nac
        nac_spec(config, config.data)
        if teaching:
            width = teacher_spec(config)[0].width
            require(
                nac.stitch_dim in (0, width),
                f"config.nac.stitch_dim is {nac.stitch_dim}; it must be the meta model's width "
                f"{width} (or 0 for just that)",
            )
        require(
            not (nac.share_propagators or nac.share_ffn)
            or not ("m2mkd" in config.phases or config.init.students),
            "config.nac: m2mKD teaches every propagator apart; switch share_propagators and "
            "share_ffn off or drop the m2mkd phase",
        )
        priors.build_graph(nac.prior, nac.mediator_latents, dict(nac.options), config.seed)
        for name in ("m2mkd", "e2e"):
            recipe = config.recipes[name]
            require(
                not (recipe.importance_weight or recipe.load_weight),
                f"config.recipes.{name}: importance_weight and load_weight are about routers; a "
                "NAC has none",
            )
        wanted, latents = config.regulariser, nac.mediator_latents
        if wanted.kind == "stochastic_block":
            block_matrix(latents, wanted.clusters, wanted.p_in, wanted.p_out)
        latents += nac.input_latents + nac.output_latents
        require(
            wanted.kind != "gaussian_mixture" or wanted.components <= math.comb(latents, 2),
            f"config.regulariser.components is {wanted.components}; {latents} latents have only "
            f"{math.comb(latents, 2)} distances",
        )

    def student(self, index: int) -> Student:
        config = self.config
        recipe = module_recipe(config, "m2mkd", index)
        spec, width = nac_spec(config, teaching_data(config)), teacher_spec(config)[0].width
        last, states = self.modules - 1, recipe.batch // recipe.accumulate
        kind = "read-in" if index == 0 else "read-out" if index == last else "mediator"
        # All mediators are built alike, and only they have a drop-path of their own.
        like = 1 if kind == "mediator" else index
        build = _nac_student_builder(spec, like, self.modules, width, states)
        describe = {
            "kind": "nac_student",
            "spec": dataclasses.asdict(spec),
            "module": index,
            "modules": self.modules,
            "stitch_dim": width,
            "states": states,
        }
        rates = (recipe.drop_path,) if kind == "mediator" and recipe.drop_path else None
        return Student(StageRecord(build, FRESH, f"NAC {kind} student"), rates, describe)

    def network(self, source: Source) -> Network:
        config = self.config
        spec, recipe = nac_spec(config, config.data), module_recipe(config, "e2e")
        return Network(
            stages={"nac": StageRecord(_nac_builder(spec), source, "NAC")},
            rates=((recipe.drop_path,) * spec.iterations,),
            describe={"kind": "nac", "spec": dataclasses.asdict(spec)},
            regularised="nac" if config.regulariser.kind != "none" else "",
        )

    @property
    def head(self) -> tuple[str, tuple[str, ...]]:
        """The stage and the path of the layer that gives the logits. Raises UserError: none."""
        require(
            self.config.nac.output == "pooling",
            f'config.nac.output is "{self.config.nac.output}": only "pooling" has a head to train',
        )
        return "nac", ("pooling", "to_logits")

    def prepare(self, name: str, params: dict, seed: int) -> dict:
        """A fresh stage's parameters; the network's mediators get their graph."""
        nac = self.config.nac
        if name == "nac" and nac.prior != "none":
            params["mediator_latents"]["signatures"] = priors.prior_signatures(
                nac.prior, nac.mediator_latents, nac.signature_dim, dict(nac.options), seed
            )
        return params

    def assemble(
        self, network: Mapping[str, dict], taught: Sequence[dict]
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """The students' parameters put into the network's, and where each part came from."""
        params, origin = nac_students.assemble(network["nac"], list(taught))
        return {"nac": params}, {f"nac/{part}": where for part, where in origin.items()}


class VMoEFamily:
    """Stages of a vision transformer with experts, between stitches; the same stages end to end."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.depths = tuple(config.vmoe.depths)
        self.modules = len(self.depths)
        self.parts = f"config.vmoe.depths is {self.depths}"

    @property
    def group(self) -> int:
        """Images that cannot be computed apart; 0: none. Raises UserError: no such network."""
        return vmoe_spec(self.config, self.config.data, stitches=False)[0].group

    def check(self, teaching: bool, devices: int) -> None:
        """Raises UserError where config.vmoe does not fit the rest of the config."""
        config, fields = self.config, self.config.vmoe
        require(
            self.modules >= 2 and min(self.depths) >= 1,
            f"config.vmoe.depths is {self.depths}; it must name at least two modules of one block "
            "or more",
        )
        spec, depth = vmoe_spec(config, config.data, stitches=False)
        require(
            depth is None or sum(self.depths) == depth,
            f"config.vmoe.depths sum to {sum(self.depths)}; {fields.variant} has {depth}",
        )
        require(
            all(0 <= block < sum(self.depths) for block in spec.moe_pos),
            f"config.vmoe.moe_pos is {spec.moe_pos}; blocks are 0 to {sum(self.depths) - 1}",
        )
        require(
            not fields.keep_stitches
            or "m2mkd" in config.phases
            or bool(config.init.students or config.init.network),
            "config.vmoe.keep_stitches: without students there are no stitches to keep",
        )
        require(
            config.regulariser.kind == "none",
            f"config.regulariser.kind is {config.regulariser.kind}; a V-MoE has no graph, only "
            '"none" fits',
        )
        for name in ("m2mkd", "e2e", "fewshot"):
            if any(recipe_name(phase) == name for phase in config.phases):
                for index in range(self.modules) if name == "m2mkd" else (None,):
                    self._check_recipe(name, index, spec.group, devices)
        expert = config.mesh.expert
        require(
            expert < 1 or fields.experts % expert == 0,
            f"config.mesh.expert is {expert}; it must divide the {fields.experts} experts of "
            "config.vmoe.experts",
        )
        if "e2e_upcycled" in config.phases:
            require(
                not fields.keep_stitches,
                "config.vmoe.keep_stitches: the dense teacher of e2e_upcycled has no stitches",
            )
            dense, _ = teacher_spec(config)
            same = (dense.width, dense.heads, dense.patch, dense.qkv_bias, dense.eps)
            require(
                same == (spec.vit.width, spec.vit.heads, spec.vit.patch, spec.vit.qkv_bias,
                         spec.vit.eps)
                and sum(config.teacher.depths) == sum(self.depths),
                "config.phases: e2e_upcycled needs a teacher with the V-MoE's patch, width, heads, "
                f"qkv_bias, eps and number of blocks; the teacher is {dense.width} wide and "
                f"{sum(config.teacher.depths)} deep, the V-MoE {spec.vit.width} and "
                f"{sum(self.depths)}",
            )  # fmt: skip

    def _check_recipe(self, name: str, index: int | None, group: int, devices: int) -> None:
        fields, recipe = self.config.vmoe, module_recipe(self.config, name, index)
        require(
            not recipe.load_weight or (fields.router == "vmoe" and fields.noise > 0),
            f"config.recipes.{name}.load_weight is {recipe.load_weight}; the load loss is about "
            'the noise of config.vmoe.router "vmoe" and always 0 without it',
        )
        try:
            dispatch.count_groups(recipe.batch // recipe.accumulate, group, devices)
        except UserError as error:
            raise UserError(f"config.recipes.{name}: {error}") from None

    def _record(self, spec: vmoe.VMoESpec, index: int, source: Source) -> StageRecord:
        start, depth = sum(self.depths[:index]), self.depths[index]
        build = _vmoe_builder(spec, start, depth, index == 0, index == self.modules - 1)
        return StageRecord(build, source, f"V-MoE, {depth} block(s)")

    def _describe(self, spec: vmoe.VMoESpec) -> dict:
        return {"kind": "vmoe", "spec": dataclasses.asdict(spec), "depths": list(self.depths)}

    def student(self, index: int) -> Student:
        config = self.config
        spec, _ = vmoe_spec(config, teaching_data(config), stitches=True)
        rate = module_recipe(config, "m2mkd", index).drop_path
        # The published ramp runs over the student's own blocks.
        rates = chain.linear_rates((self.depths[index],), rate)[0] if rate else None
        describe = {**self._describe(spec), "module": index}
        return Student(self._record(spec, index, FRESH), rates, describe)

    def network(self, source: Source) -> Network:
        config = self.config
        spec, _ = vmoe_spec(config, config.data, stitches=config.vmoe.keep_stitches)
        rate = module_recipe(config, "e2e").drop_path
        return Network(
            stages={f"vmoe_{i}": self._record(spec, i, source) for i in range(self.modules)},
            rates=tuple(chain.linear_rates(self.depths, rate)),
            describe=self._describe(spec),
        )

    @property
    def head(self) -> tuple[str, tuple[str, ...]]:
        """The stage and the path of the layer that gives the logits."""
        return f"vmoe_{self.modules - 1}", ("head",)

    def prepare(self, name: str, params: dict, seed: int) -> dict:
        """A fresh stage's parameters as they are."""
        del name, seed
        return params

    def assemble(
        self, network: Mapping[str, dict], taught: Sequence[dict]
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """The students' parameters put into the network's, and where each part came from."""
        params, origin = vmoe.assemble(
            list(network.values()), list(taught), keep_stitches=self.config.vmoe.keep_stitches
        )
        return dict(zip(network, params, strict=True)), origin

    def upcycle(self, network: Mapping[str, dict], dense: Sequence[dict]) -> dict[str, dict]:
        """The network with the dense teacher's weights, its MLPs as every expert's start."""
        params = vmoe.upcycle(list(network.values()), list(dense))
        return dict(zip(network, params, strict=True))


FAMILIES = {"nac": NACFamily, "vmoe": VMoEFamily}


def family(config: ConfigDict) -> NACFamily | VMoEFamily:
    """The family of the config's students."""
    return FAMILIES[config.family](config)
