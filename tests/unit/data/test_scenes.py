"""Scenes by number, their batches, repeat-factor sampling, and the check of COCO's format."""

import json
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from m2mkd_jax.config.detection_section import DETECTION_DATA
from m2mkd_jax.config.keys import default_values
from m2mkd_jax.data import check, scenes
from m2mkd_jax.data.annotations import bitmap
from m2mkd_jax.data.scene_batches import (
    RepeatedIndices,
    eval_scenes,
    evaluation_scene,
    repeat_factors,
    train_scenes,
    training_scene,
)
from m2mkd_jax.data.scenes import describe_missing, load_scenes
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.coco import coco_results, evaluate_coco, without_images


def digits(**changes):
    data = ConfigDict(default_values(DETECTION_DATA))
    data.update(name="digits_scene", classes=10, image_size=64, train_images=9, test_images=5)
    data.update(objects=3, **changes)
    return data


def test_what_is_there_is_found_again():
    """The scenes' own objects as detections: every number of COCO's that can be 1 is 1."""
    source = load_scenes(digits(), "test")
    truth, results = source.truth(), []
    for i in range(len(source)):
        scene = source.read(i)
        scores = np.linspace(0.9, 0.5, len(scene.classes))
        results += coco_results(
            source.image_id(i), scene.boxes, scores, scene.classes, np.stack(scene.masks)
        )
    for kind in ("bbox", "segm"):
        stats = evaluate_coco(truth, results, kind).stats
        assert stats["AP"] == stats["AP50"] == stats["AR100"] == pytest.approx(1, abs=1e-9)
    # Annotations that are numbered from 0 are as good, and stay as they are.
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = number
    assert evaluate_coco(truth, results, "bbox").stats["AP"] == pytest.approx(1, abs=1e-9)
    assert truth["annotations"][0]["id"] == 0


def test_a_batch_depends_on_its_step_alone():
    data = digits(augment={**digits().augment.to_dict(), "scale": (0.6, 1.4)})
    source = load_scenes(data, "train")
    whole = list(train_scenes(source, data, batch_size=4, total_steps=3, seed=7))
    assert [len(batch["image"]) for batch in whole] == [4, 4, 4]
    later = next(train_scenes(source, data, batch_size=4, total_steps=3, start_step=2, seed=7))
    halves = [
        next(
            train_scenes(
                source,
                data,
                batch_size=4,
                total_steps=1,
                seed=7,
                process_index=i,
                process_count=2,
            )
        )
        for i in range(2)
    ]
    for name, value in whole[2].items():
        np.testing.assert_array_equal(later[name], value)
        both = np.concatenate([half[name] for half in halves])
        np.testing.assert_array_equal(both, whole[0][name])
    assert whole[0]["masks"].shape == (4, 3, 64, 8)


def test_evaluation_sees_every_scene_once():
    data = digits()
    data.augment.resize = "none"
    source = pickle.loads(pickle.dumps(load_scenes(data, "test")))
    batches = list(eval_scenes(source, data, batch_size=2))
    images = np.concatenate([batch["image"] for batch in batches])
    for i in range(5):
        np.testing.assert_array_equal(images[i], source.read(i).image)
    assert not images[5].any() and len(images) == 6
    assert batches[2]["original"].tolist() == [[64, 64], [1, 1]]


@pytest.mark.parametrize("resize", ["jitter", "plain", "none"])
def test_scenes_fit_into_the_square(resize):
    data = digits()
    data.augment.update(resize=resize, edges=(40, 64), test_edge=48, longest=64)
    scene = load_scenes(data, "train").read(0)
    for draws in np.random.default_rng(0).random((6, 3)):
        assert max(training_scene(scene, data, draws).size) <= 64
    wanted = {"jitter": (64, 64), "plain": (48, 48), "none": (64, 64)}
    assert evaluation_scene(scene, data).size == wanted[resize]
    data.augment.flip = False
    if resize == "none":
        np.testing.assert_array_equal(training_scene(scene, data, draws * 0).image, scene.image)


def test_repeat_factors():
    """Gupta et al. 2019: max(1, sqrt(t / f)), of an image the largest of its classes."""
    classes = [np.array([0])] * 12 + [np.array([0, 1])] * 3 + [np.array([2, 1]), np.array([], int)]
    found = repeat_factors(classes, 3, threshold=0.4)
    rare, rarest = np.sqrt(0.4 / (4 / 17)), np.sqrt(0.4 / (1 / 17))
    np.testing.assert_allclose(found, [1.0] * 12 + [rare] * 3 + [rarest, 1.0])
    np.testing.assert_allclose(repeat_factors(classes, 3, threshold=1e-9), 1.0)


