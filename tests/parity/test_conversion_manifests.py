"""Checkpoints with the names and shapes of every published network (manifests).

In full size nothing is allocated: names and shapes alone decide what network it is. With every
large dimension divided by 16 they are files on disk, and go through the command.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from m2mkd_jax import convert
from m2mkd_jax.conversion import from_torch, torch_layouts
from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.conversion.resize_positions import resize_positions
from m2mkd_jax.conversion.torch_weights import torch_weights_of
from m2mkd_jax.models import variants
from m2mkd_jax.models.nac.spec import NACSpec
from tests.parity.test_sizes import WIDTHS
from tests.published_files import assert_same_tensors, finished_checkpoint, run
from tests.support import FIXTURES, OUTPUT_TOLERANCE, arrays, assert_close, facts

MANIFESTS = sorted(file.stem for file in (FIXTURES / "manifests").glob("*.json"))
TINY, LARGE = WIDTHS["tinyimnet"], WIDTHS["imnet"]


def vit(name: str, depths: list[int], **more) -> dict:
    spec = dataclasses.asdict(variants.vit_variant(name, 1000)[0])
    return {"kind": "vit", "spec": spec, "depths": depths, **more}


def vmoe(depths: list[int], pre=(), post=(), classes=1000, **more) -> dict:
    """V-MoE-Base, every MLP of which is a mixture of 8 experts."""
    base = dataclasses.asdict(variants.vit_variant("vit_base_patch16_224", classes)[0])
    stitches = {
        "stitch_dim": 1024 if pre or post else 0,
        "pre_stitch_pos": pre,
        "post_stitch_pos": post,
    }
    spec = {"vit": base, "moe_pos": tuple(range(sum(depths))), "experts": 8, **stitches}
    return {"kind": "vmoe", "spec": spec, "depths": depths, **more}


def nac(*sizes, **more) -> dict:
    return {"kind": "nac", "spec": dataclasses.asdict(NACSpec(*sizes, **more))}


def student(module: int, **widths) -> dict:
    """One of ten, as a file of its own; distilled on ImageNet at 224 pixels."""
    spec = NACSpec(224, 1000, input_latents=1, mediator_latents=1, output_latents=1, **widths)
    return {
        "kind": "nac_student",
        "spec": dataclasses.asdict(spec),
        "module": module,
        "modules": 3,
        "stitch_dim": 1280,
    }


# Without --arch. A module that has no head says nothing on its classes; the published variant of
# its width says the rest.
PUBLISHED = {
    "vit_huge_patch14_224.4333333334": vit("vit_huge_patch14_224", [4] + [3] * 8 + [4]),
    "vit_huge_patch14_224.meta10": vit("vit_huge_patch14_224", [1] * 10),
    "vit_large_patch16_224.6666": vit("vit_large_patch16_224", [6] * 4),
    "vit_large_patch16_224.meta4": vit("vit_large_patch16_224", [1] * 4),
    "vmoe_base.3333": vmoe([3] * 4),
    "vmoe_base.3333.stitch1024": vmoe([3] * 4, (3, 6, 9), (2, 5, 8)),
    "vmoe_student_base.idx0": vmoe([3], (), (2,), 1, first=True, last=False),
    "vmoe_student_base.idx1": vmoe([3], (0,), (2,), 1, first=False, last=False),
    "vmoe_student_base.idx-1": vmoe([3], (0,), (), first=False, last=True),
    "nac_scale_tinyimnet": nac(64, 200, 384, 384, 6, 64, 256, 64, ffn_capacity=2.0),
    "nac_scale_imnet": nac(224, 1000, 512, 512, 8, 192, 768, 64, ffn_capacity=1.0),
    "nac_scale_fewshot": nac(224, 8, 512, 512, 8, 192, 768, 64, ffn_capacity=1.0),
    **{
        f"nac_student_{config}.{kind}.stitch1280": student(module, **widths)
        for config, widths in (("tinyimnet", TINY), ("imnet", LARGE))
        for module, kind in enumerate(("readin", "mediator", "readout"))
    },
}


def unread() -> np.ndarray:
    raise AssertionError("nothing needs to be read")


@pytest.mark.parametrize("name", MANIFESTS)
def test_names_and_shapes_decide(name):
    manifest = facts(f"manifests/{name}.json")
    state = {n: Tensor(n, tuple(s), "float32", (n,), unread, False) for n, s in manifest.items()}
    contents = torch_layouts.contents_of(finished_checkpoint(state), Path(name))
    # Every tensor has its place, every array its tensor, every shape fits: or it would raise.
    found = from_torch.convert_torch_weights(
        torch_weights_of(contents, Path(name)), {}, Path(name)
    ).description
    expected = PUBLISHED[name]
    # A middle student shows neither image size nor classes.
    hidden = ("image_size", "classes") if "mediator" in name else ()
    for field, value in expected["spec"].items():
        assert found["spec"][field] == value or field in hidden, field
    for field in ("depths", "modules", "module", "stitch_dim", "first", "last"):
        assert found.get(field) == expected.get(field), field


def small(shape: list[int]) -> list[int]:
    return [n // 16 if n >= 64 and n % 16 == 0 else n for n in shape]


ON_DISK = [name for name in MANIFESTS if name != "nac_scale_fewshot"]  # the one of ImageNet again


@pytest.mark.parametrize("name", ON_DISK)
def test_on_disk(name, tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        n: torch.randn(small(s), generator=generator)
        for n, s in facts(f"manifests/{name}.json").items()
    }
    checkpoint = finished_checkpoint(state)
    torch.save(checkpoint, tmp_path / "source.pth")
    # Heads, and eps without biases, cannot be seen, and these widths are no published ones.
    fields = {"kind": PUBLISHED[name]["kind"], "heads": 2}
    fields |= {"eps": 1e-5} if name.startswith("vit_huge") else {}
    arch = tmp_path / "arch.json"
    arch.write_text(json.dumps(fields))
    weights = tmp_path / "weights"
    text = run(convert, tmp_path / "source.pth", weights, f"--arch={arch}")
    distinct = {id(t): t for t in checkpoint["model"].values()}.values()
    numbers = sum(t.numel() for t in distinct)
    assert f"{len(distinct)} tensors used" in text
    assert f"{numbers:,} parameters, {4 * numbers:,} bytes" in text
    assert all(f"model.{key} " in text for key in state)  # every name has its line
    assert "sha256" in text and text.splitlines()[-1].endswith("GiB")
    run(convert, weights, tmp_path / "back.pth")
    assert_same_tensors(tmp_path / "source.pth", tmp_path / "back.pth", ignore=("codes", "states"))


@pytest.mark.parametrize("sizes", ["4_7", "7_4", "14_24", "1_3"])
def test_position_embeddings_are_resized_as_published(sizes):
    """Recorded from torch.nn.functional.interpolate, bicubic, corners not aligned."""
    recorded = arrays("bicubic.npz")
    resized = resize_positions(recorded[f"{sizes}.in"], int(sizes.split("_")[1]))
    assert_close(resized, recorded[f"{sizes}.out"], OUTPUT_TOLERANCE)
    assert (resized[:, 0] == recorded[f"{sizes}.in"][:, 0]).all()
