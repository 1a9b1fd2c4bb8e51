"""Data of the user's own: held-out images, tables, lists, Hugging Face's data sets, image kinds."""

import functools
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from m2mkd_jax.data import check, layouts, sources
from m2mkd_jax.data.decode import DamagedImage, Form, decode
from m2mkd_jax.data.formats import huggingface, tables
from m2mkd_jax.data.formats.tables import FOUND
from m2mkd_jax.data.indices import BatchIndices, balanced_epoch, held_out
from tests.data_files import CLASSES, make_config, message, write_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five training and two test images of each of three classes."""
    root = tmp_path_factory.mktemp("folders")
    write_folders(root, per_class=5)
    return root


def own(root, split, classes=3, **fields):
    return sources.load_source(make_config("image_folder", root, classes, **fields), split)


def names(source):
    return [source.name(i) for i in range(len(source))]


def pixels(source):
    return [source.read(i).tobytes() for i in range(len(source))]


def test_validation_is_a_stratified_part_of_the_training_images():
    labels = np.repeat([0, 1, 2], [40, 5, 2])
    kept, held = held_out(labels, 0.1, seed=3)
    assert sorted([*kept, *held]) == list(range(47))
    assert np.bincount(labels[held]).tolist() == [4, 1, 1]  # at least one, but never all
    assert set(held) <= set(held_out(labels, 0.3, seed=3)[1])
    assert set(held) != set(held_out(labels, 0.1, seed=4)[1])
    assert "single image" in message(held_out, np.array([0, 0, 1]), 0.1)


def test_a_train_folder_alone_serves_for_all_splits(folders, tmp_path, capsys):
    root = tmp_path / "alone"
    shutil.copytree(folders / "train", root / "train")
    assert "data.validation=0.1" in message(own, root, "train")
    given = {"validation": 0.3, "validation_seed": 1}
    train, validation, test = (own(root, split, **given) for split in sources.SPLITS)
    assert (len(train), len(validation)) == (9, 6) and names(test) == names(validation)
    assert not set(names(train)) & set(names(validation))
    assert not sources.has_test(make_config("image_folder", root))
    # The same images without the folder train/ around them.
    flat = own(root / "train", "validation", **given)
    assert pixels(flat) == pixels(validation)
    assert check.main([str(root), "--quick"]) == 2
    assert "--validation=0.1" in capsys.readouterr().out
    assert check.main([str(root), "--quick", "--validation=0.3", "--validation_seed=1"]) == 0
    assert "validation: 6 images of 3 classes, 2 to 2 of each" in capsys.readouterr().out


def test_validation_beside_test_images_leaves_those_alone(folders):
    test = own(folders, "test", validation=0.2)
    assert names(test) == names(own(folders, "test")) == names(own(folders, "validation"))
    assert len(own(folders, "validation", validation=0.2)) == 3
    few = own(folders, "train", validation=0.2, train_images=6)
    assert set(names(few)) <= set(names(own(folders, "train", validation=0.2)))


def test_digits_have_validation_images_too():
    given = {"validation": 0.1}
    config = make_config("digits", "", 10, **given)
    train, validation, test = (sources.load_source(config, split) for split in sources.SPLITS)
    assert (len(train), len(validation), len(test)) == (1437 - len(validation), 143, 360)
    together = np.concatenate([train.images, validation.images])
    assert len(np.unique(together.reshape(len(together), -1), axis=0)) >= 1400


def test_a_balanced_epoch_has_every_class_equally_often():
    labels = np.repeat([0, 1, 2], [50, 7, 3])
    order = balanced_epoch(labels, seed=0, epoch=0)
    assert np.bincount(labels[order]).tolist() == [20, 20, 20]
    small = np.bincount(order, minlength=60)
    assert small[:50].max() == 1 and set(small[50:57]) <= {2, 3} and set(small[57:]) <= {6, 7}
    indices = BatchIndices(60, 20, 0, labels=labels)
    assert np.concatenate([indices[3], indices[4], indices[5]]).tolist() == (
        balanced_epoch(labels, 0, 1).tolist()
    )


def write_table(path, rows):
    """CSV or JSON Lines, by the name of the file."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def rows_of(folders, folder):
    return [
        {"path": str(path.relative_to(folders)), "label": path.parent.name}
        for path in sorted((folders / folder).rglob("*.JPEG"))
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tables_of_paths_and_labels(folders, tmp_path, suffix):
    root = tmp_path / "tables"
    shutil.copytree(folders, root / "images")
    rows = {f: rows_of(root, f"images/{f}") for f in ("train", "val")}
    for folder, own_rows in rows.items():
        write_table(root / f"{folder}{suffix}", own_rows)
    whole = [row | {"split": folder} for folder, own_rows in rows.items() for row in own_rows]
    write_table(tmp_path / f"one{suffix}", [r | {"path": f"tables/{r['path']}"} for r in whole])
    for place in (root, tmp_path / f"one{suffix}"):
        for split in ("train", "test"):
            found, expected = own(place, split), own(folders, split)
            assert pixels(found) == pixels(expected) and found.class_names == CLASSES
            assert found.labels.tolist() == expected.labels.tolist()


def test_faults_of_tables_are_named_by_line(folders, tmp_path):
    row = {"path": str(folders / "train/n01/n01_0.JPEG"), "label": "n01"}
    for rows, words in (
        ([row, row | {"path": "gone.jpg"}], "line 3: there is no file"),
        ([row, row | {"label": ""}], "line 3 has no label"),
        ([{"path": row["path"], "kind": "n01"}], "data.label_column"),
        ([row | {"split": "dev"}], "line 2 is of split 'dev'"),
    ):
        write_table(tmp_path / "metadata.csv", rows)
        assert words in message(own, tmp_path, "train", 1)
    (tmp_path / "metadata.csv").unlink()
    for line, words in (
        ('{"path": ', "line 1 is no JSON"),
        ("[" * 100_000, "line 1 is no JSON"),
        (json.dumps(row | {"label": None}), "line 1 has no label"),  # no class "None"
        (json.dumps(row | {"label": ["n01", "n02"]}), "line 1: label is a list"),
    ):
        (tmp_path / "train.jsonl").write_text(line + "\n")
        assert words in message(own, tmp_path, "train", 1)


def test_an_image_stands_in_one_row_and_one_split(folders, tmp_path):
    """Under another label, in another writing of its path, or in the test images too."""
    root = tmp_path / "tables"
    shutil.copytree(folders, root)
    train, val = rows_of(root, "train"), rows_of(root, "val")
    again = {"path": f"train/../{train[0]['path']}", "label": train[-1]["label"]}
    write_table(root / "train.csv", [*train, again])
    words = f"line {len(train) + 2}: {again['path']} stands in {root}/train.csv line 2 already"
    assert words in message(own, root, "train")
    write_table(root / "train.csv", train)
    write_table(root / "val.csv", [*val, train[0]])
    assert f"{train[0]['path']} is in train.csv too (1 such images)" in message(own, root, "test")
    whole = [row | {"split": "train"} for row in train] + [train[0] | {"split": "val"}]
    write_table(root / "metadata.csv", whole)
    assert f"line {len(train) + 2}: {train[0]['path']} stands in" in message(own, root, "test")


def test_a_link_to_a_folder_around_it_is_refused(folders, tmp_path):
    """Images of all classes would count as those of one, up to forty times."""
    root = tmp_path / "images"
    shutil.copytree(folders, root)
    link = root / "train/n01/all"
    link.symlink_to(root / "train")
    assert f"{link} is a link to" in message(own, root, "train")
    link.unlink()
    (tmp_path / "more").mkdir()
    shutil.copy(root / "train/n01/n01_0.JPEG", tmp_path / "more")
    link.symlink_to(tmp_path / "more")
    assert len(own(root, "train").labels) == len(own(folders, "train").labels) + 1


@pytest.mark.parametrize("label", ["null", "[1]", "{}"])
def test_a_row_without_one_class_is_refused(label, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_text(f'{{"image": "a.png", "label": {label}}}\n')
    assert "train.jsonl line 1" in message(own, tmp_path, "train")


def test_json_lines_end_where_lines_do(tmp_path):
    """Texts of JSON may hold U+2028, at which Python's `splitlines` cuts."""
    names = ("a\u2028b", "c")
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "label": name} for number, name in enumerate(names)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    train = own(tmp_path, "train", 2, validation=0.0)
    assert train.class_names == names


@pytest.mark.parametrize("splits", [("val",), ("val", "test")])
def test_images_of_val_and_test_are_not_mixed(splits, folders, tmp_path):
    """In one table, and in shards: those of test, or of val where there is no test."""
    given = ("train", *splits)
    rows = ["image,label,split"]
    for i, split in enumerate(given):
        for name in CLASSES:
            image = folders / "train" / name / f"{name}_{i}.JPEG"
            rows.append(f"{image},{name},{split}")
            with tarfile.open(tmp_path / f"{split}-0.tar", "a") as tar:
                tar.add(image, f"{name}/{i}.JPEG")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "metadata.csv").write_text("\n".join(rows))
    wanted = [(folders / "train" / n / f"{n}_{len(splits)}.JPEG").read_bytes() for n in CLASSES]
    for root in (tmp_path, tmp_path / "table"):
        test = own(root, "test")
        assert [test.files.content(i) for i in range(len(test))] == wanted


