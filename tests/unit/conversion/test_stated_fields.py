"""Networks of one's own come back from torch's files as the functions that they were."""

import json
import shutil
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

import m2mkd_jax
from m2mkd_jax.conversion.converted import IMAGENET
from m2mkd_jax.conversion.safetensors_file import read_safetensors, write_safetensors
from m2mkd_jax.conversion.stated_fields import STATED, stated_fields, stated_normalisation
from m2mkd_jax.convert.__main__ import main
from m2mkd_jax.errors import UserError

pytest.importorskip("torch")
NAC = {"iterations": 1, "input_latents": 4, "mediator_latents": 6, "output_latents": 3}
NETWORKS = {
    "vit": ("vit_large_patch16_224", {"image_size": 16, "patch": 8, "width": 16, "heads": 4}),
    "one choice": ("vmoe_digits", {"router": "vmoe", "top_k": 1}),
    "experts choose": ("vmoe_digits", {"router": "expert_choice"}),
    "published": ("vmoe_digits", {}),
    "options": ("nac_digits", {"gain": 1.0, "add_one": False, "modulation": "none", **NAC}),
    "no residual": ("nac_digits", {"read_in_residual": False, "truncation": None, **NAC}),
}


def built(name):
    variant, fields = NETWORKS[name]
    if variant.startswith("vit"):
        return m2mkd_jax.build(variant, depths=(1, 1), classes=5, **fields)
    if variant.startswith("vmoe"):
        fields = {"depths": (1, 1), "moe_pos": (0, 1), "image_size": 16, **fields}
    return m2mkd_jax.build(variant, **fields)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_as_it_was(name, suffix, tmp_path):
    model = built(name)
    size = model.description["spec"].get("vit", model.description["spec"])["image_size"]
    images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    described = {**model.description, "normalisation": pixels}
    m2mkd_jax.save_weights(tmp_path / "own", model.trees, described)
    file = tmp_path / f"there.{suffix}"
    assert main([str(tmp_path / "own"), str(file)]) == 0
    assert main([str(file), str(tmp_path / "back")]) == 0
    back = m2mkd_jax.load(tmp_path / "back")
    assert {"mean": back.mean, "std": back.std} == pixels
    assert not m2mkd_jax.load(file).assumed_normalisation
    np.testing.assert_allclose(back(images), model(images), atol=1e-6)
    assert main([str(tmp_path / "back"), str(tmp_path / f"again.{suffix}")]) == 0
    assert (tmp_path / f"again.{suffix}").stat().st_size > 0


def test_an_entry_that_is_none_of_ours_is_refused(tmp_path):
    assert stated_fields({}, tmp_path) == {}
    assert stated_fields({STATED: json.dumps({"router": "vmoe"})}, tmp_path) == {"router": "vmoe"}
    for wrong in ("{", "[1]", 3, json.dumps({"router": 1}), json.dumps({"no_such": 1})):
        with pytest.raises(UserError):
            stated_fields({STATED: wrong}, tmp_path)
    for wrong in ([1], {"mean": [0.5]}, {"mean": [0.5], "std": [0]}, {"mean": "a", "std": [1]}):
        entry = {STATED: json.dumps({"normalisation": wrong})}
        assert stated_fields(entry, tmp_path) == {}
        with pytest.raises(UserError, match="has no mean and std: convert it again"):
            stated_normalisation(entry, tmp_path)


def test_a_network_of_one_channel_needs_a_mean_of_one(tmp_path, capsys):
    model = m2mkd_jax.build(
        "vit_large_patch16_224", image_size=16, patch=8, width=16, heads=4, depths=(1,), channels=1
    )
    own = {**model.description, "normalisation": {"mean": [0.5], "std": [0.25]}}
    m2mkd_jax.save_weights(tmp_path / "own", model.trees, own)
    file, back = tmp_path / "there.safetensors", str(tmp_path / "back")
    assert main([str(tmp_path / "own"), str(file)]) == 0
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    np.testing.assert_allclose(m2mkd_jax.load(file)(images), model(images), atol=1e-6)
    tensors, metadata = read_safetensors(file)
    del metadata[STATED]  # as another program would write it
    arrays = [(name, np.array(tensor.read())) for name, tensor in tensors.items()]
    write_safetensors(file, arrays, metadata)
    (tmp_path / "arch.json").write_text('{"heads": 4}')
    command = [str(file), back, f"--arch={tmp_path / 'arch.json'}"]
    assert main(command) == 2
    assert "its images have 1 channels; give --mean" in capsys.readouterr().err
    assert main([*command, "--mean=0.5", "--std=0.25"]) == 0
    np.testing.assert_allclose(m2mkd_jax.load(back)(images), model(images), atol=1e-6)


def test_arrays_of_other_libraries_are_one_line():
    torch, model = pytest.importorskip("torch"), built("vit")
    for odd in (torch.zeros(1, 16, 16, 3), np.zeros((1, 16, 16, 3), object)):
        with pytest.raises(UserError, match="inputs are floats of NumPy or jax, not this"):
            model(odd)


@pytest.mark.parametrize("command", ["predict", "export", "push"])
def test_a_file_without_mean_and_std_is_said_to_have_none(command, tmp_path, capsys):
    """What is exported or pushed says them as if it knew."""
    model = built("vit")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    fields = {
        "predict": [str(tmp_path / "a.png")],
        "export": [str(tmp_path / "a.mlir"), "--format=stablehlo", "--pixels"],
        "push": ["me/vit", f"--out={tmp_path / 'out'}"],
    }
    run = import_module(f"m2mkd_jax.{command}").main
    for name, change in (("own", 0.1), ("imagenet", 0.0)):
        pixels = {key: [n + change for n in value] for key, value in IMAGENET.items()}
        described = {**model.description, "normalisation": pixels}
        m2mkd_jax.save_weights(tmp_path / name, model.trees, described)
        file = tmp_path / f"{name}.pth"
        assert main([str(tmp_path / name), str(file)]) == 0
        capsys.readouterr()
        assert run([str(file), *fields[command]]) == 0
        said = capsys.readouterr().err
        note = f"note: {file} records no mean and std; ImageNet's are used"
        assert (note in said) == (name == "imagenet"), said
        for made in ("a.mlir", "a.mlir.json"):
            (tmp_path / made).unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
