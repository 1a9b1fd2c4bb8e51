"""Inputs that are often wrong in practice: read rightly, or refused in one line."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2mkd_jax.conversion.arch_flag import read_arch
from m2mkd_jax.data import check, layouts, prepare
from m2mkd_jax.data.coco import read_coco
from m2mkd_jax.data.decode import DamagedImage, decode
from m2mkd_jax.data.formats import huggingface, tables, tar
from m2mkd_jax.detection.weights import read_arch_file
from m2mkd_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
RAMP = np.arange(0, 256, 32, dtype=np.uint8)[None].repeat(2, 0)


def encoded(pixels, form="PNG", **options):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form, **options)
    return content.getvalue()


def pack(path, *names, links=(), content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            data = content or encoded(RAMP)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return path


def refusal(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000", "train"),
        ("imagenet_train_0001", "train"),
        ("latest-train-00", "train"),
        ("training.01", "train"),
        ("TRAIN0", "train"),
        ("val-000", "test"),
        ("x-validation-3", "test"),
        ("my.test.1", "test"),
        ("devkit", None),
    ],
)
def test_the_split_of_a_shard_is_a_whole_word_of_its_name(tmp_path, name, split):
    pack(tmp_path / f"{name}.tar", "a/1.png")
    for each in ("train", "test"):
        assert [p.stem for p in tar.shards(tmp_path, each)] == [name] * (each == split)


@pytest.mark.parametrize("name", ["train-for-test-0", "trainset-0", "contest-0", "interval-1"])
def test_a_shard_of_an_ambiguous_name_is_refused(tmp_path, name):
    pack(tmp_path / f"{name}.tar", "a/1.png")
    assert name in refusal(tar.shards, tmp_path, "train")


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.zst"])
@pytest.mark.parametrize("place", ["train-{}", "train/{}"])
def test_a_compressed_shard_among_others_is_not_left_out(tmp_path, place, suffix):
    first, second = (tmp_path / f"{place.format(i)}.tar" for i in range(2))
    pack(first, "a/1.png")
    packed = second.with_name(f"{second.stem}.{suffix}")
    packed.write_bytes(b"any")
    assert f"{packed} is compressed" in refusal(tar.shards, tmp_path, "train")
    pack(second, "a/2.png")  # what it was packed from, or unpacked to
    assert tar.shards(tmp_path, "train") == [first, second]
    for path in (first, second):
        path.unlink()
    assert tar.shards(tmp_path, "train") == []


def test_a_set_whose_names_count_its_parts_is_whole(tmp_path):
    names = [f"train-{i:05d}-of-00003.tar" for i in range(3)]
    for name in (*names, "val-1-of-2.tar", "val-2-of-2.tar", "val-extra.tar"):
        pack(tmp_path / name, "a/1.png")
    assert [path.name for path in tar.shards(tmp_path, "train")] == names
    assert len(tar.shards(tmp_path, "test")) == 3
    (tmp_path / names[1]).unlink()
    assert f"{names[1]} is missing, 1 of 3 parts" in refusal(tar.shards, tmp_path, "train")
    (tmp_path / "val-1-of-2.tar").unlink()
    assert "val-1-of-2.tar is missing" in refusal(tar.shards, tmp_path, "test")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train-00001-of-00002.parquet").write_bytes(b"")
    assert "train-00000-of-00002.parquet is missing" in refusal(huggingface.find, tmp_path / "more")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a b", {"train": "a b"}),
        ("my-train-0 my-test-0", {"train": "my-train-0", "test": "my-test-0"}),
        ("train_0 valid_0 dev_0", {"train": "train_0", "valid": "valid_0", "": "dev_0"}),
        ("train-0 train-1 testing-0", {"train": "train-0 train-1", "testing": "testing-0"}),
        ("Training Validation test", {"training": "Training", "validation": "Validation"}),
    ],
)
def test_the_split_of_a_parquet_file_is_a_whole_word_of_its_name(tmp_path, names, expected):
    for name in names.split():
        (tmp_path / f"{name}.parquet").touch()
    found = huggingface._parquet(tmp_path)
    stems = {split: " ".join(Path(path).stem for path in paths) for split, paths in found.items()}
    assert stems == expected | ({"test": "test"} if "Training" in names else {})


@pytest.mark.parametrize("name", ["train-val-0", "pretrain-0", "contest-0"])
def test_a_parquet_file_of_an_ambiguous_name_is_refused(tmp_path, name):
    (tmp_path / "train-0.parquet").touch()
    (tmp_path / f"{name}.parquet").touch()
    assert f"{name}.parquet: does its name mean training or" in refusal(huggingface.find, tmp_path)


def test_parquet_files_in_two_places_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-0.parquet", "data/train-0.parquet"):
        (tmp_path / name).touch()
    assert "data/train-0.parquet: which of them is meant?" in refusal(huggingface.find, tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    """Editors on Windows write one."""
    (tmp_path / "fields.json").write_text('{"heads": 4}', encoding="utf-8-sig")
    assert read_arch(str(tmp_path / "fields.json"), "vit", None) == {"heads": 4}
    (tmp_path / "detector.json").write_text('{"kind": "detector"}', encoding="utf-8-sig")
    assert read_arch_file(str(tmp_path / "detector.json")) == {"kind": "detector"}
    instances = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "coco.json").write_text(json.dumps(instances), encoding="utf-8-sig")
    assert "it lists none with an object" in refusal(
        lambda: read_coco(tmp_path / "coco.json", tmp_path, train=True)
    )


def test_what_is_wrong_with_a_neighbour_is_not_said_of_a_root_without_data(tmp_path):
    (tmp_path / "contest.tar").touch()
    (tmp_path / "root").mkdir()
    said = refusal(layouts.require, tmp_path / "root", ["shards"])
    assert said.startswith(f"no data in {tmp_path / 'root'}")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train.csv": "image,label,label\na.png,x,y\n"}, "the column 'label' twice"),
        ({"train.jsonl": '{"image": "a.png", "label": 1, "label": 2}\n'}, "a name occurs twice"),
        ({"train.jsonl": '{"image": "a.png", "label": NaN}\n'}, "line 1 is no JSON (NaN is no fin"),
        ({"train.jsonl": '{"image": "a.png", "label": -Infinity}\n'}, "line 1 is no JSON (-Inf"),
        ({"train.csv": "image,label\na.png,x\n", "train.jsonl": ""}, "train.jsonl: which of them"),
    ],
)
def test_a_table_that_says_two_things_is_refused(tmp_path, files, says):
    root = tmp_path / "table"
    root.mkdir()
    (root / "a.png").write_bytes(encoded(RAMP))
    for name, text in files.items():
        (root / name).write_text(text)
    assert says in refusal(tables.list_images, root, "train", tables.FOUND)


def test_a_row_of_a_data_set_whose_class_is_nan_has_none(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": encoded(RAMP), "path": None}] * 3,
        "label": [0.0, float("nan"), 1.0],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    said = refusal(huggingface.list_images, tmp_path, "train", tables.FOUND)
    assert "row 1 of the split train" in said and "has no class" in said


def test_what_is_no_image_in_a_shard_is_named_but_for_texts(tmp_path, capsys):
    names = ("a/1.png", "b/2.png", "b/3.heic", "a/1.json", "a/.hidden", "b/notes.txt")
    pack(tmp_path / "train-0.tar", *names)
    pack(tmp_path / "train-1.tar", "a/4.png", "b/5.wnid")
    pack(tmp_path / "val-0.tar", "a/6.png", "b/7.png")
    assert len(tar.list_images(tmp_path, "train")[0]) == 3
    said = capsys.readouterr().err
    assert "warning: left out, no image by its name" in said
    left = [str(tmp_path / "train-0.tar/b/3.heic"), str(tmp_path / "train-1.tar/b/5.wnid")]
    assert said.strip().endswith(": " + ", ".join(left))
    assert len(tar.list_images(tmp_path, "test")[0]) == 2
    assert not capsys.readouterr().err


def test_a_shard_cut_between_two_members_is_damaged(tmp_path):
    path = pack(tmp_path / "train-0.tar", *(f"a/{i}.png" for i in range(5)))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive]
    assert len(tar.list_images(tmp_path, "train")[0]) == 5
    for offset in offsets[1:]:
        path.write_bytes(whole[:offset])
        assert "cut off" in refusal(tar.list_images, tmp_path, "train")


def test_a_shard_that_goes_on_after_its_end_is_refused(tmp_path):
    path = pack(tmp_path / "train-0.tar", *(f"a/{i}.png" for i in range(5)))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        third = list(archive)[2].offset
    path.write_bytes(whole[:third] + bytes(512) + whole[third + 512 :])
    assert "goes on after its end" in refusal(tar.list_images, tmp_path, "train")
    path.write_bytes(whole + whole)
    assert "goes on after its end" in refusal(tar.list_images, tmp_path, "train")


def test_a_compressed_shard_is_called_compressed(tmp_path):
    path = pack(tmp_path / "train-0.tar", "a/1.png")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "compressed (gzip)" in refusal(tar.list_images, tmp_path, "train")


def test_members_of_one_name_are_refused_and_links_followed(tmp_path):
    path = pack(tmp_path / "train-0.tar", "a/1.png", "a/1.png")
    assert "a/1.png twice" in refusal(tar.list_images, tmp_path, "train")
    links = [("b/2.png", "a/1.png", tarfile.LNKTYPE), ("c/3.png", "../a/1.png", tarfile.SYMTYPE)]
    pack(path, "a/1.png", links=links)
    files, labels, names = tar.list_images(tmp_path, "train")
    assert (names, labels.tolist()) == (("a", "b", "c"), [0, 1, 2])
    assert len({files.content(i) for i in range(3)}) == 1
    pack(path, "a/1.png", links=[("b/2.png", "/etc/passwd", tarfile.SYMTYPE)])
    assert "/etc/passwd, which is no file in it" in refusal(tar.list_images, tmp_path, "train")


@pytest.mark.parametrize(("form", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("PPM", "I")])
def test_sixteen_bits_are_scaled(form, mode):
    content = encoded(RAMP.astype(np.uint16) * 256, form)
    assert Image.open(io.BytesIO(content)).mode == mode
    pixels = decode(content, "x")
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, -1))


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [12, 16])
def test_grey_tiff_files_say_how_many_bits_they_have_and_what_is_white(bits, white_is_zero):
    if bits == 12 and white_is_zero:
        with pytest.raises(DamagedImage, match="no known format"):
            decode(grey_tiff(bits, white_is_zero), "x.tif")
        return
    ramp = np.arange(0, 256, 32)
    expected = 255 - ramp if white_is_zero else ramp
    assert decode(grey_tiff(bits, white_is_zero), "x.tif")[0, :, 0].tolist() == expected.tolist()


def grey_tiff(bits, white_is_zero):
    """One row of the eight pixels 0, 1/8, ... of the largest, uncompressed."""
    pixels = "".join(f"{(i << bits) // 8:0{bits}b}" for i in range(8))
    cut = [pixels[i : i + 8] for i in range(0, len(pixels), 8)]
    if bits == 16:  # little-endian; 12 bits are packed from the high end on
        cut = [cut[i ^ 1] for i in range(len(cut))]
    tags = {256: 8, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1}
    entries = [struct.pack("<HHII", tag, 4, 1, n) for tag, n in {**tags, 279: len(cut)}.items()]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    body = bytes(int(byte, 2) for byte in cut)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def test_pillow_says_nothing_of_what_it_reads():
    code = """
