"""V-MoE students: stages of a vision transformer with experts, with stitches at their open ends.

The network that is trained end to end has the same stages, with or without the stitches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import module_recipe, recipe_name, teaching_data
from m2mkd_jax.config.family_sections import SECTIONS
from m2mkd_jax.config.networks import teacher_spec, vmoe_spec
from m2mkd_jax.errors import UserError, require
from m2mkd_jax.models import chain, registry, vit
from m2mkd_jax.models.moe import assembly, dispatch
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.phases import families
from m2mkd_jax.phases.families import Network, Reduction, Student, StudentFamily
from m2mkd_jax.phases.phase import FRESH, StageSpec, WeightsFrom
from m2mkd_jax.phases.vit_teacher import ViTTeacher


class VMoEFamily(StudentFamily):
    """Stages of a vision transformer with experts; see the module."""

    section = "vmoe"
    defaults = staticmethod(SECTIONS["vmoe"])

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.depths = tuple(config.vmoe.depths)
        self.modules = len(self.depths)
        self.parts = f"config.vmoe.depths is {self.depths}"

    def check(self, teaching: bool, devices: int) -> None:
        """Raises UserError where config.vmoe does not fit the rest of the config."""
        config = self.config
        require(
            self.modules >= 2 and min(self.depths) >= 1,
            f"config.vmoe.depths is {self.depths}; it must name at least two modules of one block "
            "or more",
        )
        spec, depth = vmoe_spec(config, config.data)
        require(
            depth is None or sum(self.depths) == depth,
            f"config.vmoe.depths sum to {sum(self.depths)}; {config.vmoe.variant} has {depth}",
        )
        require(
            all(0 <= block < sum(self.depths) for block in spec.moe_pos),
            f"config.vmoe.moe_pos is {spec.moe_pos}; blocks are 0 to {sum(self.depths) - 1}",
        )
        require(
            spec.router != "published" or not spec.top_k == 1 < spec.experts,
            "config.vmoe.top_k: the published router's weight of a single choice is always 1 and "
            'teaches it nothing; use 2 or more, or config.vmoe.router="vmoe"',
        )
        for name in ("m2mkd", "e2e", "fewshot"):
            if any(recipe_name(phase) == name for phase in config.phases):
                for index in range(self.modules) if name == "m2mkd" else (None,):
                    self._check_recipe(name, index, spec.group, devices)
        self._check_surroundings(devices)

    def _check_surroundings(self, devices: int) -> None:
        """Refuses phases or a mesh that a V-MoE has no use for."""
        config, fields = self.config, self.config.vmoe
        require(
            not fields.keep_stitches
            or "m2mkd" in config.phases
            or bool(config.init.students or config.init.network),
            "config.vmoe.keep_stitches: without students there are no stitches to keep",
        )
        expert = config.mesh.expert
        require(
            expert < 1 or fields.experts % expert == 0,
            f"config.mesh.expert is {expert}; it must divide the {fields.experts} experts of "
            "config.vmoe.experts",
        )
        group = devices // max(config.mesh.data, 1) if expert < 1 else expert
        left = [count for count in self._fewer_experts() if count % group]
        require(
            not (left and config.evaluation.reductions and "eval" in config.phases),
            f"config.evaluation.reductions leaves {left[0] if left else 0} of {fields.experts} "
            f"experts, which cannot be dealt over the {group} devices of config.mesh.expert; set it"
            " False here, and measure with --only=eval on another mesh",
        )

    def _fewer_experts(self) -> list[int]:
        """How many experts the reductions leave, falling."""
        fields = self.config.vmoe
        counts = {max(fields.experts // n, fields.top_k) for n in (2, 4)}
        return sorted((count for count in counts if count < fields.experts), reverse=True)

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

    def _stage(self, spec: VMoESpec, index: int, weights: WeightsFrom) -> StageSpec:
        start, depth = sum(self.depths[:index]), self.depths[index]
        build = registry.vmoe_builder(spec, start, depth, index == 0, index == self.modules - 1)
        return StageSpec(build, weights, f"V-MoE, {depth} block(s)")

    def _describe(self, spec: VMoESpec) -> dict:
        return {"kind": "vmoe", "spec": dataclasses.asdict(spec), "depths": list(self.depths)}

    def student(self, index: int) -> Student:
        """Stage `index`, with stitches where it meets its neighbours."""
        config = self.config
        spec, _ = vmoe_spec(config, teaching_data(config), families.teacher(config).width)
        rate = module_recipe(config, "m2mkd", index).drop_path
        # The published ramp runs over the student's own blocks.
        rates = chain.linear_rates((self.depths[index],), rate)[0] if rate else None
        describe = {**self._describe(spec), "module": index}
        return Student(self._stage(spec, index, FRESH), rates, describe)

    def network(self, weights: WeightsFrom) -> Network:
        """All stages in a row."""
        config = self.config
        stitch_dim = families.teacher(config).width if config.vmoe.keep_stitches else 0
        spec, _ = vmoe_spec(config, config.data, stitch_dim)
        rate = module_recipe(config, "e2e").drop_path
        return Network(
            stages={f"vmoe_{i}": self._stage(spec, i, weights) for i in range(self.modules)},
            rates=tuple(chain.linear_rates(self.depths, rate)),
            describe=self._describe(spec),
        )

    @property
    def head(self) -> tuple[str, tuple[str, ...]]:
        """The stage and the path of the layer that gives the logits."""
        return f"vmoe_{self.modules - 1}", ("head",)

    def assemble(
        self, network: Mapping[str, dict], taught: Sequence[dict]
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """The students' parameters put into the network's, and where each part came from."""
        params, origin = assembly.assemble(
            list(network.values()), list(taught), keep_stitches=self.config.vmoe.keep_stitches
        )
        return dict(zip(network, params, strict=True)), origin

    def reductions(
        self, network: Mapping[str, dict], seed: int, seen: Mapping[str, Any]
    ) -> Iterator[Reduction]:
        """Fewer choices per token; fewer experts, in each block those of least load go first."""
        del seed
        config = self.config
        stitch_dim = families.teacher(config).width if config.vmoe.keep_stitches else 0
        spec, _ = vmoe_spec(config, config.data, stitch_dim)
        trees = {name: dict(tree) for name, tree in network.items()}
        for choices in range(spec.top_k - 1, 0, -1):
            yield Reduction("choices per token", choices, self._smaller(spec, top_k=choices), trees)
        if "load" not in seen:
            return
        order = np.argsort(-np.asarray(seen["load"]), axis=-1, kind="stable")
        for count in self._fewer_experts():
            kept, smaller = np.sort(order[:, :count]), {}
            for name, tree in trees.items():
                params, kept = assembly.keep_experts(tree["params"], kept)
                smaller[name] = {**tree, "params": params}
            title = "experts, least load first"
            yield Reduction(title, count, self._smaller(spec, experts=count), smaller)

    def _smaller(self, spec: VMoESpec, **fields: Any) -> dict[str, StageSpec]:
        """The network's stages with other fields of the spec."""
        changed = dataclasses.replace(spec, **fields)
        return {f"vmoe_{i}": self._stage(changed, i, FRESH) for i in range(self.modules)}

    def check_upcycling(self) -> None:
        """Refuses a teacher whose weights have no place in the network. Raises UserError."""
        config = self.config
        spec, _ = vmoe_spec(config, config.data)
        require(
            not config.vmoe.keep_stitches,
            "config.vmoe.keep_stitches: the dense teacher of e2e_upcycled has no stitches",
        )
        require(
            isinstance(families.teacher(config), ViTTeacher),
            'config.teacher.family: e2e_upcycled needs the vision transformer as teacher, ""',
        )
        dense, _ = teacher_spec(config)
        fields = ("width", "heads", "patch", "qkv_bias", "eps")
        same = all(getattr(dense, field) == getattr(spec.vit, field) for field in fields)
        blocks, own = sum(config.teacher.depths), sum(self.depths)
        require(
            same and blocks == own,
            "config.phases: e2e_upcycled needs a teacher with the V-MoE's patch, width, heads, "
            f"qkv_bias, eps and number of blocks; the teacher is {dense.width} wide and {blocks} "
            f"deep, the V-MoE {spec.vit.width} and {own}",
        )

    def upcycle(self, network: Mapping[str, dict], dense: Sequence[nnx.Module]) -> dict[str, dict]:
        """The network with the dense teacher's weights, its MLPs as every expert's start."""
        cut = [chain.split(stage).params for stage in vit.cut(dense, self.depths)]
        params = assembly.upcycle(list(network.values()), cut)
        return dict(zip(network, params, strict=True))
