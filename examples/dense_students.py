"""m2mKD for a plain vision transformer: a small one's modules are students of a larger one's.

python -m m2mkd_jax.main --config=examples/dense_students.py --workdir=runs/dense_digits
docs/your-own-modules.md walks through this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import base, module_recipe, teaching_data
from m2mkd_jax.errors import located, require
from m2mkd_jax.models import chain, registry
from m2mkd_jax.models.vit_spec import ViTSpec
from m2mkd_jax.phases.families import Network, Student, StudentFamily, teacher
from m2mkd_jax.phases.phase import FRESH, StageSpec, WeightsFrom


class Stitched(chain.Stage):
    """Blocks of width D; linear stitches to and from tokens (B, N, X) of the teacher's width X."""

    def __init__(self, description: Mapping[str, Any], index: int, *, rngs: nnx.Rngs):
        self.vit = registry.builder({**description, "kind": "vit"}, f"dense_{index}")(rngs)
        d, x, self.depth = self.vit.spec.width, description["stitch_dim"], self.vit.depth
        self.pre_stitch = None if self.vit.first else nnx.Linear(x, d, rngs=rngs)
        self.post_stitch = None if self.vit.last else nnx.Linear(d, x, rngs=rngs)

    def __call__(self, x: Array, *, rates=None, key=None, train=False) -> Array:
        x = x if self.pre_stitch is None else self.pre_stitch(x)
        x = self.vit(x, rates=rates, key=key, train=train)
        return x if self.post_stitch is None else self.post_stitch(x)


def build_student(description: Mapping[str, Any], index: int) -> registry.Builder:
    return lambda rngs: Stitched(description, index, rngs=rngs)


def student_interface(description: Mapping[str, Any], index: int) -> registry.Interface:
    vit = registry.interface({**description, "kind": "vit"}, [f"dense_{index}"])
    return dataclasses.replace(vit, width=vit.width and description["stitch_dim"])


registry.register_kind("dense_student", build_student, student_interface)


class DenseStudents(StudentFamily):
    """Stages of a small vision transformer, taught between stitches; end to end without them."""

    section = "dense"

    @staticmethod
    def defaults() -> dict[str, Any]:
        return dict(patch=0, width=0, heads=0, depths=())

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.depths = tuple(config.dense.depths)
        self.modules = len(self.depths)

    def check(self, teaching: bool, devices: int) -> None:
        require(self.modules >= 2, "config.dense.depths must name at least two modules")
        with located("config.dense"):
            self._describe(self.config.data)

    def _describe(self, data: ConfigDict) -> dict[str, Any]:
        sizes = [self.config.dense[key] for key in ("patch", "width", "heads")]
        require(min(sizes) > 0, "config.dense needs patch, width and heads")
        spec = dataclasses.asdict(ViTSpec(data.image_size, *sizes, data.classes))
        return {"kind": "vit", "spec": spec, "depths": list(self.depths)}

    def student(self, index: int) -> Student:
        describe = self._describe(teaching_data(self.config)) | {"module": index}
        describe |= {"kind": "dense_student", "stitch_dim": teacher(self.config).width}
        rate = module_recipe(self.config, "m2mkd", index).drop_path
        rates = chain.linear_rates((self.depths[index],), rate)[0]
        stage = StageSpec(build_student(describe, index), FRESH, "stitched ViT blocks")
        return Student(stage, rates, describe)

    def network(self, weights: WeightsFrom) -> Network:
        describe = self._describe(self.config.data)
        names = [f"dense_{i}" for i in range(self.modules)]
        stages = {n: StageSpec(registry.builder(describe, n), weights, "ViT blocks") for n in names}
        rates = chain.linear_rates(self.depths, module_recipe(self.config, "e2e").drop_path)
        return Network(stages, tuple(rates), describe)

    def assemble(self, network: Mapping[str, dict], taught: Sequence[dict]) -> tuple[dict, dict]:
        params = {name: student["vit"] for name, student in zip(network, taught, strict=True)}
        return params, {name: f"m2mkd/{i}" for i, name in enumerate(network)}

    @property
    def head(self) -> tuple[str, tuple[str, ...]]:
        return f"dense_{self.modules - 1}", ("head",)


def get_config() -> ConfigDict:
    config = base("examples.dense_students:DenseStudents")
    config.name = "dense_digits"
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_scratch", "eval")
    data, whole, dense, recipes = config.data, config.teacher, config.dense, config.recipes
    data.name, data.image_size, data.classes = "digits", 32, 10
    data.mean, data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    data.augment.crop, data.augment.shift = "shift", 2
    whole.patch, whole.width, whole.heads, whole.depths = 8, 64, 4, (2,) * 4
    dense.patch, dense.width, dense.heads, dense.depths = 8, 48, 4, (1,) * 4
    epochs = {"pt": 20, "mt": 5, "ft": 6, "m2mkd": 5, "e2e": 16, "fewshot": 20}
    for name, recipe in recipes.items():
        recipe.batch, recipe.lr_per, recipe.lr, recipe.epochs = 48, 0, 2e-3, epochs[name]
        recipe.min_lr, recipe.warmup_lr, recipe.warmup_epochs = 1e-5, 1e-5, 1
        recipe.mixup = recipe.cutmix = 0.0
    recipes.mt.modules = {"0": {"epochs": 10}}
    recipes.m2mkd.modules = {"0": {"epochs": 12, "lr": 3e-3}}
    recipes.ft.lr, recipes.ft.clip = 1e-3, 1.0
    return config
