"""The commands convert and predict with detectors: both ways, a classifier's file, bad input."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

import m2mkd_jax
from m2mkd_jax import convert, export, predict, push
from m2mkd_jax.checkpoint.store import load_weights, save_weights
from m2mkd_jax.conversion.converted import IMAGENET
from m2mkd_jax.detection.inference import DetectionModel, ImageDetections
from m2mkd_jax.detection.pictures import detect_in_image
from m2mkd_jax.detection.spec import describe
from m2mkd_jax.detection.weights import TREE, write_detector
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import training
from tests.detection_fixtures import state_dict
from tests.support import FIXTURES, arrays, facts
from tests.unit.detection.test_detector import TINY, params

NAMES = {
    "n_detection_backbone": "detector_backbone",
    "n_detection_vitdet": "detector_backbone",
    "n_detection_whole": "detector",
}


def write_arch(folder, kind, **fields):
    path = folder / "arch.json"
    path.write_text(json.dumps({"kind": kind, **fields}))
    return f"--arch={path}"


@pytest.mark.parametrize("name", NAMES)
def test_both_ways(name, tmp_path):
    arch = write_arch(tmp_path, NAMES[name], **facts(f"{name}/meta.json")["kwargs"])
    source, ours, back = FIXTURES / name / "model.pth", tmp_path / "ours", tmp_path / "back.pth"
    assert convert.main([str(source), str(ours), arch]) == 0
    assert convert.main([str(ours), str(back)]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (source, back))
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_without_a_file_get_the_published_names(tmp_path):
    arch = write_arch(tmp_path, "detector", **facts("n_detection_whole/meta.json")["kwargs"])
    source, ours = FIXTURES / "n_detection_whole" / "model.pth", tmp_path / "ours"
    assert convert.main([str(source), str(ours), arch]) == 0
    trees, description = load_weights(ours, [TREE])
    del description["torch"]
    write_detector(ours, description, trees[TREE]["params"], tmp_path / "new.pth")
    before = torch.load(source, weights_only=True)
    after = torch.load(tmp_path / "new.pth", weights_only=True)["model"]
    assert after.keys() == before.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


CLASSIFIER = {"num_heads": 2, "divided_depths": [2, 1, 1, 1], "out_channels": 4}


def classifier(tmp_path):
    weights = arrays("d_vmoe_full/weights.npz")
    torch.save({"model": {k: torch.tensor(v) for k, v in weights.items()}}, tmp_path / "c.pth")
    return weights


def test_a_classifier_becomes_the_backbone(tmp_path, capsys):
    weights = classifier(tmp_path)
    options = {"window_size": 2, "window_block_indexes": [0, 1, 3], "use_rel_pos": True}
    arch = write_arch(tmp_path, "detector_backbone", **CLASSIFIER, **options)
    assert convert.main([str(tmp_path / "c.pth"), str(tmp_path / "ours"), arch, "--seed=3"]) == 0
    said = capsys.readouterr().out
    for words in ("cls_token", "norm.weight", "head.bias", "class token's row is left out"):
        assert words in said
    assert "fresh, from seed 3: pyramid" in said
    net = load_weights(tmp_path / "ours", [TREE])[0][TREE]["params"]["net"]
    np.testing.assert_array_equal(net["pos_embed"], weights["pos_embed"][:, 1:])
    attention = net["segment_1"]["blocks"]["attn"]
    np.testing.assert_array_equal(
        attention["qkv"]["kernel"][0], weights["blocks.2.attn.qkv.weight"].T
    )
    assert not attention["rel_pos_h"].any()


def bad_cases():
    yield "unknown field", {"num_head": 2}, 'unknown field "num_head"; did you mean "num_heads"?'
    yield "not stated", {}, 'do not show "heads"'
    yield "value", {"num_heads": "two"}, "num_heads cannot be 'two'"
    yield "contradiction", {"num_heads": 2, "embed_dim": 17}, "--arch says width 17"
    yield "mlp", {"num_heads": 2, "mlp_ratio": 3}, "mlp_ratio is 4 here, not 3"
    yield "blocks", {"num_heads": 2, "divided_depths": [1, 1]}, "has 4 blocks"
    yield "heads", {"num_heads": 3}, "not a multiple of the 3 heads"


@pytest.mark.parametrize(("fields", "said"), [case[1:] for case in bad_cases()])
def test_a_wrong_arch_file_gives_one_line(fields, said, tmp_path, capsys):
    source = FIXTURES / "n_detection_vitdet" / "model.pth"
    arch = write_arch(tmp_path, "detector_backbone", **fields)
    assert convert.main([str(source), str(tmp_path / "ours"), arch]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("simfp_4.0.weight"), 'tensor "simfp_4.0.weight" is missing'),
        (lambda t: t.update(extra=t["simfp_4.0.norm.bias"]), '"extra" has no place'),
        (lambda t: t.update({"simfp_2.0.bias": torch.ones(3)}), '"simfp_2.0.bias" has shape (3,)'),
        (lambda t: t["simfp_2.0.bias"].fill_(np.nan), "NaN"),
        (lambda t: t.pop("net.blocks.1.norm1.bias"), "norm1.bias"),
    ],
)
def test_a_wrong_file_gives_one_line(change, said, tmp_path, capsys):
    tensors = {k: torch.tensor(v) for k, v in state_dict("n_detection_vitdet").items()}
    change(tensors)
    torch.save(tensors, tmp_path / "m.pth")
    kwargs = facts("n_detection_vitdet/meta.json")["kwargs"]
    arch = write_arch(tmp_path, "detector_backbone", **kwargs)
    assert convert.main([str(tmp_path / "m.pth"), str(tmp_path / "ours"), arch]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_classifier_without_a_block_tensor_is_refused(tmp_path, capsys):
    weights = classifier(tmp_path)
    del weights["blocks.3.norm2.bias"]
    torch.save({k: torch.tensor(v) for k, v in weights.items()}, tmp_path / "c.pth")
    arch = write_arch(tmp_path, "detector_backbone", **CLASSIFIER)
    assert convert.main([str(tmp_path / "c.pth"), str(tmp_path / "ours"), arch]) == 2
    assert 'tensor "net.blocks.3.norm2.bias" is missing' in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    square = dataclasses.replace(TINY.backbone, square=64)
    spec = dataclasses.replace(TINY, backbone=square)
    description = describe(spec) | {"normalisation": IMAGENET, "class_names": ["cat", "dog"]}
    save_weights(folder, {TREE: {"params": params()}}, description)
    return folder


def test_predict_gives_detections_in_the_pixels_of_each_image(tiny, tmp_path):
    rng = np.random.default_rng(0)
    images = {f"image_{i}": rng.integers(0, 256, (40 + i, 64, 3), np.uint8) for i in range(2)}
    np.savez(tmp_path / "in.npz", **images)
    command = [str(tiny), f"--npz_in={tmp_path / 'in.npz'}", f"--npz={tmp_path / 'out.npz'}"]
    assert predict.main(command) == 0
    with np.load(tmp_path / "out.npz") as out:
        for i in range(2):
            count = len(out[f"boxes_{i}"])
            assert count
            assert out[f"masks_{i}"].shape == (count, 28, 28)
            assert (np.diff(out[f"scores_{i}"]) <= 0).all()
            assert out[f"boxes_{i}"].min() >= 0
            assert (out[f"boxes_{i}"].max(0)[2:] <= [64, 40 + i]).all()


def test_predict_draws_and_writes_coco_results(tiny, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (30, 48, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    out = tmp_path / "out.json"
    command = [str(tiny), str(tmp_path / "a.png"), f"--draw={tmp_path / 'drawn'}", f"--json={out}"]
    assert predict.main(command) == 0
    with Image.open(tmp_path / "drawn" / "0_a.png") as picture:
        assert picture.size == (48, 30)
        assert (np.asarray(picture) != image).any()
    results = json.loads(out.read_text())
    assert results[0]["segmentation"]["size"] == [30, 48]
    assert all(r["bbox"][0] + r["bbox"][2] <= 48 + 1e-4 for r in results)
    assert {r["category_id"] for r in results} <= {0, 1}


def test_results_have_the_ids_of_the_training_data(tiny, tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (30, 48, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    trees, own = load_weights(tiny)
    found = {}
    for name, ids in (("none", []), ("coco", [17, 90])):
        save_weights(tmp_path / name, trees, own | {"category_ids": ids})
        out = tmp_path / f"{name}.json"
        assert predict.main([str(tmp_path / name), str(tmp_path / "a.png"), f"--json={out}"]) == 0
        assert ("records no ids of categories" in capsys.readouterr().err) == (name == "none")
        found[name] = [r["category_id"] for r in json.loads(out.read_text())]
    assert found["coco"] == [[17, 90][c] for c in found["none"]] and found["coco"]
    for odd, words in (
        ([17], "1 different ones for 2"),
        ([1, 1], "1 different ones for 2"),
        (["1", "2"], "no list of integers"),
    ):
        save_weights(tmp_path / "odd", trees, own | {"category_ids": odd})
        assert predict.main([str(tmp_path / "odd"), str(tmp_path / "a.png")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_a_job_records_the_ids_of_its_categories(tmp_path, monkeypatch):
    source = SimpleNamespace(class_names=("cat", "book"), categories=(17, 84))
    monkeypatch.setattr(training, "image_source", lambda data, split: source)
    data = ConfigDict({"name": "coco", "objects": 9, "mean": (0.5,), "std": (0.25,)})
    data.image_size, data.augment = 640, ConfigDict({"resize": "plain", "longest": 1333})
    data.augment.test_edge = 400
    phase = SimpleNamespace(
        trainable=("m",), student=("m",), describe={"kind": "detector"}, job="detect", data=data
    )
    joined = SimpleNamespace(split=lambda params: params)
    state = {"params": {"m": {"w": np.zeros(2)}}, "fixed": {}}
    training._save_finished(SimpleNamespace(phase=phase, joined=joined), tmp_path, state, 3, {})
    description = load_weights(tmp_path / "weights")[1]
    assert description["class_names"] == ["cat", "book"]
    assert description["category_ids"] == [17, 84]
    assert description["test_edges"] == [400, 640]


@pytest.mark.parametrize(
    ("edges", "size"),
    [(None, (40, 64)), ([], (20, 32)), ([16, 64], (16, 26)), ([64, 24], (15, 24))],
)
def test_an_image_is_resized_as_evaluation_has_resized_it(edges, size, tiny, tmp_path, monkeypatch):
    trees, own = load_weights(tiny)
    recorded = {} if edges is None else {"test_edges": edges}
    save_weights(tmp_path / "own", trees, own | recorded)
    model, seen = m2mkd_jax.load(tmp_path / "own"), []

    def detect(images):
        seen.extend(image.shape[:2] for image in images)
        return [ImageDetections(np.full((1, 4), 8.0), np.ones(1), np.ones(1), np.ones((1, 28, 28)))]

    monkeypatch.setattr(model, "detect", detect)
    found = detect_in_image(model, np.zeros((20, 32, 3), np.uint8))
    assert seen == [size]
    assert np.allclose(found.boxes[0, 2:], [8 * 32 / size[1], 8 * 20 / size[0]])


def test_a_detector_is_neither_exported_nor_pushed(tiny, tmp_path, capsys):
    """What was pushed could not be loaded again."""
    for main, *arguments in (
        (export.main, str(tmp_path / "a.mlir"), "--format=stablehlo"),
        (push.main, "me/detector", f"--out={tmp_path / 'out'}"),
    ):
        assert main([str(tiny), *arguments]) == 2
        error = capsys.readouterr().err
        assert f"{tiny} is a detector; " in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("edges", [[1], [0, 5], ["a", "b"], 5, [1.5, 2]])
def test_recorded_edges_are_lengths(edges, tiny, tmp_path):
    trees, own = load_weights(tiny)
    save_weights(tmp_path / "own", trees, own | {"test_edges": edges})
    with pytest.raises(UserError, match=r"does not fit its weights .*test_edges"):
        m2mkd_jax.load(tmp_path / "own")


def test_a_detector_takes_pixels_and_a_backbone_normalised_images(tiny, tmp_path):
    detector = m2mkd_jax.load(tiny)
    for images, says in (
        ([], "there are no images"),
        (np.zeros((1, 8, 8, 3), np.float32), r"image 0 is float32 \[8, 8, 3\], not uint8"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)], "image 1 is uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"image 0 is uint8 \[8, 3\], not"),
    ):
        with pytest.raises(UserError, match=says):
            detector.detect(images)
    spec = dataclasses.replace(TINY.backbone, square=64)
    own = {name: params()[name] for name in ("net", "pyramid")}
    described = describe(spec) | {"normalisation": IMAGENET}
    save_weights(tmp_path / "own", {TREE: {"params": own}}, described)
    backbone = m2mkd_jax.load(tmp_path / "own")
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(UserError, match="inputs are floats, not uint8; normalise"):
        backbone.features(pixels)
    with pytest.raises(UserError, match="this is the backbone of a detector"):
        backbone.detect(pixels)


@pytest.mark.parametrize(
    "flag", ["--precision=bfloat16", "--top=3", "--batch=2", "--workers=1", "--csv=x"]
)
def test_flags_that_a_detector_does_not_heed_are_refused(flag, tiny, tmp_path, capsys):
    Image.new("RGB", (48, 30)).save(tmp_path / "a.png")
    assert predict.main([str(tiny), str(tmp_path / "a.png"), flag]) == 2
    name = flag.partition("=")[0]
    assert capsys.readouterr().err == f"m2mkd_jax.predict: {name} is not for detectors\n"


def test_predict_draws_into_a_new_directory(tiny, tmp_path, capsys):
    for name in ("a.png", "0_a.png"):
        Image.new("RGB", (48, 30)).save(tmp_path / name)
    before = (tmp_path / "0_a.png").read_bytes()
    assert predict.main([str(tiny), str(tmp_path / "a.png"), f"--draw={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "is there already" in error and error.count("\n") == 1
    assert (tmp_path / "0_a.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0_a.png", "a.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"images": np.zeros((1, 64, 64, 3), np.float32)}, 'needs arrays "image_0"'),
        ({"image_1": np.zeros((4, 4, 3), np.uint8)}, "no image_0"),
        ({"image_0": np.zeros((4, 4, 3), np.float32)}, "not uint8"),
        ({"image_0": np.zeros((4, 4), np.uint8)}, "not uint8 (H, W, 3)"),
    ],
)
def test_predict_refuses_other_inputs(content, said, tiny, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", **content)
    assert predict.main([str(tiny), f"--npz_in={tmp_path / 'in.npz'}"]) == 2
    assert said in capsys.readouterr().err


def test_a_damaged_description_gives_one_line(tiny):
    description = describe(TINY) | {"normalisation": IMAGENET}
    with pytest.raises(Exception, match="do not describe their network"):
        DetectionModel(description | {"spec": {"classes": 2}}, {})
