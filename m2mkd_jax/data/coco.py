"""Instances in COCO's format: a json file and a folder of images.

What is wrong with single annotations is counted and named, and they are left out; what makes the
file as a whole doubtful is an error.

Source: docs/detection.md#data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from m2mkd_jax.data.annotations import Mask, Scene, library
from m2mkd_jax.errors import UserError

# As many examples of each problem are named.
NAMED = 3
# Problem of an object that is kept with its other polygons.
UNSOUND = "polygons of fewer than 3 points"


@dataclass(frozen=True)
class CocoImage:
    """An image and what is annotated on it.

    Attributes:
        id: its id in the file.
        path: of the image.
        height, width: as the file says.
        objects: its annotations that are no crowds, and sound.
    """

    id: int
    path: Path
    height: int
    width: int
    objects: tuple[Mapping[str, Any], ...]


@dataclass
class CocoData:
    """The instances of a file.

    Attributes:
        images: by id.
        categories: ids in their order; a class is the index here.
        class_names: of the classes.
        content: of the file, for the evaluation.
        problems: what is wrong -> where, of each annotation or image left out.
    """

    images: list[CocoImage]
    categories: list[int]
    class_names: list[str]
    content: dict[str, Any]
    problems: dict[str, list[str]] = field(default_factory=dict)

    def problem_lines(self) -> list[str]:
        """One line for each kind of problem, with its count and the first few."""
        return [
            f"{what}: {len(where)} left out ({', '.join(where[:NAMED])}"
            f"{', ...' if len(where) > NAMED else ''})"
            for what, where in self.problems.items()
        ]


def read_coco(path: Path, folder: Path, *, train: bool) -> CocoData:
    """Reads a file of instances.

    Args:
        path: of the json file.
        folder: of the images.
        train: leave out images without an object.

    Raises:
        UserError: the file cannot be read, has no such lists, an id is there twice, or nothing
            that can be used is left.
    """
    content = _parsed(path)
    images, categories = (_by_id(content[key], key, path) for key in ("images", "categories"))
    _by_id(content["annotations"], "annotations", path)
    problems: dict[str, list[str]] = {}
    objects: dict[int, list[Mapping[str, Any]]] = {id: [] for id in images}
    for annotation in content["annotations"]:
        what = _problem(annotation, images, categories)
        if what:
            problems.setdefault(what, []).append(f"annotation {annotation['id']}")
        elif not annotation.get("iscrowd"):
            if _has_unsound_polygon(annotation["segmentation"]):
                problems.setdefault(UNSOUND, []).append(f"annotation {annotation['id']}")
            objects[annotation["image_id"]].append(annotation)
    found = []
    for id, image in sorted(images.items()):
        file = folder / str(image.get("file_name", ""))
        if not file.is_file():
            problems.setdefault("missing image file", []).append(str(image.get("file_name", id)))
        elif objects[id] or not train:
            size = int(image.get("height", 0)), int(image.get("width", 0))
            found.append(CocoImage(id, file, *size, tuple(objects[id])))
    order = sorted(categories)
    names = [str(categories[id].get("name", id)) for id in order]
    data = CocoData(found, order, names, content, problems)
    if not found:
        reasons = "; ".join(data.problem_lines()) or "it lists none with an object"
        raise UserError(f"{path}: no image can be used: {reasons}")
    return data


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}") from None
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise UserError(f'{path} has no list "{key}" of objects; it is no COCO instances file')
    return content


def _by_id(entries: Iterable[dict[str, Any]], key: str, path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        id = entry.get("id")
        if type(id) is not int:
            raise UserError(f'{path}: an entry of "{key}" has the id {id!r}, no integer')
        if id in found:
            raise UserError(f'{path}: two entries of "{key}" have the id {id}')
        found[id] = entry
    return found


def _problem(
    annotation: Mapping[str, Any], images: Mapping[int, Any], categories: Mapping[int, Any]
) -> str:
    """What is wrong with an annotation; "" if nothing is."""
    if annotation.get("image_id") not in images:
        return "unknown image"
    if annotation.get("category_id") not in categories:
        return "unknown category"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return "bbox is not x y width height"
    if box[2] <= 0 or box[3] <= 0 or annotation.get("area", 1) < 0:
        return "negative or no area"
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        sound = {"counts", "size"} <= set(segmentation)
        return "" if sound else "segmentation without counts and size"
    if not isinstance(segmentation, list) or not sound_polygons(segmentation):
        return "no polygon of 3 points or more"
    return ""


def _has_unsound_polygon(segmentation: Any) -> bool:
    return isinstance(segmentation, list) and len(sound_polygons(segmentation)) < len(segmentation)


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(v) in (int, float) and np.isfinite(v) for v in values)


def sound_polygons(segmentation: Iterable[Any]) -> list[list[float]]:
    """The polygons of an even number of coordinates, at least 6.

    Source: docs/detection.md#data.
    """
    return [
        polygon
        for polygon in segmentation
        if isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and _are_numbers(polygon)
    ]


def load_scene(data: CocoData, image: CocoImage) -> Scene:
    """Decodes an image and its objects.

    Raises:
        UserError: the image cannot be read, or has another size than the file says.
    """
    pixels = read_upright(image.path)
    if image.height and pixels.shape[:2] != (image.height, image.width):
        raise UserError(
            f"{image.path} has {pixels.shape[0]} x {pixels.shape[1]} pixels; the annotations say "
            f"{image.height} x {image.width}"
        )
    corners = np.array([o["bbox"] for o in image.objects], np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    numbers = {id: i for i, id in enumerate(data.categories)}
    classes = np.array([numbers[o["category_id"]] for o in image.objects], np.int64)
    masks = [decode_mask(o["segmentation"]) for o in image.objects]
    return Scene(pixels, corners, classes, masks)


def read_upright(path: Path) -> np.ndarray:
    """An image as its camera held it, (H, W, 3) uint8 RGB.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            return np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def decode_mask(segmentation: Any) -> Mask:
    """A segmentation's polygons, or its bitmap if it is run-length coded."""
    if isinstance(segmentation, list):
        return [np.asarray(p, np.float64).reshape(-1, 2) for p in sound_polygons(segmentation)]
    coding = library("pycocotools.mask")
    coded = segmentation
    if isinstance(coded["counts"], list):
        coded = coding.frPyObjects(coded, *coded["size"])
    return coding.decode(coded).astype(bool)