def test_a_folder_called_test_serves_where_there_is_no_val(folders, tmp_path):
    shutil.copytree(folders / "train", tmp_path / "train")
    shutil.copytree(folders / "val", tmp_path / "test")
    assert sources.has_test(make_config("image_folder", tmp_path))
    assert pixels(own(tmp_path, "test")) == pixels(own(folders, "test"))
    shutil.copytree(folders / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "test" / CLASSES[0])  # is not looked at any more
    assert pixels(own(tmp_path, "test")) == pixels(own(folders, "test"))
    shutil.rmtree(tmp_path / "val")
    assert "lacks 1 of the 3 classes" in message(own, tmp_path, "test")


@pytest.mark.parametrize("kind", ["names", "numbers", "csv", "classes alone"])
def test_a_list_gives_a_flat_validation_folder_its_classes(folders, tmp_path, kind):
    root = tmp_path / "flat"
    shutil.copytree(folders / "train", root / "train")
    (root / "val").mkdir()
    rows = []
    for number, path in enumerate(sorted((folders / "val").rglob("*.JPEG"), reverse=True)):
        shutil.copy(path, root / "val" / f"V_{number:04d}.JPEG")
        rows.append((f"V_{number:04d}", path.parent.name))
    assert "val.txt" in message(own, root, "test")
    lines = {
        "names": [f"val/{file}.JPEG {name}" for file, name in rows],
        "numbers": [f"{file}.JPEG {CLASSES.index(name)}" for file, name in rows],
        "csv": ["ImageId,PredictionString", *(f"{f},{n} 1 2 3 4" for f, n in rows)],
        "classes alone": [name for _, name in rows],
    }[kind]
    path = root / ("LOC_val_solution.csv" if kind == "csv" else "val.txt")
    path.write_text("\n".join(lines))
    found, expected = own(root, "test"), own(folders, "test")
    assert sorted(zip(found.labels, pixels(found), strict=True)) == (
        sorted(zip(expected.labels, pixels(expected), strict=True))
    )
    wrong = [*lines[:-1], lines[-1].replace("n0", "m0").replace(".JPEG 0", ".JPEG 7")]
    path.write_text("\n".join(wrong))
    assert f"{path} line {len(lines)}" in message(own, root, "test")


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_dotted_keys_of_webdataset(tmp_path):
    picture = {}
    for shade in (10, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (shade,) * 3).save(buffer, "PNG")
        picture[shade] = buffer.getvalue()
    members = {}
    for i, shade in enumerate((10, 200)):
        members |= {f"s{i}.image.png": picture[shade], f"s{i}.cls": str(i).encode()}
    write_shard(tmp_path / "train-0.tar", members)
    write_shard(tmp_path / "val-0.tar", members)
    assert [int(i[0, 0, 0]) for i in map(own(tmp_path, "train", 2).read, (0, 1))] == [10, 200]
    members |= {f"s{i}.mask.png": picture[10] for i in (0, 1)}
    write_shard(tmp_path / "train-0.tar", members)
    write_shard(tmp_path / "val-0.tar", members)
    assert "data.image_column=mask.png" in message(own, tmp_path, "train", 2)
    chosen = own(tmp_path, "train", 2, image_column="image.png")
    assert [int(chosen.read(i)[0, 0, 0]) for i in (0, 1)] == [10, 200]