import io
from PIL import Image
from m2mkd_jax.data.decode import decode
file = io.BytesIO()
Image.new("L", (8, 8)).save(file, "png")
Image.MAX_IMAGE_PIXELS = 40  # from which on it warns; from twice as many on it refuses
assert decode(file.getvalue(), "x.png").shape == (8, 8, 3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(kind):
    with pytest.raises(DamagedImage, match="32 bits per pixel"):
        decode(encoded(RAMP.astype(kind), "TIFF"), "x.tif")


def test_a_palette_with_transparency_in_bytes_warns_of_nothing():
    image = Image.fromarray(RAMP).convert("P")
    content = io.BytesIO()
    image.save(content, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(content.getvalue(), "x.png")
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, -1))


def test_other_suffixes_and_deeper_folders_count_and_the_rest_is_named(tmp_path, capsys):
    for split in ("train", "val"):
        folder = tmp_path / split / "a"
        (folder / "deep" / "er").mkdir(parents=True)
        for name, form in (
            ("1.tif", "TIFF"),
            ("2.GIF", "GIF"),
            ("3.jfif", "JPEG"),
            ("4.pgm", "PPM"),
        ):
            (folder / name).write_bytes(encoded(RAMP, form))
        (folder / "deep" / "er" / "5.png").write_bytes(encoded(RAMP))
        (folder / "boxes.txt").write_text("no image")
    (tmp_path / "train" / "a" / "6.heic").write_bytes(b"")
    lines: list[str] = []
    assert check.check(tmp_path, out=lines.append)
    assert "train: 5 images of 1 classes, 5 to 5 of each" in lines
    said = capsys.readouterr().err
    assert said.count("6.heic") == 1 and "boxes" not in said
    source = layouts.open_split(tmp_path, "folders", "train")
    for index in range(5):
        assert source.read(index).shape == (2, 8, 3)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_tables_and_names_are_utf8_whatever_the_locale(tmp_path, locale):
    root = tmp_path / "data"
    for split in ("train", "val"):
        folder = root / split / "né"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(encoded(RAMP))
    Path(os.fsdecode(os.fsencode(root / "val" / "né") + b"/\xe9.png")).write_bytes(b"damaged")
    code = (
        "import sys; from m2mkd_jax.data import check, layouts;"
        f"print(ascii(layouts.open_split({str(root)!r}, 'folders', 'train').class_names[0]));"
        f"sys.exit(check.main([{str(root)!r}]))"
    )
    code = code.encode("unicode_escape").decode()
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONIOENCODING"] = "utf-8:strict" if locale != "C" else "ascii:strict"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False
    )
    assert run.returncode == 2, run.stderr.decode(errors="replace")
    assert b"Traceback" not in run.stderr
    lines = run.stdout.decode().splitlines()
    assert lines[0] == ascii("né") and "1 damaged images" in run.stdout.decode()


