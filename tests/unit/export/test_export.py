"""A network as StableHLO or ONNX computes what it computed, or is refused and leaves nothing."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax2onnx.converter import conversion_api
from jax2onnx.plugins import plugin_system

import m2mkd_jax
from m2mkd_jax.export import main
from tests.support import assert_close

TOLERANCE = 1e-4
NAMES = ("vit", "nac", "vmoe")
SMALL_VMOE = {"image_size": 16, "patch": 8, "width": 16, "heads": 2, "moe_pos": (1,)}
SMALL_VMOE |= {"depths": (1, 1), "experts": 4}
SMALL_NAC = {"image_size": 16, "state_dim": 16, "code_dim": 16, "heads": 2, "head_dim": 8}
SMALL_NAC |= {"signature_dim": 8, "input_latents": 4, "mediator_latents": 8, "output_latents": 4}
SMALL_NAC |= {"iterations": 1, "position_dim": 4, "tokenizer_depths": (1, 1)}
SMALL_NAC |= {"prior": "barabasi-albert", "options": {"m": 2}}


def build(name: str) -> m2mkd_jax.Model:
    if name == "vit":
        sizes = {"classes": 5, "image_size": 16, "patch": 8, "width": 16, "heads": 2, "depth": 2}
        return m2mkd_jax.build("vit_large_patch16_224", **sizes)
    if name == "nac":
        return m2mkd_jax.build("nac_digits", **SMALL_NAC)
    return m2mkd_jax.build("vmoe_digits", **SMALL_VMOE)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The networks by name, and directories of their weights."""
    folder, found = tmp_path_factory.mktemp("networks"), {}
    for name in NAMES:
        found[name] = build(name)
        m2mkd_jax.save_weights(folder / name, found[name].trees, found[name].description)
    return folder, found


@pytest.fixture(autouse=True)
def plugins_of_jax_alone(monkeypatch):
    """Those for equinox and for jax2onnx's own examples take a quarter of a minute to import."""
    root = Path(plugin_system.__file__).parent

    def load() -> None:
        for part in ("jax", "flax"):
            plugin_system._import_tree(root / part, f"jax2onnx.plugins.{part}")

    monkeypatch.setattr(conversion_api, "import_all_plugins", load)


def images(count: int, model: m2mkd_jax.Model) -> np.ndarray:
    shape = (count, model.image_size, model.image_size, 3)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_stablehlo_takes_any_number_of_images(name, networks, tmp_path):
    folder, found = networks
    out = tmp_path / "program"
    assert main([str(folder / name), str(out), "--format=stablehlo"]) == 0
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    for count in (1, 3):  # the command has compiled the network for them
        x = images(count, found[name])
        assert_close(program.call(x), found[name](x), TOLERANCE)
    facts = json.loads(Path(f"{out}.json").read_text())
    assert facts["input"]["shape"] == ["B", 16, 16, 3]
    assert facts["output"]["shape"] == ["B", found[name].classes]


@pytest.mark.parametrize(
    ("name", "batch"), [("vit", 0), ("vmoe", 0), ("vit", 2), ("vmoe", 2), ("nac", 2)]
)
def test_onnx_computes_the_same(name, batch, networks, tmp_path):
    folder, found = networks
    out = tmp_path / "model.onnx"
    assert main([str(folder / name), str(out), "--format=onnx", f"--batch={batch}"]) == 0
    facts = json.loads(Path(f"{out}.json").read_text())
    session = onnxruntime.InferenceSession(out.read_bytes())
    for count in (batch,) if batch else (1, 4):
        x = images(count, found[name])
        (logits,) = session.run([facts["output_name"]], {facts["input_name"]: x})
        assert_close(logits, found[name](x), TOLERANCE)


def test_what_jax2onnx_cannot_do_is_said_in_one_line(networks, tmp_path, capsys):
    out = tmp_path / "nac.onnx"
    assert main([str(networks[0] / "nac"), str(out), "--format=onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "jax2onnx" in line and "--batch=N" in line
    assert not list(tmp_path.iterdir())


def test_pixels_are_normalised_inside(networks, tmp_path):
    folder, found = networks
    out, model = tmp_path / "program", found["vit"]
    assert main([str(folder / "vit"), str(out), "--format=stablehlo", "--pixels", "--batch=2"]) == 0
    pixels = np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3), np.uint8)
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    normalised = (pixels / 255 - np.asarray(model.mean)) / np.asarray(model.std)
    assert_close(program.call(pixels), model(normalised.astype(np.float32)), TOLERANCE)


def test_a_middle_module_takes_tokens(networks, tmp_path):
    folder, found = networks
    out = tmp_path / "program"
    assert main([str(folder / "vmoe"), str(out), "--format=stablehlo", "--module=1"]) == 2
    command = [str(folder / "vmoe"), str(out), "--format=stablehlo", "--module=1", "--tokens=5"]
    assert main(command) == 0
    middle = m2mkd_jax.load(folder / "vmoe", 1)
    x = jnp.ones((3, 5, found["vmoe"].description["spec"]["vit"]["width"]))
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    assert_close(program.call(x), middle(x), TOLERANCE)


def test_wrong_input_is_one_line_and_leaves_nothing(networks, tmp_path, capsys, monkeypatch):
    vit, out = str(networks[0] / "vit"), str(tmp_path / "out")

    def refused(*arguments: str, words: str) -> None:
        assert main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not list(tmp_path.iterdir())

    refused(vit, out, words="--format")
    refused(vit, out, "--format=tflite", words="tflite")
    refused(vit, out, "--format=stablehlo", "--platforms=gpu", words='"gpu" is none of')
    refused(vit, out, "--format=onnx", "--platforms=cpu", words="--format=stablehlo")
    refused(vit, out, "--format=stablehlo", "--batch=-1", words="--batch=-1")
    refused(vit, out, "--format=stablehlo", "--tokens=3", words="takes images")
    refused(vit, str(tmp_path), "--format=stablehlo", words="is a directory")
    refused(str(tmp_path / "none"), out, "--format=stablehlo", words="does not exist")
    monkeypatch.setattr("m2mkd_jax.export.command.LARGEST", 1000)
    refused(vit, out, "--format=stablehlo", words="ends at 2 GiB")
    monkeypatch.undo()
    monkeypatch.setattr("m2mkd_jax.export.command.TOLERANCE", -1.0)
    refused(vit, out, "--format=stablehlo", words="nothing is written")
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "jax2onnx", None)
    refused(vit, out, "--format=onnx", words="pip install 'm2mkd_jax[onnx]'")
    Path(out).write_text("mine")
    assert main([vit, out, "--format=stablehlo"]) == 2 and Path(out).read_text() == "mine"


def test_no_file_but_an_earlier_program_is_replaced(networks, tmp_path, capsys):
    vit = tmp_path / "vit"
    shutil.copytree(networks[0] / "vit", vit)
    (tmp_path / "labels.json").write_text("mine")
    before = (vit / "description.json").read_bytes()
    for out, flags, words in (
        (tmp_path / "labels", (), "labels.json is there already"),
        (vit / "description", ("--overwrite",), f"lies in {vit}, which is read"),
        (vit, ("--overwrite",), "it is read"),
    ):
        assert main([str(vit), str(out), "--format=stablehlo", *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert (tmp_path / "labels.json").read_text() == "mine"
    assert (vit / "description.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.json", "vit"]