def test_hugging_face_data_sets(folders, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))}
    )
    tables = {}
    for split, folder in (("train", "train"), ("validation", "val")):
        paths = sorted((folders / folder).rglob("*.JPEG"))
        columns = {
            "picture": [{"bytes": p.read_bytes(), "path": None} for p in paths],
            "kind": [CLASSES.index(p.parent.name) for p in paths],
        }
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
        (tmp_path / "parquet/data").mkdir(parents=True, exist_ok=True)
        tables[split].to_parquet(tmp_path / f"parquet/data/{split}-00000-of-00001.parquet")
        tables[split].save_to_disk(tmp_path / "apart" / split)
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    for root in (tmp_path / "saved", tmp_path / "apart", tmp_path / "parquet"):
        for split in ("train", "test"):
            found, expected = own(root, split), own(folders, split)
            assert pixels(found) == pixels(expected) and found.class_names == CLASSES
            assert found.labels.tolist() == expected.labels.tolist()
    tables["train"].save_to_disk(tmp_path / "one")
    assert len(own(tmp_path / "one", "validation", validation=0.2)) == 3
    assert "data.validation" in message(own, tmp_path / "one", "test")
    assert "no column 'clas'" in message(
        lambda: own(tmp_path / "saved", "train", label_column="clas")
    )
    (tmp_path / "saved/train/data-00000-of-00001.arrow").write_bytes(b"")
    assert "cannot be read by `datasets`" in message(own, tmp_path / "saved", "train")


