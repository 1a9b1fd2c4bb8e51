"""Data sets as TFDS's own builders prepare them: the published features, without TensorFlow."""

import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from m2mkd_jax.data import check, layouts, prepare, sources
from m2mkd_jax.data.class_lists import wordnet_ids
from tests.data_files import CLASSES, make_config, message, write_folders

F = tfds.features
COUNT = 4
# Our name -> TFDS's, its classes, its splits, the features beside image and label.
SETS = {
    "imagenet": ("imagenet2012", 1000, ("train", "validation", "test"), ("file_name",)),
    "imagenet_r": ("imagenet_r", 1000, ("test",), ("file_name",)),
    "cifar100": ("cifar100", 100, ("train", "test"), ("id", "coarse_label")),
    "cub": (
        "caltech_birds2011",
        200,
        ("train", "test"),
        ("bbox", "image/filename", "label_name", "segmentation_mask"),
    ),
}
MORE = {
    "file_name": F.Text(),
    "id": F.Text(),
    "image/filename": F.Text(),
    "label_name": F.Text(),
    "coarse_label": F.ClassLabel(num_classes=20),
    "bbox": F.BBoxFeature(),
    "segmentation_mask": F.Image(shape=(None, None, 1)),
}
VALUES = dict.fromkeys(("file_name", "id", "image/filename", "label_name"), "text") | {
    "coarse_label": 7,
    "bbox": F.BBox(0.1, 0.1, 0.9, 0.9),
}


def label_of(name, split, number):
    """Classes of renditions for those, no label where ImageNet publishes none."""
    if name == "imagenet_r":
        return wordnet_ids("imagenet").index(wordnet_ids("imagenet_r")[50 * number])
    return -1 if (name, split) == ("imagenet", "test") else 9 * number


