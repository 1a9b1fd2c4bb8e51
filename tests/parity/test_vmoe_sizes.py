"""Names, shapes and sizes of the published V-MoEs (manifests of their checkpoints)."""

import pytest

from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.models import chain, variants
from m2mkd_jax.models.moe import vmoe
from tests.parity.test_sizes import torch_shapes, total
from tests.support import facts

DEPTHS = (3, 3, 3, 3)
BLOCKS = tuple(range(sum(DEPTHS)))
BASE = vmoe.VMoESpec(variants.vit_variant("vit_base_patch16_224", 1000)[0], BLOCKS, experts=8)
STITCHED = vmoe.student_spec(BASE, DEPTHS, stitch_dim=1024)


def stage(spec, index):
    params = chain.abstract(lambda rngs: vmoe.build_stage(spec, index, DEPTHS, rngs=rngs)).params
    ends = {"first": index == 0, "last": index == len(DEPTHS) - 1}
    return params, ends, sum(DEPTHS[:index])


def names(spec, index, prefix: str, offset: int) -> dict[str, list[int]]:
    params, ends, start = stage(spec, index)
    table = vmoe_stage_names(spec, start, DEPTHS[index], **ends, offset=offset)
    shapes = torch_shapes(table, params, spec.vit.patch)
    assert len(shapes) == len(table) and total(shapes) == chain.count_parameters(params)
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "name, spec, parameters",
    [
        ("vmoe_base.3333", BASE, 483_325_768),
        ("vmoe_base.3333.stitch1024", STITCHED, 488_060_488),
    ],
)
def test_networks(name, spec, parameters):
    ours = {}
    for i in range(len(DEPTHS)):
        # A checkpoint holds every tensor under its stage and under the whole network.
        ours |= names(spec, i, f"stages.{i}.", 0) | names(spec, i, "", sum(DEPTHS[:i]))
    assert ours == facts(f"manifests/{name}.json")
    assert sum(chain.count_parameters(stage(spec, i)[0]) for i in range(len(DEPTHS))) == parameters


@pytest.mark.parametrize(
    "name, index, parameters",
    [
        ("idx0", 0, 121_984_792),
        ("idx1", 1, 122_031_384),
        ("idx1", 2, 122_031_384),
        ("idx-1", 3, 122_012_928),
    ],
)
def test_students(name, index, parameters):
    """Students count their blocks from 0."""
    ours = names(STITCHED, index, "", 0) | names(STITCHED, index, "stages.0.", 0)
    assert ours == facts(f"manifests/vmoe_student_base.{name}.json")
    assert chain.count_parameters(stage(STITCHED, index)[0]) == parameters
    built = chain.abstract(
        lambda rngs: vmoe.build_student(BASE, index, DEPTHS, 1024, rngs=rngs)
    ).params
    assert built == stage(STITCHED, index)[0]