def test_a_table_in_another_encoding_is_refused(tmp_path):
    pack(tmp_path / "train-0.tar", "1.png", "2.png")
    with tarfile.open(tmp_path / "train-0.tar", "a") as archive:
        for name in ("1", "2"):
            member = tarfile.TarInfo(f"{name}.cls")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"0" if name == "1" else b"1"))
    titles = tmp_path / "classes.txt"
    titles.write_bytes("né\nb\n".encode("utf-8-sig"))
    assert tar.list_images(tmp_path, "train")[2] == ("né", "b")
    titles.write_bytes("né\nb\n".encode("latin-1"))
    assert "not UTF-8 text (byte 1 is 0xe9)" in refusal(tar.list_images, tmp_path, "train")


def test_a_name_that_is_too_long_is_one_line(tmp_path, capsys, monkeypatch):
    root = tmp_path / ("x" * 300)
    for command in (check.main, prepare.main):
        given = [str(root)] if command is check.main else ["tiny_imagenet", str(root), "out"]
        assert command(given) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and f"{root}" in error[0] and "File name too long" in error[0]
    assert "cannot be read (File name too long; data.root" in refusal(
        layouts.require, root, ["folders"]
    )


def test_a_neighbour_that_cannot_be_read_is_no_hint(tmp_path, monkeypatch):
    (tmp_path / "root" / "locked").mkdir(parents=True)

    def scan(folder, real=os.scandir):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scan)
    assert "holds nothing that is known" in refusal(layouts.require, tmp_path / "root", ["idx"])
    locked = refusal(layouts.require, tmp_path / "root" / "locked", ["idx"])
    assert "locked cannot be read (Permission denied; data.root" in locked


@pytest.mark.parametrize("layout", ["folders", "classes"])
def test_images_beside_the_folders_of_classes_are_named(layout, tmp_path, capsys):
    splits = ("train", "val") if layout == "folders" else ("",)
    for split in splits:
        for name in ("a/1.png", "b/2.png", "loose.png"):
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name).write_bytes(encoded(RAMP))
        (tmp_path / split / "README.txt").write_text("no image")
    for split, folder in zip(("train", "test"), splits, strict=False):
        assert len(layouts.open_split(tmp_path, layout, split)) == 2
        where = tmp_path / folder / "loose.png"
        said = f"warning: left out, in no folder of a class: {where}"
        assert capsys.readouterr().err.splitlines() == [said]
