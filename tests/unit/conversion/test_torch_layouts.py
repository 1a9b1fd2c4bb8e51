"""Layouts beyond the recorded ones: plain ViTs, fused experts, other number types,
safetensors, resized positions."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m2mkd_jax import convert, load
from m2mkd_jax.conversion.resize_positions import resize_positions
from tests.published_files import (
    ARCH,
    arch_flag,
    assert_same_tensors,
    converted,
    description,
    run,
)
from tests.published_files import load as load_torch
from tests.support import FIXTURES, OUTPUT_TOLERANCE, arrays, assert_close

WHOLE = FIXTURES / "a_vit_large/finished_checkpoint.pth"


def plain_state() -> dict[str, torch.Tensor]:
    """The recorded ViT as DeiT and timm name it."""
    return {k: v for k, v in load_torch(WHOLE)["model"].items() if not k.startswith("stages.")}


@pytest.fixture(scope="module")
def recorded():
    io = arrays("a_vit_large/io.npz")
    return io["image"].transpose(0, 2, 3, 1), io["logits"]


@pytest.mark.parametrize("form", ["bare", "model", "state_dict", "data parallel", "safetensors"])
def test_plain_vits(form, tmp_path, recorded):
    state, file = plain_state(), tmp_path / "plain.pth"
    content = {
        "model": {"model": state, "args": "of the run"},
        "state_dict": {"state_dict": state},
        "data parallel": {"model": {f"module.{k}": v for k, v in state.items()}},
    }.get(form, state)
    if form == "safetensors":
        file = tmp_path / "plain.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        torch.save(content, file)
    # Without depths it is one stage; --arch may cut it.
    depths = [6] if form == "bare" else [3, 3]
    arch = ARCH["a"] | {"depths": depths}
    if form == "bare":
        del arch["depths"]
    weights = converted(file, tmp_path / "weights", arch)
    assert description(weights)["depths"] == depths
    assert_close(load(weights)(recorded[0]), recorded[1], OUTPUT_TOLERANCE)
    back = tmp_path / f"back{file.suffix}"
    run(convert, weights, back)
    if form == "safetensors":
        assert_same_files(file, back)
    else:
        assert_same_tensors(file, back)


def assert_same_files(file, other) -> None:
    mine, theirs = load_file(file), load_file(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_number_types_come_back(dtype, suffix, tmp_path):
    state = {name: tensor.to(dtype).contiguous() for name, tensor in plain_state().items()}
    file, back = tmp_path / f"half.{suffix}", tmp_path / f"back.{suffix}"
    torch.save(state, file) if suffix == "pth" else save_file(state, file)
    weights = converted(file, tmp_path / "weights", {"kind": "vit", "heads": 3})
    assert load(weights)(np.zeros((1, 64, 64, 3), np.float32)).dtype == np.float32
    run(convert, weights, back)
    (assert_same_tensors if suffix == "pth" else assert_same_files)(file, back)


def test_experts_of_one_tensor(tmp_path):
    """Older FastMoE releases stack all experts of a layer."""
    state = load_torch(FIXTURES / "d_vmoe_full/finished_checkpoint.pth")["model"]
    state = {k: v for k, v in state.items() if not k.startswith("stages.")}
    fused = {k: v for k, v in state.items() if ".experts." not in k}
    for block in range(5):
        for tensor in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"):
            name = f"blocks.{block}.moe.experts"
            singles = [state[f"{name}.{e}.{tensor}"] for e in range(8)]
            fused[f"{name}.{tensor}"] = torch.cat(singles)
    torch.save({"model": fused}, tmp_path / "fused.pth")
    weights = converted(tmp_path / "fused.pth", tmp_path / "weights", ARCH["vmoe"])
    single = converted(
        FIXTURES / "d_vmoe_full/finished_checkpoint.pth", tmp_path / "single", ARCH["vmoe"]
    )
    sums = [json.loads((w / "description.json").read_text())["trees"] for w in (weights, single)]
    assert sums[0] == sums[1]  # the same arrays to the bit
    run(convert, weights, tmp_path / "back.pth")
    assert_same_tensors(tmp_path / "fused.pth", tmp_path / "back.pth")


def test_a_vmoe_without_its_stitches(tmp_path):
    """An empty list drops them; left out, they are as in the file."""
    file = FIXTURES / "d_vmoe_full_stitch/finished_checkpoint.pth"
    kept = converted(file, tmp_path / "kept", ARCH["vmoe"])
    assert description(kept)["spec"]["pre_stitch_pos"] == [2, 3, 4]
    none = ARCH["vmoe"] | {"pre_stitch_pos": [], "post_stitch_pos": []}
    dropped = converted(file, tmp_path / "dropped", none)
    found = description(dropped)
    assert found["spec"]["stitch_dim"] == 0
    assert set(found["conversion"]["ignored"].values()) >= {"stitch, dropped"}
    other = converted(file, tmp_path / "other", none | {"stitch_dim": 0})  # the same in other words
    assert description(other)["spec"] == found["spec"]


@pytest.mark.parametrize("flags", ["image_size", "arch"])
def test_another_image_size(flags, tmp_path):
    arch = ARCH["a"] | ({"image_size": 112} if flags == "arch" else {})
    flag = ["--image_size=112"] if flags == "image_size" else []
    weights = converted(WHOLE, tmp_path / "weights", arch, *flag)
    model = load(weights)
    assert model.image_size == 112
    assert model(np.zeros((1, 112, 112, 3), np.float32)).shape == (1, 10)
    run(convert, weights, tmp_path / "back.pth")
    back = load_torch(tmp_path / "back.pth")
    before = plain_state()["pos_embed"].numpy()
    for tensor in (back["model"]["pos_embed"], back["model_stages"][0]["pos_embed"]):
        assert (tensor.numpy() == resize_positions(before, 7)).all()
    assert "resized" in str(description(weights)["conversion"]["notes"])


@pytest.mark.parametrize(
    "file, arch",
    [
        ("a_vit_large/finished_checkpoint.pth", "a"),
        ("a_vit_large/rig_vit_large_1.pth", "a"),
        ("d_vmoe_student_1/finished_checkpoint.pth", "vmoe_1"),
        ("e_nac/checkpoint_best.pt", "nac"),
        ("f_students/ReadOutStudent.pth", "students"),
    ],
)
def test_through_safetensors(file, arch, tmp_path):
    """Into safetensors, which keeps the names of the network, and out of it again."""
    weights = converted(FIXTURES / file, tmp_path / "weights", ARCH[arch])
    run(convert, weights, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    content = load_torch(FIXTURES / file)
    state = content.get("model", content.get("block_state_dict"))
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"  # transformers asks for it
    other_names = {name: stored for name, stored in metadata.items() if stored in tensors}
    assert all(torch.equal(tensors[other_names.get(n, n)], tensor) for n, tensor in state.items())
    assert tensors.keys() - state.keys() <= {"codes", "states"}
    assert not any(name.startswith("stages.") for name in tensors)
    numbers = sum(tensor.numel() for tensor in state.values())
    assert len(other_names) == len(state) - len(tensors.keys() & state.keys())
    assert not other_names or sum(t.numel() for t in tensors.values()) == numbers // 2
    again = converted(tmp_path / "x.safetensors", tmp_path / "again", ARCH[arch])
    sums = [json.loads((w / "description.json").read_text())["trees"] for w in (weights, again)]
    assert sums[0] == sums[1]
    found = [description(w) for w in (weights, again)]
    assert [f.get("module") for f in found] == [found[0].get("module")] * 2
    assert found[0].get("depths") == found[1].get("depths")


def test_overwriting(tmp_path, capsys):
    weights = converted(WHOLE, tmp_path / "weights", ARCH["a"])
    before = description(weights)
    assert convert.main([str(WHOLE), str(weights)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    arch = tmp_path / "arch.json"
    arch.write_text(json.dumps(ARCH["a"] | {"depths": [6]}))
    run(convert, WHOLE, weights, f"--arch={arch}", "--overwrite")
    assert description(weights)["depths"] == [6] != before["depths"]
    # Only what such a conversion makes is replaced.
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    flags = [f"--arch={arch}", "--overwrite"]
    assert convert.main([str(WHOLE), str(tmp_path / "precious"), *flags]) == 2
    assert (tmp_path / "precious" / "file").exists()
    assert convert.main([str(weights), str(weights / "back.pth")]) == 2
    assert "which is read" in capsys.readouterr().err and not (weights / "back.pth").exists()
    (weights / "thesis.txt").touch()
    capsys.readouterr()
    assert convert.main([str(WHOLE), str(weights), *flags]) == 2
    assert "holds thesis.txt" in capsys.readouterr().err and (weights / "thesis.txt").exists()


def test_an_image_size_beyond_the_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def too_large(embedding, side):
        raise MemoryError("Unable to allocate 37.3 GiB")

    monkeypatch.setattr("m2mkd_jax.conversion.from_torch.resize_positions", too_large)
    flags = [arch_flag(ARCH["a"], tmp_path), "--image_size=1024"]
    assert convert.main([str(WHOLE), str(tmp_path / "weights"), *flags]) == 2
    error = capsys.readouterr().err
    assert "give a smaller --image_size" in error and error.count("\n") == 1
    assert not (tmp_path / "weights").exists()
