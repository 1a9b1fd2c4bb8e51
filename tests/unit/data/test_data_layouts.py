"""The layouts of data sets on disk, written by the tests: read alike, and told apart."""

import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from m2mkd_jax.data import check, layouts, prepare, sources
from m2mkd_jax.data.class_lists import wordnet_ids
from m2mkd_jax.data.damaged_images import DamagedImageCounter
from m2mkd_jax.report import measure
from tests.data_files import CLASSES, make_config, message, write_cub, write_folders


def write_shards(root, source, numbered=False):
    """Two tar files per split with the files of `write_folders`, in any order."""
    root.mkdir()
    for folder in ("train", "val"):
        files = sorted((source / folder).rglob("*.JPEG"))
        np.random.default_rng(0).shuffle(files)
        for number in range(2):
            with tarfile.open(root / f"set-{folder}-{number:05d}.tar", "w") as tar:
                for path in files[number::2]:
                    if not numbered:
                        tar.add(path, f"{path.parent.name}/{path.name}")
                        continue
                    # Numbers whose text does not sort as the numbers do: 8, 9, 10.
                    tar.add(path, f"{path.stem}.jpg")
                    label = str(8 + CLASSES.index(path.parent.name)).encode()
                    member = tarfile.TarInfo(f"{path.stem}.cls")
                    member.size = len(label)
                    tar.addfile(member, io.BytesIO(label))


def write_prepared(root, source, monkeypatch, name="tiny_imagenet"):
    monkeypatch.setattr(prepare.BUILDERS[name], "names", CLASSES)
    assert prepare.main([name, str(source), str(root)]) == 0


def contents(source):
    """Pixels, labels and class names, through the interface that batches use."""
    indices = np.arange(len(source))
    reader = source.reader()
    return (
        [np.asarray(source.read(i)).tobytes() for i in indices],
        reader.evaluation_images(indices, 16).tobytes(),
        reader.labels_of(indices).tolist(),
        np.asarray(source.labels).tolist(),
        source.class_names,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    write_folders(root)
    return root


@pytest.mark.parametrize("kind", ["shards", "numbered", "prepared", "tiny"])
@pytest.mark.parametrize("split", sources.SPLITS)
def test_every_layout_is_read_like_folders(kind, split, folders, tmp_path, monkeypatch):
    root = tmp_path / "data"
    if kind in ("shards", "numbered"):
        write_shards(root, folders, kind == "numbered")
    elif kind == "prepared":
        write_prepared(root, folders, monkeypatch)
    else:
        write_tiny(root, folders)
    expected = contents(sources.load_source(make_config("tiny_imagenet", folders), split))
    config = make_config("tiny_imagenet", root)
    assert sources.describe_missing(config) is None
    found = contents(sources.load_source(config, split))
    if kind == "numbered":
        assert found[:4] == expected[:4] and found[4] == ("000008", "000009", "000010")
        (root / "classes.txt").write_text("\n".join(f"name {i}" for i in range(11)))
        named = sources.load_source(config, split)
        assert named.class_names == ("name 8", "name 9", "name 10")
    else:
        assert found == expected


def write_tiny(root, source):
    """The original archive: train/CLASS/images/, a flat val/images/, val_annotations.txt."""
    lines = []
    for path in sorted(source.rglob("*.JPEG")):
        folder, name = path.parent.parent.name, path.parent.name
        below = root / folder / ("images" if folder == "val" else f"{name}/images") / path.name
        below.parent.mkdir(parents=True, exist_ok=True)
        below.write_bytes(path.read_bytes())
        if folder == "val":
            lines.append(f"{path.name}\t{name}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def test_chosen_records_and_members_keep_their_images(folders, tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", folders)
    write_prepared(tmp_path / "prepared", folders, monkeypatch)
    for root in (folders, tmp_path / "shards", tmp_path / "prepared"):
        source = sources.load_source(make_config("tiny_imagenet", root), "train")
        chosen = source.select(np.array([7, 2]))
        again = pickle.loads(pickle.dumps(chosen))  # as they travel to workers
        assert np.asarray(again.read(0)).tobytes() == np.asarray(source.read(7)).tobytes()
        assert again.labels.tolist() == [2, 0]


def write_renditions(root, ids):
    """ImageNet-R's layout: classes at the top, no train/."""
    for number, name in enumerate(ids):
        (root / name).mkdir(parents=True)
        pixels = np.full((20, 20, 3), number % 256, np.uint8)
        Image.fromarray(pixels).save(root / name / "art_0.png")
    (root / "README.txt").write_text("ImageNet-R")


def test_renditions_are_labelled_within_their_own_classes(tmp_path):
    write_renditions(tmp_path / "r", wordnet_ids("imagenet_r"))
    config = make_config("imagenet_r", tmp_path / "r", 1000, image_size=20)
    source = sources.load_source(config, "test")
    assert source.class_names == wordnet_ids("imagenet_r")
    assert source.labels.tolist() == list(range(200))
    assert np.asarray(source.read(150))[0, 0, 0] == 150
    assert "test images only" in message(sources.load_source, config, "train")
    write_renditions(tmp_path / "other", ["n00000001"])
    other = make_config("imagenet_r", tmp_path / "other", 1000)
    assert "n00000001" in message(sources.load_source, other, "test")


def test_renditions_may_lie_in_shards(tmp_path, capsys):
    """Without a train split, of which others must have the classes."""
    write_renditions(tmp_path / "r", wordnet_ids("imagenet_r"))
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "r-test-0.tar", "w") as tar:
        for path in sorted((tmp_path / "r").rglob("*.png")):
            tar.add(path, f"{path.parent.name}/{path.name}")
    loaded = [
        sources.load_source(make_config("imagenet_r", tmp_path / kind, 1000), "test")
        for kind in "rs"
    ]
    assert contents(loaded[0]) == contents(loaded[1])
    assert check.main([str(tmp_path / "s")]) == 0
    assert "test: 200 images of 200 classes" in capsys.readouterr().out
    config = make_config("imagenet", tmp_path / "s", 200)
    assert "has no train shards: *train*.tar" in message(sources.load_source, config, "train")


