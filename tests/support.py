"""Fixtures of the original, and the comparisons that all tests share."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2mkd_jax.conversion.names import vit_stage_names
from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe import vmoe
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.vit_spec import ViTSpec
from tests.torch_arrays import arrays_from_torch

FIXTURES = Path(__file__).parent / "fixtures"
OUTPUT_TOLERANCE = 1e-5  # relative to the largest entry, float32
GRADIENT_TOLERANCE = 1e-4


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name) as file:
        return {key: file[key] for key in file.files}


def facts(name: str) -> dict:
    return json.loads((FIXTURES / name).read_text())


def nhwc(images: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def assert_close(actual, expected, tolerance: float, what: str = "") -> None:
    """Largest difference relative to the largest expected entry; NaN never passes."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-12)
    error = float(np.abs(actual - expected).max(initial=0.0)) / scale
    assert error <= tolerance, f"{what}: relative difference {error:.2e} > {tolerance:.0e}"


def assert_trees_close(actual, expected, tolerance: float, skip=()) -> None:
    flat_actual = jax.tree_util.tree_leaves_with_path(actual)
    flat_expected = dict(jax.tree_util.tree_leaves_with_path(expected))
    assert len(flat_actual) == len(flat_expected)
    for path, leaf in flat_actual:
        name = jax.tree_util.keystr(path)
        if name not in skip:
            assert_close(leaf, flat_expected[path], tolerance, name)


def with_params(build, params: dict, fixed: dict | None = None) -> nnx.Module:
    """The stage that `build(rngs)` makes, with given parameters; shapes must agree."""
    parts = chain.abstract(build)
    fixed = parts.fixed if fixed is None else fixed
    for mine, given in ((parts.params, params), (parts.fixed, fixed)):
        assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, given)
    return chain.merge(parts.graph, jax.tree.map(jnp.asarray, params), fixed)


VIT_SPECS = {
    "a_vit_large": ViTSpec(64, 16, 24, 3, 10, qkv_bias=True, eps=1e-6),
    "b_vit_huge": ViTSpec(56, 14, 30, 3, 10, qkv_bias=False, eps=1e-5),
}
VIT_DEPTHS = {"a_vit_large": (2, 2, 1, 1), "b_vit_huge": (2, 1, 1, 1, 2)}


def vit_stage_params(spec: ViTSpec, weights: dict, depths) -> list[dict]:
    """Parameters of every stage from one state dict with global block numbers."""
    stages, offset = [], 0
    for i, depth in enumerate(depths):
        table = vit_stage_names(
            depth,
            first=i == 0,
            last=i == len(depths) - 1,
            qkv_bias=spec.qkv_bias,
            offset=offset,
        )
        stages.append(arrays_from_torch(table, {e.torch: weights[e.torch] for e in table}))
        offset += depth
    return stages


NAC_SPEC = NACSpec(
    image_size=32,
    classes=10,
    state_dim=24,
    code_dim=20,
    heads=3,
    head_dim=6,
    signature_dim=12,
    input_latents=6,
    mediator_latents=10,
    output_latents=5,
    iterations=3,
    position_dim=7,
)
STUDENT_SPEC = NACSpec(
    **{**NAC_SPEC.__dict__, "image_size": 56},
)
STITCH_DIM = 30

# The original's V-MoE of fixtures d and g, plain and with a stitch wherever two modules meet.
VMOE_DEPTHS = (2, 1, 1, 1)
VMOE_SPEC = vmoe.VMoESpec(ViTSpec(64, 16, 16, 2, 10), tuple(range(5)), experts=8)
VMOE_STITCHED = vmoe.student_spec(VMOE_SPEC, VMOE_DEPTHS, stitch_dim=24)


def vmoe_stage_params(spec: vmoe.VMoESpec, weights: dict) -> list[dict]:
    """Parameters of every stage from one state dict with global block numbers."""
    stages, start = [], 0
    for i, depth in enumerate(VMOE_DEPTHS):
        ends = {"first": i == 0, "last": i == len(VMOE_DEPTHS) - 1}
        table = vmoe_stage_names(spec, start, depth, **ends, offset=start)
        stages.append(arrays_from_torch(table, {e.torch: weights[e.torch] for e in table}))
        start += depth
    return stages
