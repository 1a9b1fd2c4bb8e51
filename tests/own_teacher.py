"""A teacher that is no transformer: perceptrons on tokens, mixed over the image.

Axes: B batch, S image side, P patch side, N tokens, D width, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from einops import rearrange
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import meta_depths, teaching_data
from m2mkd_jax.errors import require
from m2mkd_jax.models import chain, layers, registry
from m2mkd_jax.phases.families import Teacher
from m2mkd_jax.phases.phase import StageSpec, WeightsFrom


class MixerStage(chain.Stage):
    """Images (B, S, S, 3) or tokens (B, N, D) -> tokens (B, N, D) or logits (B, K).

    Args:
        fields: width D, patch P, classes K, and tokens: N to mix all of them by a matrix (N, N), 0
            to mix by their mean, whatever their number.
        depth: layers of this stage.
    """

    def __init__(
        self, fields: Mapping[str, int], depth: int, first: bool, last: bool, *, rngs: nnx.Rngs
    ):
        d, n, self.patch = fields["width"], fields["tokens"], fields["patch"]
        self.depth, self.first, self.last, self.matrix = depth, first, last, bool(n)
        if first:
            self.embed = nnx.Linear(3 * self.patch**2, d, rngs=rngs)
        for i in range(depth):
            setattr(self, f"mix_{i}", nnx.Linear(n or d, n or d, rngs=rngs))
            setattr(self, f"mlp_{i}", nnx.Linear(d, d, rngs=rngs))
        if last:
            self.head = nnx.Linear(d, fields["classes"], rngs=rngs)

    def __call__(self, x: jax.Array, *, rates=None, key=None, train=False) -> jax.Array:
        if self.first:
            x = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)
            x = self.embed(x)
        for i in range(self.depth):
            mix, mlp = getattr(self, f"mix_{i}"), getattr(self, f"mlp_{i}")
            if self.matrix:
                x = x + mix(x.swapaxes(1, 2)).swapaxes(1, 2)
            else:
                x = x + layers.gelu(mix(x.mean(1, keepdims=True)))
            x = x + layers.gelu(mlp(x))
        return self.head(x.mean(1)) if self.last else x


@functools.cache
def _builder(fields: tuple[tuple[str, int], ...], depth: int, first: bool, last: bool) -> Any:
    return lambda rngs: MixerStage(dict(fields), depth, first, last, rngs=rngs)


def build(description: Mapping[str, Any], index: int) -> registry.Builder:
    depths = description["depths"]
    fields = tuple(sorted(description["spec"].items()))
    return _builder(fields, depths[index], index == 0, index == len(depths) - 1)


def interface(description: Mapping[str, Any], index: int) -> registry.Interface:
    spec, last = description["spec"], index == len(description["depths"]) - 1
    return registry.Interface(
        image_size=0 if index else spec["image_size"],
        width=spec["width"] if index else 0,
        classes=spec["classes"] if last else 0,
    )


registry.register_kind("mixer", build, interface)


class MixerTeacher(Teacher):
    """config.teacher's patch, width and depths; config.teacher.options.matrix: mix by a matrix."""

    def __init__(self, config: ConfigDict):
        self._config = config
        self.depths, self.meta_depths = tuple(config.teacher.depths), meta_depths(config)
        self.modules = len(self.depths)

    @property
    def width(self) -> int:
        return self._config.teacher.width

    def check(self) -> None:
        fields = self._config.teacher
        require(min(fields.patch, fields.width) > 0, "config.teacher needs patch and width")
        require(self.modules >= 2, "config.teacher.depths must name at least two modules")

    def meta(self, index: int, weights: WeightsFrom) -> StageSpec:
        return self._stage(self.meta_depths, index, weights)

    def module(self, index: int, weights: WeightsFrom) -> StageSpec:
        return self._stage(self.depths, index, weights)

    def _stage(self, depths: Sequence[int], index: int, weights: WeightsFrom) -> StageSpec:
        return StageSpec(build(self.describe(depths), index), weights, "mixer")

    def describe(self, depths: Sequence[int]) -> dict[str, Any]:
        fields, data = self._config.teacher, teaching_data(self._config)
        tokens = (data.image_size // fields.patch) ** 2 if fields.options.get("matrix") else 0
        spec = {
            "image_size": data.image_size,
            "classes": data.classes,
            "width": fields.width,
            "patch": fields.patch,
            "tokens": tokens,
        }
        return {"kind": "mixer", "spec": spec, "depths": list(depths)}