class Rare:
    """Scenes of which the last alone has class 1."""

    class_names = ("0", "1")

    def __len__(self):
        return 40

    def classes_of(self, index):
        return np.array([int(index == 39)])


def test_images_of_rare_classes_are_drawn_more_often():
    indices = RepeatedIndices(Rare(), 4, seed=1, threshold=0.4)
    assert indices.steps_per_epoch == 10
    epochs = [
        np.concatenate([indices[step + 10 * epoch] for step in range(10)]) for epoch in (0, 1)
    ]
    # sqrt(0.4 * 40) = 4 times as often as each of the others: 40 * 4 / 43 draws.
    for drawn in epochs:
        assert len(drawn) == 40 and (drawn == 39).sum() in (3, 4)
        assert np.bincount(drawn, minlength=40).max() <= 4
    assert epochs[0].tolist() != epochs[1].tolist()


SQUARE = [2, 2, 8, 2, 8, 9, 2, 9]


def instances(root, **changes):
    """A directory of COCO's format with one file."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": 5, "bbox": [2, 2, 6, 7], "area": 42, "iscrowd": 0}
        | {"segmentation": [SQUARE]}
        | own
        for i, own in enumerate(changes.pop("annotations", [{}]))
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 16}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": annotations,
    } | changes
    for folder in ("annotations", "val2017"):
        (root / folder).mkdir(exist_ok=True)
    Image.new("RGB", (16, 12)).save(root / "val2017" / "a.png")
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_a_sound_directory_of_coco(tmp_path, capsys):
    assert check.main([str(instances(tmp_path))]) == 0
    text = capsys.readouterr().out
    assert "val2017: 1 images, 1 of them with objects; 1 objects of 2 classes, 0 crowds" in text
    assert "1 classes without an object: cat" in text


WRONG = [
    ({"annotations": [{}, {"category_id": 7}]}, "unknown category: 1 left out (annotation 1)"),
    ({"annotations": [{}, {"area": -1}, {"area": -2}]}, "negative or no area: 2 left out"),
    ({"annotations": [{}, {"segmentation": [[1, 1, 4, 4]]}]}, "no polygon of 3 points or more: 1"),
    (
        {"annotations": [{"segmentation": [SQUARE, [1, 1, 4, 4]]}]},
        "polygons of fewer than 3 points: 1 left out (annotation 0)",
    ),
    ({"annotations": [{}, {"id": 0}]}, 'two entries of "annotations" have the id 0'),
    (
        {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]},
        "missing image file: 1 left out (b.png)",
    ),
    (
        {"images": [{"id": 1, "file_name": "a.png", "height": 9, "width": 9}]},
        "the annotations say 9 x 9",
    ),
]


@pytest.mark.parametrize(("changes", "line"), WRONG)
def test_what_is_wrong_is_counted_and_named(changes, line, tmp_path, capsys):
    assert check.main([str(instances(tmp_path, **changes))]) == 2
    assert line in capsys.readouterr().out


def test_training_says_what_it_leaves_out(tmp_path, capsys):
    instances(tmp_path, annotations=[{}, {"category_id": 7}])
    data = digits(root=str(tmp_path), test_json="annotations/instances_val2017.json")
    data.update(name="coco", classes=2, train_json=data.test_json, train_folder="val2017")
    source = load_scenes(data, "train")
    assert "unknown category: 1 left out" in capsys.readouterr().err
    assert len(source) == 1 and source.truth()["images"][0]["id"] == 1
    assert pickle.loads(pickle.dumps(source)).read(0).classes.tolist() == [0]
    data.classes = 3
    with pytest.raises(UserError, match="classes is 3; the annotations have 2"):
        load_scenes(data, "train")
    data.root = str(tmp_path / "none")
    assert "set data.root" in describe_missing(data)


def coco_data(root, **changes):
    """The section of a config whose training and test scenes are those of `instances`."""
    data = digits(root=str(root), train_folder="val2017", test_folder="val2017", **changes)
    data.update(name="coco", classes=2, train_images=0, test_images=0)
    data.train_json = data.test_json = "annotations/instances_val2017.json"
    return data


def test_both_splits_have_the_same_classes_in_the_same_order(tmp_path):
    data = coco_data(instances(tmp_path))
    path = tmp_path / "annotations" / "test.json"
    content, data.test_json = json.loads((tmp_path / data.test_json).read_text()), str(path)
    content["annotations"][0]["category_id"] = 7
    for ids, names, says in (
        ((7, 8), ("dog", "cat"), ""),
        ((7, 8), ("cat", "dog"), 'class 0, in the order of the ids, is "cat", and "dog" in'),
        ((8, 7), ("dog", "cat"), 'class 0, in the order of the ids, is "cat", and "dog" in'),
        ((7, 8), ("dog", "fox"), 'class 1, in the order of the ids, is "fox", and "cat" in'),
    ):
        content["categories"] = [
            {"id": id, "name": name} for id, name in zip(ids, names, strict=True)
        ]
        path.write_text(json.dumps(content))
        scenes._coco.cache_clear()
        if not says:
            assert load_scenes(data, "test").class_names == names
            continue
        with pytest.raises(UserError, match=says):
            load_scenes(data, "test")


def test_images_that_are_not_resized_fit_into_the_square(tmp_path):
    data = coco_data(instances(tmp_path), image_size=12)
    for resize in ("jitter", "plain"):
        data.augment.resize = resize
        assert len(load_scenes(data, "train")) == 1
    data.augment.resize = "none"
    with pytest.raises(UserError, match=r"a.png has 12 x 16 pixels, and image_size is 12: raise"):
        load_scenes(data, "train")
    data.image_size = 16
    assert len(load_scenes(data, "train")) == 1


def several_images(root, damage, count=5):
    """A section of a config with `count` grey images, of which `damage` spoils image 2."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 12, "width": 16} for i in range(count)]
    instances(root, images=images, annotations=[{"image_id": i} for i in range(count)])
    for i in range(count):
        Image.new("RGB", (16, 12), (40 * i,) * 3).save(root / "val2017" / f"{i}.png")
    damage(root / "val2017" / "2.png")
    data = coco_data(root, image_size=16, damaged_share=0.2, workers=0)
    data.augment.resize, data.augment.flip = "none", False
    return data


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "of another size": lambda path: Image.new("RGB", (9, 9)).save(path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_another_image_stands_in_for_a_damaged_one(damage, tmp_path, capsys):
    data = several_images(tmp_path, damage)
    source = load_scenes(data, "train")
    batch = next(train_scenes(source, data, batch_size=5, total_steps=1, seed=0))
    # Each once, but the image after it in place of the damaged one.
    assert sorted(batch["image"][:, 0, 0, 0].tolist()) == [0, 40, 120, 120, 160]
    err = capsys.readouterr().err
    assert "2.png" in err and "3.png stands in for it (1 of at most 1)" in err
    data.damaged_share = 0.1
    with pytest.raises(UserError, match=r"1 damaged images are more than 10.00% of 5"):
        next(train_scenes(source, data, batch_size=5, total_steps=1, seed=0))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_image_is_left_out_of_the_evaluation(damage, tmp_path, capsys):
    """All that is there is found: without the damaged image every number is 1, with it less."""
    data = several_images(tmp_path, damage)
    source = load_scenes(data, "test")
    batches = list(eval_scenes(source, data, batch_size=2))
    original = np.concatenate([batch["original"] for batch in batches])[:5]
    assert original.tolist() == [[12, 16], [12, 16], [0, 0], [12, 16], [12, 16]]
    assert "it is not counted (1 of at most 1)" in capsys.readouterr().err
    results = []
    for i in (0, 1, 3, 4):
        scene = source.read(i)
        masks = np.stack([bitmap(mask, 12, 16) for mask in scene.masks])
        results += coco_results(source.image_id(i), scene.boxes, [0.9], [5], masks)
    whole, found = source.truth(), without_images(source.truth(), {2})
    assert evaluate_coco(found, results, "bbox").stats["AP"] == pytest.approx(1)
    assert evaluate_coco(whole, results, "bbox").stats["AP"] < 0.9


def test_a_list_that_is_there_twice_is_no_coco(tmp_path):
    """Python's reader takes the last one, in silence."""
    data = coco_data(instances(tmp_path))
    path = tmp_path / data.test_json
    path.write_text(path.read_text()[:-1] + ', "images": []}')
    with pytest.raises(UserError, match="is no JSON: a name occurs twice"):
        load_scenes(data, "train")
