"""Names, shapes and sizes of the published networks (manifests of their checkpoints).

Nothing is allocated: our shapes come from `chain.abstract`, theirs from the manifests, and the
tables of conversion/names.py join them.
"""

import pytest

from m2mkd_jax.conversion.names import vit_stage_names
from m2mkd_jax.conversion.names_nac import nac_names, nac_student_names
from m2mkd_jax.models import chain, variants, vit
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.spec import STAGE_STRIDE, STEM_STRIDE, NACSpec
from m2mkd_jax.models.nac.students import build_student
from tests.support import facts

VITS = {
    "vit_huge_patch14_224.4333333334": ((4, 3, 3, 3, 3, 3, 3, 3, 3, 4), 631_922_920),
    "vit_huge_patch14_224.meta10": ((1,) * 10, 199_103_720),
    "vit_large_patch16_224.6666": ((6, 6, 6, 6), 304_326_632),
    "vit_large_patch16_224.meta4": ((1, 1, 1, 1), 52_402_152),
}
WIDTHS = {
    "tinyimnet": {"state_dim": 384, "code_dim": 384, "heads": 6, "ffn_capacity": 2.0},
    "imnet": {"state_dim": 512, "code_dim": 512, "heads": 8, "ffn_capacity": 1.0},
}
NACS = {
    "tinyimnet": (NACSpec(64, 200, 384, 384, 6, 64, 256, 64, ffn_capacity=2.0), 26_703_342),
    "imnet": (NACSpec(224, 1000, 512, 512, 8, 192, 768, 64, ffn_capacity=1.0), 37_589_294),
}
MODULES = 10
STUDENTS = {
    ("tinyimnet", "readin"): 4_093_286,
    ("tinyimnet", "mediator"): 3_496_070,
    ("tinyimnet", "readout"): 3_389_423,
    ("imnet", "readin"): 5_898_246,
    ("imnet", "mediator"): 4_725_510,
    ("imnet", "readout"): 4_583_407,
}


def torch_shapes(table, params, patch=None) -> dict[str, list[int]]:
    """What each tensor of the table has as its shape in PyTorch, from the shapes of our arrays."""
    shapes = {}
    for entry in table:
        node = params
        for name in entry.path:
            node = node[name]
        shape = node.shape
        if entry.index is not None:
            index = entry.index if isinstance(entry.index, tuple) else (entry.index,)
            assert all(i < n for i, n in zip(index, shape, strict=False)), entry
            shape = shape[len(index) :]
        if entry.layout == "linear":
            c, d = shape
            shape = (d, c)
        elif entry.layout == "patches":
            stem = "downsample_layers.0." in entry.torch
            side = patch or (STEM_STRIDE if stem else STAGE_STRIDE)
            rows, d = shape
            assert rows % side**2 == 0
            shape = (d, rows // side**2, side, side)
        elif entry.layout == "depthwise":
            k, k2, c = shape
            shape = (c, 1, k, k2)
        elif entry.layout == "grid":
            h, w, c = shape
            shape = (c, h, w)
        elif entry.layout == "expert":
            shape = (1, *shape[::-1])
        else:
            assert entry.layout == "same"
        shapes[entry.torch] = list(shape)
    return shapes


def total(shapes) -> int:
    count = 0
    for shape in shapes.values():
        size = 1
        for n in shape:
            size *= n
        count += size
    return count


@pytest.mark.parametrize("name", VITS)
def test_vision_transformers(name):
    depths, parameters = VITS[name]
    spec, published_depth = variants.vit_variant(name.split(".")[0], 1000)
    assert "meta" in name or sum(depths) == published_depth
    manifest = facts(f"manifests/{name}.json")
    ours, counted, offset = {}, 0, 0
    for i, depth in enumerate(depths):
        ends = {"first": i == 0, "last": i == len(depths) - 1}
        params = chain.abstract(
            lambda rngs, depth=depth, ends=ends: vit.ViTStage(spec, depth, **ends, rngs=rngs)
        ).params
        # A checkpoint holds every tensor twice: under its stage and under the whole network.
        for prefix, start in ((f"stages.{i}.", 0), ("", offset)):
            table = vit_stage_names(depth, **ends, qkv_bias=spec.qkv_bias, offset=start)
            shapes = torch_shapes(table, params, spec.patch)
            ours |= {prefix + key: shape for key, shape in shapes.items()}
        assert total(shapes) == chain.count_parameters(params)
        counted += chain.count_parameters(params)
        offset += depth
    assert ours == manifest
    assert counted == parameters


@pytest.mark.parametrize("name", NACS)
def test_circuits(name):
    spec, parameters = NACS[name]
    params = chain.abstract(lambda rngs: NAC(spec, rngs=rngs)).params
    manifest = facts(f"manifests/nac_scale_{name}.json")
    assert torch_shapes(nac_names(spec), params) == manifest
    assert chain.count_parameters(params) == total(manifest) == parameters


@pytest.mark.parametrize("config, kind", STUDENTS)
def test_students(config, kind):
    """Both are distilled on ImageNet at 224 pixels, for a meta model of width 1280."""
    spec = NACSpec(
        224, 1000, input_latents=1, mediator_latents=1, output_latents=1, **WIDTHS[config]
    )
    index = {"readin": 0, "mediator": 1, "readout": MODULES - 1}[kind]
    params = chain.abstract(
        lambda rngs: build_student(spec, index, MODULES, 1280, 1, rngs=rngs)
    ).params
    manifest = facts(f"manifests/nac_student_{config}.{kind}.stitch1280.json")
    assert torch_shapes(nac_student_names(spec, kind), params) == manifest
    assert chain.count_parameters(params) == total(manifest) == STUDENTS[config, kind]
