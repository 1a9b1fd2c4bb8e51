"""Instances in COCO's format: what is wrong is counted and named; masks; generated scenes."""

import copy
import io
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as mask_coding

from m2mkd_jax.data import annotations, coco
from m2mkd_jax.data.digits_scene import digits_scene
from m2mkd_jax.errors import UserError

SQUARE = [2, 2, 8, 2, 8, 9, 2, 9]


def annotation(id, **fields):
    own = {"id": id, "image_id": 1, "category_id": 5, "bbox": [2, 2, 6, 7], "area": 42}
    return own | {"segmentation": [SQUARE], "iscrowd": 0} | fields


CONTENT = {
    "images": [
        {"id": 2, "file_name": "b.png", "height": 12, "width": 16},
        {"id": 1, "file_name": "a.png", "height": 12, "width": 16},
    ],
    "categories": [{"id": 9, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [annotation(1)],
}


def read(tmp_path, content, train=True):
    for name in ("a", "b"):
        Image.new("RGB", (16, 12), (9, 99, 200)).save(tmp_path / f"{name}.png")
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return coco.read_coco(path, tmp_path, train=train)


def with_annotations(*more):
    return copy.deepcopy(CONTENT) | {"annotations": [annotation(1), *more]}


def test_a_sound_file(tmp_path):
    data = read(tmp_path, CONTENT)
    assert data.categories == [5, 9]
    assert data.class_names == ["dog", "cat"]
    assert [image.id for image in data.images] == [1]
    assert [image.id for image in read(tmp_path, CONTENT, train=False).images] == [1, 2]
    scene = coco.load_scene(data, data.images[0])
    assert scene.image.shape == (12, 16, 3)
    assert scene.boxes.tolist() == [[2, 2, 8, 9]]
    assert scene.classes.tolist() == [0]
    assert annotations.bitmap(scene.masks[0], 12, 16).sum() == 42


PROBLEMS = [
    ({"image_id": 7}, "unknown image"),
    ({"category_id": 7}, "unknown category"),
    ({"area": -3}, "negative or no area"),
    ({"bbox": [2, 2, -6, 7]}, "negative or no area"),
    ({"bbox": [2, 2, "6", 7]}, "bbox is not"),
    ({"segmentation": [[1, 1, 4, 4]]}, "no polygon of 3 points"),
    ({"segmentation": [[1, 1, 4, 4, 5, 5, 6]]}, "no polygon of 3 points"),
    ({"segmentation": {"size": [12, 16]}}, "without counts"),
    ({"image_id": {"a": 1}}, "unknown image"),
    ({"category_id": [5]}, "unknown category"),
    ({"area": "big"}, "area is no number"),
    ({"area": math.nan}, "area is no number"),
    ({"bbox": [2, 2, 10**400, 7]}, "bbox is not"),
    ({"bbox": [16, 2, 6, 7]}, "bbox is not in the image"),
    ({"bbox": [2, 2, 6, 1e30]}, "bbox is not in the image"),
    ({"iscrowd": "no"}, "iscrowd is neither"),
    ({"segmentation": [[2, 2, 1e12, 2, 8, 9]]}, "polygon is far outside"),
    ({"segmentation": {"size": [16, 12], "counts": [0, 192]}}, "mask of another size"),
    ({"segmentation": {"size": [12, 16], "counts": [0, 191]}}, "mask whose counts"),
    ({"segmentation": {"size": [12, 16], "counts": [200, -8]}}, "mask whose counts"),
    ({"segmentation": {"size": [12, 16], "counts": [0.5, 191.5]}}, "mask whose counts"),
    ({"segmentation": {"size": [12, 16], "counts": 3}}, "mask whose counts"),
    ({"segmentation": {"size": [12, 16], "counts": "garbage!!"}}, "mask whose counts"),
    ({"segmentation": {"size": [12, 16], "counts": ""}}, "mask whose counts"),
    ({"segmentation": {"size": [12, 16], "counts": "oooooooooooooooo0"}}, "mask whose counts"),
    ({"iscrowd": 1, "segmentation": {"size": [12, 16], "counts": "o"}}, "mask whose counts"),
]


@pytest.mark.parametrize(("fields", "said"), PROBLEMS)
def test_wrong_annotations_are_counted_and_named(fields, said, tmp_path):
    data = read(tmp_path, with_annotations(annotation(31, **fields), annotation(32, **fields)))
    (line,) = data.problem_lines()
    assert said in line
    assert "2 left out (annotation 31, annotation 32)" in line
    assert len(data.images[0].objects) == 1
    # Nor are they measured by.
    assert [a["id"] for a in coco.truth(data)["annotations"]] == [1]


@pytest.mark.parametrize("seed", range(20))
def test_compressed_masks_are_those_of_pycocotools(seed, tmp_path):
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((6, 8)) < 0.1 * (seed % 10), np.ones((2, 2))) * (rng.random() < 0.9)
    coded = mask_coding.encode(np.asfortranarray(mask, np.uint8))
    text = coded["counts"].decode()
    for counts, problems in ((text, 0), (text[:-1], 1), (f"{text}1", 1)):
        more = annotation(2, segmentation={"size": [12, 16], "counts": counts})
        assert len(read(tmp_path, with_annotations(more)).problems) == problems, counts


def test_an_image_that_is_listed_twice_counts_once(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["images"].append({"id": 3, "file_name": "a.png", "height": 12, "width": 16})
    content["annotations"].append(annotation(2, image_id=3))
    data = read(tmp_path, content, train=False)
    assert data.problem_lines() == ["image file that is listed twice: 1 left out (a.png)"]
    assert [image.id for image in data.images] == [1, 2]


@pytest.mark.parametrize("height", ["tall", -12, [12], 12.5, math.nan, None, True])
def test_sides_that_are_none_are_named(height, tmp_path):
    content = copy.deepcopy(CONTENT)
    content["images"][0]["height"] = height
    data = read(tmp_path, content, train=False)
    assert data.problem_lines() == ["height and width are no sides of an image: 1 left out (b.png)"]


@pytest.mark.parametrize("name", ["", "a\0b.png", "a" * 5000, "a\nb.png", 3])
def test_names_that_no_file_has_are_named_in_a_line(name, tmp_path):
    content = copy.deepcopy(CONTENT)
    content["images"][0]["file_name"] = name
    (line,) = read(tmp_path, content, train=False).problem_lines()
    assert line.startswith("missing image file: 1 left out (") and line.isprintable()
    assert len(line) < 200


def test_what_is_not_said_is_added_for_the_evaluation(tmp_path):
    content = copy.deepcopy(CONTENT)
    for key in ("height", "width"):
        del content["images"][1][key]
    for key in ("area", "iscrowd"):
        del content["annotations"][0][key]
    content["annotations"][0]["segmentation"].append([1, 1, math.nan, 4, 5, 5])
    data = read(tmp_path, content)
    found = coco.truth(data)
    assert found["images"] == [{"id": 1, "file_name": "a.png", "height": 12, "width": 16}]
    (own,) = found["annotations"]
    assert (own["area"], own["iscrowd"], own["segmentation"]) == (42, 0, [SQUARE])


def test_crowds_are_no_objects_and_no_problem(tmp_path):
    crowd = annotation(2, iscrowd=1, segmentation={"counts": [0, 192], "size": [12, 16]})
    data = read(tmp_path, with_annotations(crowd))
    assert not data.problems
    assert len(data.images[0].objects) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", 'has no list "images"'),
        (CONTENT | {"annotations": [annotation(1), annotation(1)]}, "have the id 1"),
        (CONTENT | {"images": [CONTENT["images"][0]] * 2}, 'entries of "images" have the id 2'),
        (CONTENT | {"annotations": []}, "no image can be used"),
        (
            CONTENT | {"images": [{"id": 1, "file_name": "none.png"}]},
            "missing image file: 1 left out (none.png)",
        ),
    ],
)
def test_a_wrong_file_is_an_error_of_one_line(content, said, tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size_is_refused(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["images"][1]["width"] = 17
    data = read(tmp_path, content)
    with pytest.raises(UserError, match="12 x 17"):
        coco.load_scene(data, data.images[0])


def test_bitmaps_and_polygons_are_augmented_alike():
    image = np.zeros((40, 60, 3), np.uint8)
    polygon = [np.array([[10.0, 8], [30, 8], [30, 28], [10, 28]])]
    box, classes = np.array([[10.0, 8, 30, 28]]), np.array([1])
    bitmap = annotations.bitmap(polygon, 40, 60)
    found = [
        annotations.large_scale_jitter(
            annotations.Scene(image, box, classes, [mask]), 48, 0.0, 1.6, 0.5
        )
        for mask in (polygon, bitmap)
    ]
    assert found[0].size == found[1].size
    np.testing.assert_allclose(found[0].boxes, found[1].boxes, atol=2)
    own, other = (annotations.bitmap(scene.masks[0], *scene.size) for scene in found)
    assert (own & other).sum() > 0.9 * (own | other).sum()


def test_objects_outside_the_crop_are_dropped():
    far = [np.array([[50.0, 30], [58, 30], [58, 38]])]
    near = [np.array([[1.0, 1], [9, 1], [9, 9]])]
    boxes = np.array([[50.0, 30, 58, 38], [1, 1, 9, 9]])
    scene = annotations.Scene(np.zeros((40, 60, 3), np.uint8), boxes, np.array([3, 4]), [far, near])
    found = annotations.large_scale_jitter(scene, 30, 1.0, 2.0, 0.0)
    assert found.classes.tolist() == [4]


def test_digit_scenes_are_functions_of_seed_split_and_index():
    first, again = digits_scene(3, "train", 5), digits_scene(3, "train", 5)
    np.testing.assert_array_equal(first.image, again.image)
    for other in (digits_scene(4, "train", 5), digits_scene(3, "test", 5)):
        assert (first.image != other.image).any()


def test_digit_scenes_have_exact_masks_and_tight_boxes():
    scenes = [digits_scene(0, "train", i, side=96) for i in range(20)]
    assert sum(len(scene.classes) for scene in scenes) > 30
    for scene in scenes:
        assert scene.image.shape == (96, 96, 3)
        assert np.sum(scene.masks, axis=0).max(initial=0) <= 1  # what is covered belongs to one
        for box, mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert inside.sum() == mask.sum() > 0
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any()
    with pytest.raises(UserError, match="at least 56"):
        digits_scene(0, "train", 0, side=40)


def saved(path, pixels, orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("shape", [(12, 16, 3), (12, 16)], ids=["rgb", "grey"])
def test_images_of_8_bits_are_pillows_upright(suffix, orientation, shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = saved(tmp_path / f"a.{suffix}", pixels, orientation)
    # Of a grey TIFF file that it maps to memory, Pillow turns the sides and not the pixels.
    with Image.open(io.BytesIO(path.read_bytes())) as file:
        expected = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    assert expected.shape[:2] == ((16, 12) if orientation == 6 else (12, 16))
    np.testing.assert_array_equal(coco.read_upright(path), expected)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_images_of_16_bits_are_scaled_and_of_32_refused(suffix, tmp_path):
    high = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(high << 8 | 99).save(path)
    np.testing.assert_array_equal(coco.read_upright(path), high[..., None].repeat(3, -1))
    for kind in (np.float32, np.int32):
        path = tmp_path / "b.tif"
        Image.fromarray(high.astype(kind)).save(path)
        with pytest.raises(UserError, match=r"b\.tif has 32 bits per pixel"):
            coco.read_upright(path)