def write(root, name):
    """Four images of one grey each; the masks are no images, for nothing should decode them."""
    tfds_name, classes, splits, more = SETS[name]
    root.mkdir()
    (root / "mask.png").write_bytes(b"no image")
    label = F.ClassLabel(num_classes=classes)
    if classes == 1000:
        label.names = list(wordnet_ids("imagenet"))
    shape = (32, 32, 3) if name == "cifar100" else (None, None, 3)
    features = {"image": F.Image(shape=shape), "label": label} | {key: MORE[key] for key in more}

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=F.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number in range(COUNT):
                path = root / f"{number}.png"
                Image.new("RGB", (32, 32), (40 * number,) * 3).save(path)
                values = VALUES | {"segmentation_mask": str(root / "mask.png")}
                yield (
                    number,
                    {
                        "image": str(path),
                        "label": label_of(name, split, number),
                        **{key: values[key] for key in more},
                    },
                )

    Made.name = tfds_name
    Made(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    return root / "tfds" / tfds_name


@pytest.mark.parametrize("name", SETS)
def test_official_data_sets_are_found_and_read(name, tmp_path, monkeypatch):
    directory = write(tmp_path / "made", name)
    monkeypatch.setenv("M2MKD_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(directory.parent))
    config = make_config(name, "", SETS[name][1])
    assert sources.data_root(config) == directory and sources.describe_missing(config) is None
    for split in sources.SPLITS if name != "imagenet_r" else ("test",):
        source = sources.load_source(config, split)
        expected = [9 * i if name != "imagenet_r" else 50 * i for i in range(COUNT)]
        assert len(source) == COUNT and np.asarray(source.labels).tolist() == expected
        assert len(source.class_names) == (200 if name == "imagenet_r" else SETS[name][1])
        reader, order = source.reader(), np.array([2, 0, 3])
        images = reader.evaluation_images(order, 32)
        assert images[:, 5, 5, 1].tolist() == [80, 0, 120] and not reader.replaced
        assert reader.labels_of(order).tolist() == [expected[i] for i in order]
    assert "tensorflow" not in sys.modules


def test_the_check_command_knows_prepared_renditions(tmp_path, capsys):
    """TFDS numbers their classes within ImageNet's, and there is no train."""
    directory = write(tmp_path / "made", "imagenet_r")
    capsys.readouterr()
    assert check.main([str(directory)]) == 2
    out = capsys.readouterr().out
    assert "test: 4 images of 4 classes, 1 to 1 of each (the classes of imagenet_r)" in out
    assert "test: 196 classes without an image" in out and "train" not in out


def write_prepared(root, source, monkeypatch):
    monkeypatch.setattr(prepare.TinyImagenet, "names", CLASSES)
    assert prepare.main(["tiny_imagenet", str(source), str(root)]) == 0


def test_one_prepared_data_set_is_not_taken_for_another(tmp_path, capsys, monkeypatch):
    root = tmp_path / "td"
    write_folders(tmp_path / "a")
    write_prepared(root, tmp_path / "a", monkeypatch)
    capsys.readouterr()
    there = root / "tiny_imagenet" / "1.0.0"
    for given in (root, root / "tiny_imagenet", there):
        assert check.main([str(given), "--quick"]) == 0
        assert capsys.readouterr().out.startswith(f"{there}: a directory that TensorFlow")
    shutil.copytree(there, root / "tiny_imagenet" / "1.0.10")  # newer than 1.0.9
    shutil.copytree(there, root / "tiny_imagenet" / "1.0.9")
    assert layouts.prepared(root).name == "1.0.10"
    shutil.copytree(there, root / "mnist" / "3.0.1")
    shutil.copytree(there, root / "flat")  # of no version
    held = ", ".join(str(root / name) for name in ("flat", "mnist", "tiny_imagenet"))
    error = f"{root} holds 3 prepared data sets ({held}): give the directory of one"
    assert check.main([str(root)]) == 2
    assert capsys.readouterr().err.splitlines() == [f"m2mkd_jax: {error}"]
    config = make_config("image_folder", root)
    assert message(sources.load_source, config, "train") == error
    assert check.main([str(root / "mnist"), "--quick"]) == 0


def test_what_is_prepared_is_not_taken_for_another_source(tmp_path, capsys, monkeypatch):
    write_folders(tmp_path / "a")
    write_folders(tmp_path / "b", per_class=4)
    write_prepared(tmp_path / "out", tmp_path / "a", monkeypatch)
    there = tmp_path / "out" / "tiny_imagenet" / "1.0.0"
    before = {path: path.read_bytes() for path in there.iterdir()}
    assert prepare.main(["tiny_imagenet", str(tmp_path / "b"), str(tmp_path / "out")]) == 2
    error = f"m2mkd_jax: {there} is there already; remove it or choose another DATA_DIR"
    assert capsys.readouterr().err.splitlines()[-1] == error
    assert {path: path.read_bytes() for path in there.iterdir()} == before


@pytest.mark.parametrize("kept", [None, 0, 65536, -1])
def test_records_that_are_missing_or_cut_off_are_one_line(kept, tmp_path, monkeypatch):
    write_folders(tmp_path / "source")
    write_prepared(tmp_path / "root", tmp_path / "source", monkeypatch)
    (path,) = (tmp_path / "root").rglob("*train.array_record*")
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    source = layouts.open_split(tmp_path / "root", "prepared", "train")
    for read in (lambda: np.asarray(source.labels), lambda: source.read(0)):
        said = message(read)
        assert said.startswith(f"number 0 of train in {path.parent} cannot be read (")
        assert said.endswith("): prepare it again")


@pytest.mark.parametrize("content", [b"", b"no json", b'{"builder_name": "x"}', b"[1]", b"\xff"])
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_damaged_or_foreign_description_is_one_line(file, content, tmp_path, capsys, monkeypatch):
    write_folders(tmp_path / "a")
    write_prepared(tmp_path / "td", tmp_path / "a", monkeypatch)
    there = tmp_path / "td" / "tiny_imagenet" / "1.0.0"
    (there / file).write_bytes(content)
    capsys.readouterr()
    assert check.main([str(tmp_path / "td")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and f"{there}: its dataset_info.json or features.json" in error[0]
    config = make_config("image_folder", tmp_path / "td")
    assert str(there) in message(sources.load_source, config, "train")


def test_a_table_of_hugging_face_is_not_taken_for_prepared(tmp_path, capsys):
    for split in ("a", "b"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for file in ("dataset_info.json", "state.json"):
            (tmp_path / "set" / split / file).write_text("{}")
    assert check.main([str(tmp_path / "set")]) == 2
    assert "holds nothing that is known; did you mean" in capsys.readouterr().err


def test_a_split_without_labels_is_refused(tmp_path, monkeypatch):
    """TFDS gives -1, which would be the last class of all."""
    monkeypatch.setitem(
        SETS, "imagenet", (*SETS["imagenet"][:2], ("train", "test"), ("file_name",))
    )
    directory = write(tmp_path / "made", "imagenet")
    source = layouts.open_split(directory, "prepared", "test")
    for read in (lambda: np.asarray(source.labels), lambda: source.read(0)):
        assert "number 0 of test" in message(read) and "label -1 of 1000 classes" in message(read)


@pytest.mark.parametrize(
    ("key", "feature", "value"),
    [("label", F.Scalar(np.int64), 1), ("image", F.Tensor(shape=(2,), dtype=np.uint8), [1, 2])],
)
def test_features_of_other_types_are_one_line(key, feature, value, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    features = {"image": F.Image(), "label": F.ClassLabel(num_classes=2), key: feature}
    example = {"image": str(tmp_path / "a.png"), "label": 1, key: value}

    class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": [(0, example)]}

        def _generate_examples(self):
            raise NotImplementedError

    Other.name = "other"
    Other(data_dir=tmp_path / "td", file_format="array_record").download_and_prepare()
    said = message(layouts.open_split, tmp_path / "td", "prepared", "train")
    assert f"its feature {key} is of the type {type(feature).__name__}; " in said
