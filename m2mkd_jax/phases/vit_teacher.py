"""The published teacher: a vision transformer cut into modules, and its small meta model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import meta_depths
from m2mkd_jax.config.networks import teacher_spec
from m2mkd_jax.errors import require
from m2mkd_jax.models import registry
from m2mkd_jax.phases.families import Teacher
from m2mkd_jax.phases.phase import StageSpec, WeightsFrom


class ViTTeacher(Teacher):
    """Stages of one vision transformer: config.teacher."""

    def __init__(self, config: ConfigDict):
        self._config = config
        self.depths, self.meta_depths = tuple(config.teacher.depths), meta_depths(config)
        self.modules = len(self.depths)

    @property
    def width(self) -> int:
        """Channels of the tokens between two modules. Raises UserError: no such transformer."""
        return teacher_spec(self._config)[0].width

    def check(self) -> None:
        """Raises UserError where modules or blocks do not fit."""
        config = self._config
        require(self.modules >= 2, "config.teacher.depths must name at least two modules")
        require(
            len(self.meta_depths) == self.modules,
            f"config.teacher.meta_depths has {len(self.meta_depths)} modules, "
            f"config.teacher.depths {self.modules}",
        )
        _, depth = teacher_spec(config)
        require(
            depth is None or sum(self.depths) == depth,
            f"config.teacher.depths sum to {sum(self.depths)}; {config.teacher.variant} has "
            f"{depth}",
        )

    def meta(self, index: int, weights: WeightsFrom) -> StageSpec:
        """Module `index` of the meta model."""
        return self._stage(self.meta_depths, index, weights)

    def module(self, index: int, weights: WeightsFrom) -> StageSpec:
        """Module `index` of the teacher."""
        return self._stage(self.depths, index, weights)

    def _stage(self, depths: Sequence[int], index: int, weights: WeightsFrom) -> StageSpec:
        spec, _ = teacher_spec(self._config)
        first, last = index == 0, index == len(depths) - 1
        build = registry.vit_builder(spec, depths[index], first, last)
        return StageSpec(build, weights, f"ViT, {depths[index]} block(s)")

    def describe(self, depths: Sequence[int]) -> dict[str, Any]:
        """The transformer's fields."""
        spec, _ = teacher_spec(self._config)
        return {"kind": "vit", "spec": dataclasses.asdict(spec), "depths": list(depths)}
