"""Staged vision transformers against the original (fixtures a, b)."""

import functools

import jax
import pytest
from flax import nnx

from m2mkd_jax.conversion.names import vit_stage_names
from m2mkd_jax.models import chain, vit
from tests.support import (
    OUTPUT_TOLERANCE,
    VIT_DEPTHS,
    VIT_SPECS,
    arrays,
    assert_close,
    nhwc,
    vit_stage_params,
    with_params,
)
from tests.torch_arrays import arrays_from_torch, arrays_to_torch

NAMES = tuple(VIT_SPECS)


def stage_with(spec, depths, i, params) -> vit.ViTStage:
    return with_params(lambda rngs: vit.build(spec, depths, rngs=rngs)[i], params)


def load(name: str, meta: bool = False) -> list[vit.ViTStage]:
    spec, depths = VIT_SPECS[name], VIT_DEPTHS[name]
    depths = (1,) * len(depths) if meta else depths
    weights = arrays(f"{name}{'_meta' if meta else ''}/weights.npz")
    params = vit_stage_params(spec, weights, depths)
    used = {
        e.torch for e in vit_stage_names(sum(depths), first=True, last=True, qkv_bias=spec.qkv_bias)
    }
    assert used == set(weights)
    return [stage_with(spec, depths, i, p) for i, p in enumerate(params)]


def run_part(stages, depths, i, x):
    """Stage i of the same blocks in stages of other depths."""
    return vit.cut(stages, depths)[i](x)


@pytest.mark.parametrize("meta", [False, True], ids=["network", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_range(name, meta):
    stages = load(name, meta)
    io = arrays(f"{name}{'_meta' if meta else ''}/io.npz")
    total = sum(stage.depth for stage in stages)
    image = nhwc(io["image"])
    last = nnx.clone(stages[-1])
    last.head = lambda features: features

    @jax.jit
    def run(x):
        return chain.run(stages, x), chain.run([*stages[:-1], last], x)

    logits, features = run(image)
    assert_close(logits, io["logits"], OUTPUT_TOLERANCE)
    assert_close(features, io["features"], OUTPUT_TOLERANCE)
    ranges = [key for key in io if key.startswith("range_")]
    assert ranges
    for key in ranges:
        span, source = key.removeprefix("range_").split(".from_")
        start, end = (int(n) for n in span.split("_"))
        x = image if source == "image" else io[source]
        if (start, end) == (0, 0):
            # The original applies the final norm when `end` is 0, and then takes the class token.
            actual = jax.jit(lambda x: stages[-1].features(stages[0].embed(x)))(x)
        elif start == end:
            actual = x
        else:
            depths = [n for n in (start, end - start, total - end) if n]
            part = functools.partial(run_part, stages, depths, 1 if start else 0)
            actual = jax.jit(part)(x)
        assert_close(actual, io[key], OUTPUT_TOLERANCE, key)


@pytest.mark.parametrize("name", NAMES)
def test_split_teacher_modules(name):
    spec, depths = VIT_SPECS[name], VIT_DEPTHS[name]
    io = arrays(f"{name}/teacher_modules_io.npz")
    for i, depth in enumerate(depths):
        table = vit_stage_names(
            depth, first=i == 0, last=i == len(depths) - 1, qkv_bias=spec.qkv_bias
        )
        params = arrays_from_torch(table, arrays(f"{name}/module_{i}.npz"))
        x = nhwc(io["image"]) if i == 0 else io["tokens"]
        stage = jax.jit(stage_with(spec, depths, i, params).__call__)
        assert_close(stage(x), io[f"module_{i}.out"], OUTPUT_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_names_go_back(name):
    spec, depths = VIT_SPECS[name], VIT_DEPTHS[name]
    weights = arrays(f"{name}/weights.npz")
    table = vit_stage_names(sum(depths), first=True, last=True, qkv_bias=spec.qkv_bias)
    back = arrays_to_torch(table, arrays_from_torch(table, weights), spec.patch)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert (back[key] == value).all(), key
