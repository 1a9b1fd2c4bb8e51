"""Files as the published programs write them: the fixtures' own, and made-up ones."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m2mkd_jax import convert, predict
from m2mkd_jax.checkpoint.files import read_json
from tests.support import FIXTURES


def _transformer(kind: str, width: int, depths: list[int], **fields: Any) -> dict[str, Any]:
    common = {"kind": kind, "width": width, "depths": depths, "classes": 10}
    return (
        common | {"patch": 16, "heads": 3, "image_size": 64, "qkv_bias": True, "eps": 1e-6} | fields
    )


B_VIT = {"patch": 14, "image_size": 56, "qkv_bias": False, "eps": 1e-5}
ARCH: dict[str, dict[str, Any] | str] = {
    "a": _transformer("vit", 24, [2, 2, 1, 1]),
    "a_meta": _transformer("vit", 24, [1] * 4),
    "b": _transformer("vit", 30, [2, 1, 1, 1, 2], **B_VIT),
    "b_meta": _transformer("vit", 30, [1] * 5, **B_VIT),
    "vmoe": _transformer("vmoe", 16, [2, 1, 1, 1], heads=2, experts=8, moe_pos=[0, 1, 2, 3, 4]),
    "vmoe_0": _transformer(
        "vmoe",
        16,
        [2],
        heads=2,
        experts=8,
        moe_pos=[0, 1],
        idx=0,
        post_stitch_pos=[1],
        stitch_dim=24,
    ),
    "vmoe_1": _transformer(
        "vmoe",
        16,
        [1],
        heads=2,
        experts=8,
        moe_pos=[0],
        idx=1,
        pre_stitch_pos=[0],
        post_stitch_pos=[0],
        stitch_dim=24,
    ),
    "vmoe_last": _transformer(
        "vmoe", 16, [1], heads=2, experts=8, moe_pos=[0], idx=-1, pre_stitch_pos=[0], stitch_dim=24
    ),
    "nac": str(FIXTURES / "e_nac/config.yml"),
    "nac_fields": {"kind": "nac", "heads": 3},
    "students": str(FIXTURES / "f_students/student_config.yml"),
}
ARCH["vmoe_stitch"] = ARCH["vmoe"] | {
    "pre_stitch_pos": [2, 3, 4],
    "post_stitch_pos": [1, 2, 3],
    "stitch_dim": 24,
}


TINY = {"kind": "vit", "heads": 1}  # the fields of `tiny_state` that shapes do not show


def tiny_state() -> dict[str, torch.Tensor]:
    """A ViT of one block: the smallest file with everything in it."""
    d, generator = 4, torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 5, d),
        "patch_embed.proj.weight": (d, 3, 2, 2),
        "patch_embed.proj.bias": (d,),
        "blocks.0.norm1.weight": (d,),
        "blocks.0.norm1.bias": (d,),
        "blocks.0.attn.qkv.weight": (3 * d, d),
        "blocks.0.attn.qkv.bias": (3 * d,),
        "blocks.0.attn.proj.weight": (d, d),
        "blocks.0.attn.proj.bias": (d,),
        "blocks.0.norm2.weight": (d,),
        "blocks.0.norm2.bias": (d,),
        "blocks.0.mlp.fc1.weight": (4 * d, d),
        "blocks.0.mlp.fc1.bias": (4 * d,),
        "blocks.0.mlp.fc2.weight": (d, 4 * d),
        "blocks.0.mlp.fc2.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "head.weight": (3, d),
        "head.bias": (3,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saved(folder: Path, content: Any) -> Path:
    """A file that torch.save wrote."""
    torch.save(content, folder / "source.pth")
    return folder / "source.pth"


@dataclass(frozen=True)
class Case:
    """A published file, and what the original computed with it.

    arch: in ARCH. recorded: the file of arrays; `x` its input, `y` its output in there.
    """

    file: str
    arch: str
    recorded: str = ""
    x: str = ""
    y: str = ""


def _cases() -> Iterator[Case]:
    for name, arch in (("a_vit_large", "a"), ("b_vit_huge", "b")):
        for suffix in ("", "_meta"):
            folder = f"{name}{suffix}"
            yield Case(
                f"{folder}/finished_checkpoint.pth",
                f"{arch}{suffix}",
                f"{folder}/io.npz",
                "image",
                "logits",
            )
        for file in sorted((FIXTURES / name).glob("rig*.pth")):
            i = int(file.stem[-1])
            yield Case(
                f"{name}/{file.name}",
                arch,
                f"{name}/teacher_modules_io.npz",
                "tokens" if i else "image",
                f"module_{i}.out",
            )
    for name, arch in (
        ("assembled_plain", "vmoe"),
        ("full", "vmoe"),
        ("full_stitch", "vmoe_stitch"),
        ("student_0", "vmoe_0"),
        ("student_1", "vmoe_1"),
        ("student_last", "vmoe_last"),
    ):
        x = "tokens" if name in ("student_1", "student_last") else "image"
        folder = f"d_vmoe_{name}"
        yield Case(f"{folder}/finished_checkpoint.pth", arch, f"{folder}/io.npz", x, f"{x}.out")
    yield Case("e_nac/checkpoint_best.pt", "nac", "e_nac/io.npz", "raw_inputs", "zero.outputs")
    yield Case(
        "f_nac_from_students/nac_state_dict.pth",
        "nac",
        "f_nac_from_students/io.npz",
        "raw_inputs",
        "zero.outputs",
    )
    yield Case("h_regularisers/checkpoint_best.pt", "nac_fields")
    for name, x, y in (
        ("ReadInStudent", "image", "out_1"),
        ("MediatorStudent_1", "tokens", "out"),
        ("MediatorStudent_2", "tokens", "out"),
        ("MediatorStudent_3", "tokens", "out"),
        ("ReadOutStudent", "tokens", "zero.out_1"),
    ):
        yield Case(f"f_students/{name}.pth", "students", f"f_students/{name}_io.npz", x, y)


CASES = list(_cases())


def arch_flag(arch: dict | str, folder: Path) -> str:
    """--arch for fields (written to a JSON file) or a path."""
    if isinstance(arch, dict):
        file = folder / f"arch_{abs(hash(json.dumps(arch)))}.json"
        file.write_text(json.dumps(arch))
        arch = str(file)
    return f"--arch={arch}"


def run(command: Any, *arguments: Any) -> str:
    """A command in this process; what it printed. It must succeed."""
    text = io.StringIO()
    with redirect_stdout(text):
        code = command.main([str(argument) for argument in arguments])
    assert code == 0, arguments
    return text.getvalue()


def converted(source: Any, target: Path, arch: dict | str = "", *flags: str) -> Path:
    """Runs the convert command, and returns where the weights are."""
    where = target.parent
    where.mkdir(parents=True, exist_ok=True)
    run(convert, source, target, *([arch_flag(arch, where)] if arch else []), *flags)
    return target


def description(weights: Path) -> dict[str, Any]:
    """What is saved with weights about their network."""
    return read_json(weights / "description.json")["description"]


def predicted(weights: Path, folder: Path, *flags: str) -> str:
    """Runs the predict command on folder/in.npz; outputs go to folder/out.npz."""
    return run(
        predict, weights, f"--npz_in={folder / 'in.npz'}", f"--npz={folder / 'out.npz'}", *flags
    )


def tensors(content: Any, path: tuple = ()) -> Iterator[tuple[tuple, torch.Tensor]]:
    """Every tensor of a loaded file with its path."""
    if isinstance(content, torch.Tensor):
        yield path, content
    elif isinstance(content, Mapping | list):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from tensors(value, (*path, key))


def load(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def assert_same_tensors(file: Path, other: Path, ignore: tuple[str, ...] = ()) -> None:
    """Equal names, types, shapes and bits; optimizer states and `ignore` apart."""
    ignore = ("optimizer", *ignore)
    mine, theirs = (
        {path: t for path, t in tensors(load(f)) if path[0] not in ignore} for f in (file, other)
    )
    assert mine.keys() == theirs.keys()
    for path, tensor in mine.items():
        assert tensor.dtype == theirs[path].dtype and torch.equal(tensor, theirs[path]), path


def finished_checkpoint(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The published layout of a staged network, from names like a manifest's: what has several
    names is one tensor."""
    depths: dict[int, int] = {}
    for name in state:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            stage = int(match[1])
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
    aliased, whole = {}, {}
    for name, tensor in state.items():
        match = re.match(r"stages\.(\d+)\.(blocks\.(\d+)\.)?(.+)$", name)
        plain = name
        if match:
            block = int(match[3] or 0) + sum(depths[s] for s in range(int(match[1])))
            plain = f"blocks.{block}.{match[4]}" if match[2] else match[4]
        aliased[name] = whole.setdefault(plain, tensor)
    stages = [
        {n.split(".", 2)[2]: t for n, t in aliased.items() if n.startswith(f"stages.{i}.")}
        for i in sorted(depths)
    ]
    return {"model": aliased, "model_stages": stages, "epoch": 99}