def test_tiny_renditions_are_taken_out_of_imagenet_r(tmp_path):
    """And prepared ones are read like folders, though numbered within other classes."""
    write_renditions(tmp_path / "r", wordnet_ids("imagenet_r"))
    assert prepare.main(["tiny_imagenet_r", str(tmp_path / "r"), str(tmp_path / "out")]) == 0
    assert check.main([str(tmp_path / "out")]) == 0
    config = make_config("tiny_imagenet_r", tmp_path / "out", 200, image_size=20)
    source = sources.load_source(config, "test")
    assert source.labels[np.arange(62)].tolist() == list(range(62))
    for label in (0, 17, 61):
        place = wordnet_ids("imagenet_r").index(wordnet_ids("tiny_imagenet_r")[label])
        assert np.asarray(source.read(label))[0, 0, 0] == place
    wider = layouts.reordered(source, ("n0", *wordnet_ids("tiny_imagenet_r")))
    assert wider.labels[np.array([0, 5])].tolist() == [1, 6]
    narrower = layouts.reordered(source, wordnet_ids("tiny_imagenet_r")[1:])
    assert "not expected" in message(narrower.labels.__getitem__, np.array([3, 0]))


def test_preparing_from_the_wrong_place_is_one_line(tmp_path, capsys, folders):
    assert prepare.main(["tiny_imagenet", str(tmp_path), str(tmp_path / "out")]) == 2
    assert prepare.main(["tiny_imagenet", str(folders), str(tmp_path / "out")]) == 2
    write_renditions(tmp_path / "r", wordnet_ids("tiny_imagenet_r"))
    next((tmp_path / "r" / wordnet_ids("tiny_imagenet_r")[7]).iterdir()).unlink()
    assert prepare.main(["tiny_imagenet_r", str(tmp_path / "r"), str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "expected: train/CLASS" in errors[0]
    assert "lacks 200 of the 200 classes" in errors[1]
    assert "no image file in" in errors[2] and len(errors) == 3
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    write_renditions(tmp_path / "whole", wordnet_ids("tiny_imagenet_r"))
    assert prepare.main(["tiny_imagenet_r", str(tmp_path / "whole"), str(tmp_path / "file")]) == 2
    assert "cannot prepare in" in capsys.readouterr().err.splitlines()[-1]


def test_classes_that_tiny_imagenet_has_not_are_not_prepared(tmp_path, capsys, monkeypatch):
    write_folders(tmp_path)
    monkeypatch.setattr(prepare.TinyImagenet, "names", CLASSES[:2])
    assert prepare.main(["tiny_imagenet", str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"1 classes beside the 2 (the first: {CLASSES[2]})" in capsys.readouterr().err


# What a user is told


def test_a_wrong_root_says_what_was_expected_and_what_is_near(tmp_path, folders):
    def tell(root, name="tiny_imagenet"):
        text = sources.describe_missing(make_config(name, root))
        assert text and "\n" not in text
        return text

    assert f"did you mean {folders}?" in tell(folders / "train")
    far = tmp_path / "far" / "root"  # what is near is looked for too, beside and above
    (far / "archive").mkdir(parents=True)
    write_folders(far / "archive" / "tiny-imagenet-200")
    assert "did you mean" in tell(far / "archive")
    assert "holds nothing that is known; expected: train/CLASS/*.JPEG" in tell(far)
    assert "is no directory" in tell(tmp_path / "nowhere")
    write_cub(tmp_path / "cub")
    assert "it holds CUB-200-2011's archive" in tell(tmp_path / "cub")
    write_folders(far.parent / "folders")
    assert "expected: CUB" in tell(far.parent / "folders", "cub")


def test_a_flat_val_is_one_line(tmp_path):
    write_folders(tmp_path)
    for path in list((tmp_path / "val").rglob("*.JPEG")):
        path.rename(tmp_path / "val" / path.name)
    for folder in CLASSES:
        (tmp_path / "val" / folder).rmdir()
    text = sources.describe_missing(make_config("imagenet", tmp_path))
    assert "val is flat, 6 images without their classes" in text and "val/CLASS" in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tar: tar.write_bytes(tar.read_bytes()[:700]), "cannot read the shard"),
        (lambda tar: tar.write_bytes(b"no tar" * 200), "cannot read the shard"),
        (lambda tar: write_member(tar, "loose.jpg"), "loose.jpg has no class"),
        (lambda tar: write_member(tar, "n99/a.jpg"), "lacks"),
    ],
)
def test_broken_shards_are_one_line(tmp_path, folders, damage, words):
    write_shards(tmp_path / "s", folders)
    for tar in (tmp_path / "s").glob("*val*.tar"):
        damage(tar)
    text = message(sources.load_source, make_config("imagenet", tmp_path / "s"), "test")
    assert words in text and str(tmp_path / "s") in text


def write_member(path, *names, content=b"abc"):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_what_stands_beside_an_image_in_a_shard(tmp_path):
    """Hidden files are left out, as in folders; a class may have a name instead of a number."""
    hidden = ("n01/._a.jpg", ".b.cls")
    write_member(tmp_path / "train.tar", "b.jpg", "b.cls", "n01/a.JPG", "n01/a.json", *hidden)
    source = sources.load_source(make_config("imagenet", tmp_path, 2), "train")
    assert source.class_names == ("abc", "n01") and len(source) == 2
    write_member(tmp_path / "train.tar", "b.jpg", "b.cls", content=b"\xff" * 5000)
    assert len(sources.load_source(make_config("imagenet", tmp_path, 1), "train")) == 1


def test_a_class_that_is_there_twice_or_has_a_mark(tmp_path):
    """Two files say what one image's class is; a byte order mark is no part of a class."""
    write_member(tmp_path / "train.tar", "b.jpg", "b.cls", "b.cls")
    config = make_config("imagenet", tmp_path, 1)
    assert "has b.cls twice: pack it again" in message(sources.load_source, config, "train")
    write_member(tmp_path / "train.tar", "b.jpg", "b.cls", content="\ufeffdog".encode())
    assert sources.load_source(config, "train").class_names == ("dog",)


@pytest.mark.parametrize("layout", ["shards", "cub", "cifar"])
def test_a_split_without_an_image_is_one_line(tmp_path, layout):
    if layout == "shards":
        write_member(tmp_path / "val.tar", "readme.txt")
    elif layout == "cub":
        write_cub(tmp_path)
        rows = (tmp_path / "train_test_split.txt").read_text().replace(" 0\n", " 1\n")
        (tmp_path / "train_test_split.txt").write_text(rows)
    else:
        for name in ("train.bin", "test.bin"):
            (tmp_path / name).touch()
        (tmp_path / "fine_label_names.txt").write_text("x\n" * 100)
    assert "no test images" in message(layouts.open_split, tmp_path, layout, "test")


def test_the_check_command(tmp_path, capsys):
    write_folders(tmp_path)
    assert check.main([str(tmp_path)]) == 0
    out = capsys.readouterr()
    assert "train: 9 images of 3 classes, 3 to 3 of each" in out.out
    assert out.out.count("classes, in the order of their labels: n01, n02, n03\n") == 1
    assert "test: 6 images" in out.out and "6/6" in out.err  # the progress bar
    bad = tmp_path / "train" / "n02" / "n02_1.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    assert check.main([str(tmp_path), "--quick"]) == 0
    capsys.readouterr()
    assert check.main([str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "train: 1 damaged images (11.111%)" in out and str(bad) in out
    for path in (tmp_path / "val" / "n03").iterdir():
        path.unlink()
    assert check.main([str(tmp_path)]) == 2
    assert "test: no image file in" in capsys.readouterr().out
    for name in ("n02", "n03"):
        shutil.rmtree(tmp_path / "val" / name)
    assert check.main([str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "train: 9 images of 3 classes" in out  # what is there is told all the same
    assert "val lacks 2 of the 3 classes of train/ (the first: n02, n03)" in out
    assert check.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_check_command_shows_the_order_of_many_classes(tmp_path, capsys):
    write_folders(tmp_path, [str(i) for i in range(12)], per_class=1)
    assert check.main([str(tmp_path), "--quick"]) == 0
    assert "labels: 0, 1, 10, 11, 2, 3, 4, 5, 6, ..., 9" in capsys.readouterr().out


def test_the_check_command_names_the_classes_it_knows(tmp_path, capsys):
    write_renditions(tmp_path, wordnet_ids("tiny_imagenet_r"))
    assert check.main([str(tmp_path)]) == 0
    assert "(the classes of tiny_imagenet_r)" in capsys.readouterr().out
    # Classes that are missing, or do not belong to nearly the same set.
    gone = wordnet_ids("tiny_imagenet_r")[3]
    shutil.rmtree(tmp_path / gone)
    write_renditions(tmp_path, ["n99999999"])
    assert check.main([str(tmp_path), "--quick"]) == 2
    out = capsys.readouterr().out
    assert f"test: 1 classes are missing: {gone}" in out
    assert "test: 1 classes are none of its: n99999999" in out


# Damaged images


@pytest.fixture
def damaged(tmp_path):
    """Nine training images, numbers 4 and 5 damaged."""
    write_folders(tmp_path)
    source = sources.load_source(make_config("imagenet", tmp_path), "train")
    for index in (4, 5):
        with open(source.name(index), "r+b") as file:
            file.truncate(150)
    return source


def test_a_damaged_image_is_replaced_by_the_next_with_its_label(damaged):
    reader = damaged.reader()
    images = reader.evaluation_images(np.array([3, 4, 5, 6]), 16)
    assert reader.replaced == {4: 6, 5: 6}
    np.testing.assert_array_equal(images[1], images[3])
    assert reader.labels_of(np.array([3, 4, 5, 6])).tolist() == [1, 2, 2, 2]
    last = damaged.select(np.array([0, 5]))  # the next of the last is the first
    assert last.reader().evaluation_images(np.array([1]), 16).shape == (1, 16, 16, 3)
    none = damaged.select(np.array([4, 5]))
    assert "none of the 2 images" in message(none.reader().read, 0)


def test_the_report_measures_undamaged_images(damaged, monkeypatch):
    monkeypatch.setattr(measure, "load_source", lambda data, split: damaged)
    monkeypatch.setattr(measure, "has_test_images", lambda data: True)
    data = ConfigDict({"image_size": 16})
    found = measure.test_images(data, 9)
    rest = np.array([0, 1, 2, 3, 6, 7, 8])
    np.testing.assert_array_equal(found.labels, np.asarray(damaged.labels)[rest])
    pixels = damaged.reader().evaluation_images(rest, 16)
    np.testing.assert_array_equal(found.pixels, pixels)


def test_damaged_images_are_named_once_and_counted_up_to_the_limit(damaged, capsys):
    counter = DamagedImageCounter(damaged, share=0.2)  # of nine: one
    pairs = np.array([[-1, -1], [4, 6], [4, 6]])
    counter.note(pairs)
    counter.note(pairs)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and damaged.name(4) in warning and damaged.name(6) in warning
    text = message(counter.note, np.array([[5, 6]]))
    assert "2 damaged images are more than 20.00% of 9" in text and damaged.name(5) in text


def test_damaged_images_of_other_processes_count(damaged, capsys):
    counter = DamagedImageCounter(damaged, share=0.2)  # of nine: one
    counter.note(np.array([[4, 6]]))
    counter.note_others(set)  # no other process, or none that has seen another
    text = message(counter.note_others, lambda own: {*own, 5})
    assert "2 damaged images are more than 20.00% of 9" in text and damaged.name(5) in text
    assert capsys.readouterr().err.count("\n") == 1


def test_the_limit_is_the_share_rounded_down(folders, capsys):
    """29% of 100 are 28.999... in floating point."""
    source = sources.load_source(make_config("imagenet", folders), "train")
    hundred = source.select(np.zeros(100, int))
    for share, limit in ((0.29, 29), (0.299, 29), (0.001, 0), (1.0, 100)):
        counter = DamagedImageCounter(hundred, share)
        counter.note(np.array([[i, 0] for i in range(limit)]).reshape(-1, 2))
        if limit < 100:
            message(counter.note, np.array([[99, 0]]))
