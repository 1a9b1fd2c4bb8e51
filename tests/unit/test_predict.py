"""The predict command and m2mkd_jax.load: images, labels, arrays, and what they refuse."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import m2mkd_jax
from m2mkd_jax import predict
from m2mkd_jax.checkpoint.files import read_record, write_record
from m2mkd_jax.checkpoint.store import load_weights
from m2mkd_jax.data.augment import evaluation_image
from m2mkd_jax.errors import UserError
from m2mkd_jax.predict.inputs import read_labels
from tests.published_files import ARCH, arch_flag, converted, run
from tests.support import FIXTURES, OUTPUT_TOLERANCE, arrays, assert_close

VIT = FIXTURES / "a_vit_large_meta/finished_checkpoint.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return converted(VIT, tmp_path_factory.mktemp("vit") / "weights", ARCH["a_meta"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, (height, width) in enumerate(((90, 70), (64, 64), (80, 200))):
        pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    return folder


def test_images_are_treated_as_in_evaluation(weights, images, tmp_path):
    names = ["0.png", "1.png", "2.png", "grey.png"]
    text = run(predict, weights, *(images / name for name in names), f"--npz={tmp_path / 'o.npz'}")
    lines = text.splitlines()
    assert len(lines) == 4 and lines[0].startswith(f"{images / '0.png'}: ")
    # The published evaluation: 256 / 224 of the size, centre, ImageNet's mean and deviation.
    pixels = [np.asarray(Image.open(images / name).convert("RGB")) for name in names]
    stack = np.stack([evaluation_image(image, 64) for image in pixels])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = m2mkd_jax.load(weights)(((stack / 255 - mean) / std).astype(np.float32))
    outputs = arrays(tmp_path / "o.npz")
    assert_close(outputs["logits"], expected, OUTPUT_TOLERANCE)
    # Five classes, likeliest first, with their softmax.
    exp = np.exp(outputs["logits"][0] - outputs["logits"][0].max())
    best = np.argsort(-exp)[:5]
    shown = "  ".join(f"{i} {exp[i] / exp.sum():.4f}" for i in best)
    assert lines[0] == f"{images / '0.png'}: {shown}"


def test_more_images_than_a_batch(weights, tmp_path):
    recorded = arrays("a_vit_large_meta/io.npz")
    np.savez(tmp_path / "in.npz", images=recorded["image"].transpose(0, 2, 3, 1))
    files = f"--npz_in={tmp_path / 'in.npz'}", f"--npz={tmp_path / 'out.npz'}"
    run(predict, weights, *files, "--batch=2")
    assert_close(arrays(tmp_path / "out.npz")["logits"], recorded["logits"], OUTPUT_TOLERANCE)


@pytest.mark.parametrize(
    "name, content",
    [
        ("lines.txt", "\n".join(f"class {i}" for i in range(10))),
        ("list.json", json.dumps([f"class {i}" for i in range(10)])),
        ("LIST.JSON", json.dumps([f"class {i}" for i in range(10)], indent=0)),
        ("index.json", json.dumps({str(i): [f"n{i}", f"class {i}"] for i in range(10)})),
    ],
)
def test_labels(name, content, weights, images, tmp_path):
    (tmp_path / name).write_text(content)
    plain = run(predict, weights, images / "0.png").split(": ")[1].split("  ")
    named = run(predict, weights, images / "0.png", f"--labels={tmp_path / name}")
    assert named.split(": ")[1].split("  ") == [f"class {word}" for word in plain]


def test_names_of_classes_that_are_stored_with_the_weights(weights, images, tmp_path):
    trees, description = load_weights(weights)
    stored, names = tmp_path / "named", [f"class {i}" for i in range(10)]
    m2mkd_jax.save_weights(stored, trees, {**description, "class_names": names})
    assert m2mkd_jax.load(stored).class_names == tuple(names)
    assert m2mkd_jax.load(weights).class_names == ()
    plain = run(predict, weights, images / "0.png").split(": ")[1].split("  ")
    named = run(predict, stored, images / "0.png").split(": ")[1].split("  ")
    assert named == [f"class {word}" for word in plain]
    (tmp_path / "other.txt").write_text("\n".join(f"name {i}" for i in range(10)))
    other = run(predict, stored, images / "0.png", f"--labels={tmp_path / 'other.txt'}")
    assert other.split(": ")[1].split("  ") == [f"name {word}" for word in plain]
    m2mkd_jax.save_weights(tmp_path / "few", trees, {**description, "class_names": names[1:]})
    with pytest.raises(UserError, match="9 class_names, 10 classes"):
        m2mkd_jax.load(tmp_path / "few")


def test_names_in_another_order_than_that_of_the_weights_are_refused(tmp_path):
    recorded = [str(i) for i in sorted(range(12), key=str)]  # as class folders 0 to 11 sort
    natural = [str(i) for i in range(12)]
    ids = {str(i): [name, f"digit {name}"] for i, name in enumerate(natural)}
    for name, content in (("a.txt", "\n".join(natural)), ("a.json", json.dumps(ids))):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match='class 2 is "10" there and "2" in the file'):
            read_labels(str(tmp_path / name), 12, recorded)
        assert len(read_labels(str(tmp_path / name), 12)) == 12  # of weights without names
    (tmp_path / "a.txt").write_text("\n".join(recorded))
    assert read_labels(str(tmp_path / "a.txt"), 12, recorded) == recorded


def test_images_are_turned_where_those_of_training_were(weights, tmp_path):
    trees, description = load_weights(weights)
    m2mkd_jax.save_weights(tmp_path / "turned", trees, {**description, "orientation": True})
    pixels = np.random.default_rng(1).integers(0, 256, (90, 70, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # its rows run downwards on the right
    Image.fromarray(pixels).save(tmp_path / "stored.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.png")
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    said = lambda weights, name: run(predict, weights, tmp_path / name).split(": ")[1]
    assert said(tmp_path / "turned", "stored.png") == said(weights, "upright.png")
    assert said(weights, "stored.png") == said(weights, "plain.png") != said(weights, "upright.png")


def test_straight_from_a_torch_file(images, tmp_path, capsys):
    flag = arch_flag(ARCH["a_meta"], tmp_path)
    direct = run(predict, VIT, images / "0.png", flag)
    assert "records no mean and std; ImageNet's are used" in capsys.readouterr().err
    assert direct == run(predict, converted(VIT, tmp_path / "w", ARCH["a_meta"]), images / "0.png")


def test_no_output_replaces_an_input_or_another_output(weights, images, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    before = (folder / "0.png").read_bytes()
    for given, flags, words in (
        (folder / "0.png", (f"--csv={folder / '0.png'}",), "it is read"),
        (folder / "0.png", (f"--json={folder / 'x' / '..' / '0.png'}",), "it is read"),
        (folder, (f"--json={folder / '0.png'}",), "it is read"),
        (folder, (f"--json={weights / 'description.json'}",), f"lies in {weights}, which is read"),
        (folder, (f"--csv={tmp_path / 'o'}", f"--json={tmp_path / 'o'}"), "--csv is written there"),
        (folder, (f"--csv={tmp_path}",), "is a directory"),
        (folder, (f"--draw={tmp_path}",), "is there already"),
    ):
        assert predict.main([str(weights), str(given), *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert (folder / "0.png").read_bytes() == before and not (tmp_path / "o").exists()
    assert m2mkd_jax.load(weights).classes == 10


def test_what_it_refuses(weights, images, tmp_path, capsys):
    def refused(*arguments, words: str) -> None:
        assert predict.main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error

    def npz(**content):
        np.savez(tmp_path / "in.npz", **content)
        return f"--npz_in={tmp_path / 'in.npz'}"

    picture, middle = images / "0.png", FIXTURES / "a_vit_large/rig_vit_large_1.pth"
    good = np.zeros((1, 64, 64, 3), np.float32)
    refused(weights, words="give image files, or --npz_in")
    refused(weights, picture, npz(images=good), words="give image files, or --npz_in")
    refused(tmp_path / "nothing", picture, words="does not exist")
    refused(weights, tmp_path / "nothing.png", words="cannot be read")
    refused(weights, weights / "description.json", words="cannot decode the image")
    refused(weights, npz(pictures=good), words='needs an array "images"')
    refused(weights, npz(images=good.astype(np.uint8)), words="not some floats")
    refused(weights, npz(images=good[:0]), words="not some floats")
    refused(weights, npz(images=np.float32(1)), words="float32 of shape (), not some floats")
    refused(weights, npz(images=good[..., :0]), words="not some floats")
    refused(weights, npz(images=good.transpose(0, 3, 1, 2)), words="takes images (B, 64, 64, 3)")
    refused(weights, npz(images=good[:, :60]), words="takes images (B, 64, 64, 3)")
    refused(weights, npz(images=good, codes=good[0, 0]), words="only single NAC students have")
    refused(weights, npz(images=np.array([None])), words="cannot be read")
    refused(weights, npz(images=good + np.nan), words="not all numbers of its inputs are finite")
    refused(
        weights,
        npz(images=np.float64(good) + 1e300),
        words="not all numbers of its inputs are finite",
    )
    refused(weights, f"--npz_in={picture}", words="cannot be read")
    refused(weights, npz(images=good), "--module=4", words="has no module 4")
    refused(weights, npz(images=good), "--no_such_flag", words="unrecognized arguments")
    refused(weights, npz(images=good), "--module=x", words="invalid int value")
    (tmp_path / "labels.txt").write_text("one\ntwo")
    refused(weights, picture, f"--labels={tmp_path / 'labels.txt'}", words="2 names for 10 classes")
    refused(weights, picture, f"--labels={tmp_path / 'none'}", words="cannot be read")
    (tmp_path / "labels.csv").write_text("\n".join(f"{i},class {i}" for i in range(10)))
    refused(weights, picture, f"--labels={tmp_path / 'labels.csv'}", words="is a table")
    flag = arch_flag(ARCH["a"], tmp_path)
    refused(middle, picture, flag, words="takes tokens (B, N, 24)")
    refused(middle, npz(images=good), flag, words="takes tokens (B, N, 24)")
    tokens = npz(images=np.zeros((1, 17, 24), np.float32))
    refused(middle, tokens, flag, f"--labels={tmp_path / 'labels.txt'}", words="gives tokens")


def test_folders_give_json_csv_features_and_attention(weights, images, tmp_path, capsys):
    folder = tmp_path / "photos" / "more"
    folder.mkdir(parents=True)
    for name in ("0.png", "1.png", "2.png"):
        (folder / name).write_bytes((images / name).read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    out = {name: tmp_path / name for name in ("a.json", "a.csv", "a.npz", "f.npz", "maps")}
    flags = [f"--json={out['a.json']}", f"--csv={out['a.csv']}", f"--npz={out['a.npz']}"]
    flags += [f"--features={out['f.npz']}", f"--attention={out['maps']}", "--top=2", "--batch=2"]
    text = run(predict, weights, tmp_path / "photos", *flags, "--device=cpu", "--workers=1")
    assert "left out: cannot decode the image" in capsys.readouterr().err
    names = [str(folder / f"{i}.png") for i in range(3)]
    assert [line.split(": ")[0] for line in text.splitlines()] == names
    found = json.loads(out["a.json"].read_text())
    logits, features = arrays(out["a.npz"])["logits"], arrays(out["f.npz"])
    for entry, name, row in zip(found, names, logits, strict=True):
        assert entry["image"] == name
        assert [c["class"] for c in entry["classes"]] == np.argsort(-row)[:2].tolist()
    lines = out["a.csv"].read_text().splitlines()
    assert lines[0] == "image,class_1,name_1,probability_1,class_2,name_2,probability_2"
    assert [line.split(",")[0] for line in lines[1:]] == names
    # The head's layer of the features is the logits.
    trees, _ = load_weights(weights)
    head = next(t["params"]["head"] for t in trees.values() if "head" in t["params"])
    assert_close(features["features"] @ head["kernel"] + head["bias"], logits, OUTPUT_TOLERANCE)
    assert features["images"].tolist() == names
    pictures = sorted(path.name for path in out["maps"].iterdir())
    assert pictures == ["0_0.png", "1_1.png", "2_2.png"]
    with Image.open(out["maps"] / "0_0.png") as picture:
        assert picture.size == (128, 64)


def test_names_that_are_not_utf8_are_written_as_they_are(weights, images, tmp_path):
    trees, description = load_weights(weights)
    odd = os.fsdecode(b"caf\xe9")
    m2mkd_jax.save_weights(tmp_path / "w", trees, description | {"class_names": [odd] * 10})
    (tmp_path / "photos").mkdir()
    name = os.fsdecode(bytes(tmp_path / "photos") + b"/\xff.png")
    shutil.copy(images / "0.png", name)
    out = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "npz")}
    flags = [f"--{kind}={path}" for kind, path in out.items()]
    run(predict, tmp_path / "w", tmp_path / "photos", *flags)
    row = out["csv"].read_bytes().splitlines()[1].split(b",")
    assert row[0] == os.fsencode(name) and row[2] == b"caf\xe9"
    (entry,) = json.loads(out["json"].read_text(encoding="utf-8"))
    assert entry["image"] == name and entry["classes"][0]["name"] == odd
    assert arrays(out["npz"])["images"].tolist() == [name]


def test_half_precision_is_near_and_not_equal(weights, images, tmp_path):
    logits = {}
    for precision in ("float32", "bfloat16"):
        out = tmp_path / f"{precision}.npz"
        run(predict, weights, images, f"--npz={out}", f"--precision={precision}", "--quiet")
        logits[precision] = arrays(out)["logits"]
    exact, half = logits["float32"], logits["bfloat16"]
    assert 0 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def test_what_is_left_out_of_a_folder_is_named(weights, images, tmp_path, capsys):
    folder, linked = tmp_path / "folder", tmp_path / "linked"
    (folder / "inner.png").mkdir(parents=True)  # a folder, whatever its name
    linked.mkdir()
    shutil.copy(images / "0.png", linked)
    shutil.copy(images / "1.png", folder / "inner.png")
    (folder / "link").symlink_to(linked)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "phone.heic").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    assert predict.main([str(weights), str(folder), f"--csv={tmp_path / 'a.csv'}", "--quiet"]) == 0
    rows = (tmp_path / "a.csv").read_text().splitlines()[1:]
    found = [str(folder / "inner.png" / "1.png"), str(folder / "link" / "0.png")]
    assert [row.split(",")[0] for row in rows] == found
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"left out: {folder / 'gone.png'} cannot be read" in said[1]
    assert said[0].startswith("warning: left out, no image by its name")
    assert said[0].endswith(str(folder / "phone.heic"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('["a", {"b": 1}]', "is no list of names"),
        ('["a", 1]', "is no list of names"),
        ('["a", NaN]', "NaN is no finite number"),
        ('{"0": "a", "1": "b", "1": "c"}', "a name occurs twice"),
        ('{"0": "a", "2": "b"}', "has 1 names for 2 classes"),
    ],
)
def test_names_of_classes_are_texts_and_stand_once(tmp_path, text, says):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_labels(str(path), 2)
    path.write_text('[["n01", "a"], ["n02", "b"]]')
    assert read_labels(str(path), 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("group", "key", "value", "says"),
    [
        ("normalisation", "mean", None, "mean is None"),
        ("normalisation", "mean", 0.5, "mean is 0.5"),
        ("normalisation", "mean", ["a", "b", "c"], "a finite number per channel"),
        ("normalisation", "mean", [True] * 3, "a finite number per channel"),
        ("normalisation", "mean", [0.5], "other numbers of channels"),
        ("normalisation", "std", [0.0, 0.2, 0.2], "must be above 0"),
        ("", "normalisation", {"mean": [0.5], "std": [0.2]}, "images have 3 channels"),
        ("", "class_names", "abcde", "class_names is no list of names"),
        ("", "class_names", [1, 2, 3], "class_names is no list of names"),
    ],
)
def test_what_weights_record_of_images_is_looked_at(weights, tmp_path, group, key, value, says):
    shutil.copytree(weights, tmp_path / "edited")
    path = tmp_path / "edited" / "description.json"
    record = read_record(path)
    description = record["description"]
    (description[group] if group else description)[key] = value
    write_record(path, record)
    with pytest.raises(UserError, match="does not fit its weights") as error:
        m2mkd_jax.load(tmp_path / "edited")
    assert says in str(error.value)


def test_what_it_refuses_of_folders(weights, images, tmp_path, capsys):
    def refused(*arguments, words: str) -> None:
        assert predict.main([str(a) for a in arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert words in line, line

    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    out = tmp_path / "out"
    refused(weights, empty, words="holds no images")
    refused(weights, broken, f"--csv={out}", f"--attention={out}.d", words="none of the 1 images")
    refused(weights, images, "--top=0", words="--top=0")
    refused(weights, images, "--workers=-1", words="--workers=-1: give a number from 0 on")
    refused(weights, images, "--device=tpu", words="--device=tpu: jax finds none")
    refused(weights, images, "--precision=int8", words="int8")
    refused(weights, images, f"--attention={empty}", words="is there already")
    refused(weights, images, f"--draw={out}", words="--draw is for detectors")
    np.savez(tmp_path / "in.npz", images=np.zeros((1, 64, 64, 3), np.float32))
    refused(weights, f"--npz_in={tmp_path / 'in.npz'}", f"--csv={out}", words="--csv is for image")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "in.npz"]