def test_a_saved_table_cut_between_two_batches_of_rows_is_damaged(tmp_path):
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    picture = Image.new("RGB", (4, 4))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"image": [picture] * 8, "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "train")
    path = tmp_path / "train/data-00000-of-00001.arrow"
    table = arrow.ipc.open_stream(arrow.py_buffer(path.read_bytes())).read_all().combine_chunks()
    sink, ends = arrow.BufferOutputStream(), []
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)
            ends.append(sink.tell())
    content = sink.getvalue().to_pybytes()
    path.write_bytes(content)
    assert len(huggingface.list_images(tmp_path, "train", FOUND)[0]) == 8
    for end in (ends[2], ends[-1]):  # six rows; all of them, but nothing says so
        path.write_bytes(content[:end])
        said = message(huggingface.list_images, tmp_path, "train", FOUND)
        assert said == f"{path} has no end: it is cut off; copy it again"


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


RAMP = np.linspace(0, 255, 24 * 16).reshape(24, 16).round().astype(np.uint8)


def test_hugging_face_classes_follow_the_order_of_the_training_split(tmp_path, monkeypatch):
    """Whatever numbers the ClassLabel of another split gives them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = {name: Image.new("RGB", (4, 4), (70 * i,) * 3) for i, name in enumerate(CLASSES)}
    for split, order in (("train", CLASSES), ("test", CLASSES[::-1])):
        table = {
            "image": [pictures[n] for n in CLASSES],
            "label": [order.index(n) for n in CLASSES],
        }
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(order))}
        made = datasets.Dataset.from_dict(table, datasets.Features(features))
        made.to_parquet(tmp_path / f"{split}.parquet")
    train, test = (own(tmp_path, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == CLASSES
    assert np.asarray(train.labels).tolist() == np.asarray(test.labels).tolist() == [0, 1, 2]
    lists = datasets.Dataset.from_dict({"image": [pictures["n01"]], "label": [[0]]})
    lists.to_parquet(tmp_path / "train.parquet")
    assert "holds lists; one class an image" in message(own, tmp_path, "train")


def test_kinds_of_images_come_out_as_what_they_show():
    grey = np.repeat(RAMP[..., None], 3, -1)
    wide = Image.fromarray(RAMP.astype(np.uint16) * 256 + 13)  # 16 bits
    exact = {
        "grey": encoded(Image.fromarray(RAMP), "PNG"),
        "alpha": encoded(Image.fromarray(RAMP).convert("LA"), "PNG"),
        "palette": encoded(Image.fromarray(RAMP).convert("P"), "PNG"),
        "16-bit png": encoded(wide, "PNG"),
        "16-bit tif": encoded(wide, "TIFF"),
        "bmp": encoded(Image.fromarray(grey), "BMP"),
        "webp": encoded(Image.fromarray(grey), "WEBP", lossless=True),
        "tif": encoded(Image.fromarray(grey), "TIFF"),
        "gif": encoded(
            Image.fromarray(RAMP),
            "GIF",
            save_all=True,
            append_images=[Image.fromarray(255 - RAMP)],
        ),
        "cmyk tif": encoded(Image.fromarray(grey).convert("CMYK"), "TIFF"),
    }
    for kind, content in exact.items():
        assert np.array_equal(decode(content, kind), grey), kind
    cmyk = decode(encoded(Image.fromarray(grey).convert("CMYK"), "JPEG", quality=100), "cmyk")
    assert np.abs(cmyk.astype(int) - grey).max() < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_where_it_is_asked_for(format):
    stored = np.kron(np.arange(6, dtype=np.uint8).reshape(3, 2) * 40, np.ones((8, 8), np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        lossless = {"lossless": True} if format == "WEBP" else {}
        content = encoded(Image.fromarray(stored), format, exif=exif, **lossless)
        upright = np.asarray(
            ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        )
        seen = []
        shrink = functools.partial(lambda seen, *size: seen.append(size) or 1, seen)
        found = decode(content, "x", shrink, Form(oriented=True))
        assert np.array_equal(found, upright) and seen == [upright.shape[:2]]
        if format != "TIFF":  # which Pillow turns by itself
            assert decode(content, "x").shape == (24, 16, 3)


def test_an_image_beyond_pillows_limit_is_named_as_that(monkeypatch):
    content = encoded(Image.fromarray(RAMP), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DamagedImage, match="more than 200 pixels, Pillow's limit"):
        decode(content, "big.png")


def test_classes_that_are_numbers_sort_as_numbers_if_asked(tmp_path, capsys):
    write_folders(tmp_path, ("1", "2", "10"))
    assert own(tmp_path, "train").class_names == ("1", "10", "2")
    numeric = own(tmp_path, "train", numeric_order=True)
    assert numeric.class_names == ("1", "2", "10")
    last = numeric.labels.tolist().index(2)
    assert "/10/" in numeric.name(last)
    assert check.main([str(tmp_path), "--quick"]) == 0
    assert "1, 10, 2 (numbers as text; data.numeric_order=True" in capsys.readouterr().out
    assert check.main([str(tmp_path), "--quick", "--numeric_order"]) == 0
    assert "labels: 1, 2, 10\n" in capsys.readouterr().out
    write_folders(tmp_path / "texts")
    assert "is no whole number" in message(
        lambda: own(tmp_path / "texts", "train", numeric_order=True)
    )


def test_one_class_in_two_forms(tmp_path):
    """Forms of Unicode look alike, and 1.0 is what programs write for 1."""
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")

    def classes(*labels):
        rows = [{"image": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return layouts.open_split(tmp_path, "tables", "train").class_names

    assert classes(1, 2.0, 1.0) == ("1", "2") and classes("Cat", "cat", 1.5) == (
        "1.5",
        "Cat",
        "cat",
    )
    said = message(classes, "caf\xe9", "x", "cafe\u0301")
    assert said.startswith(f"{tmp_path} has the classes 'cafe\\u0301' and 'caf\\xe9', one name")


@pytest.mark.parametrize("first", [True, False])
def test_rows_without_a_split_beside_rows_with_one(first, tmp_path):
    """A test image whose row lacks it would be trained on."""
    rows = [{"image": f"{i}.png", "label": "ab"[i % 2], "split": "train"} for i in range(4)]
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    del rows[0 if first else 2]["split"]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    said = f"{path} line {2 if first else 3}: some rows have a 'split', others none: add it"
    assert message(tables.list_images, tmp_path, "train", FOUND) == said


@pytest.mark.parametrize("end", ["", '2.png,a,"good" boy\n'])
def test_rows_behind_a_quote_that_nothing_ends_are_not_lost(end, tmp_path):
    """As all text up to the next quote, or the end, is of the column with the first one."""
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    lines = 'image,label,note\n0.png,a,x\n1.png,b,"great\n2.png,a,x\n'
    (tmp_path / "train.csv").write_text(lines + end)
    said = message(tables.list_images, tmp_path, "train", FOUND)
    assert said.startswith(f"{tmp_path}/train.csv line") and "is no CSV (" in said
    (tmp_path / "train.csv").write_text(lines.replace('"great', '"great, ""so"" great"'))
    assert tables.list_images(tmp_path, "train", FOUND)[1].tolist() == [0, 1, 0]
