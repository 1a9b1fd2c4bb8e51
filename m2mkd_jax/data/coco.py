"""Instances in COCO's format: a json file and a folder of images.

What is wrong with single annotations is counted and named, and they are left out; what makes the
file as a whole doubtful is an error.

Source: docs/detection.md#data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.data.annotations import Mask, Scene, bitmap, library
from m2mkd_jax.data.coco_problems import (
    UNKNOWN_IMAGE,
    has_unsound_polygon,
    is_id_of,
    problem,
    sound_polygons,
)
from m2mkd_jax.data.decode import DamagedImage, Form, decode
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.files import strict_json

# As many examples of each problem are named.
NAMED = 3
_SHOWN = 80  # characters of a name
# Problem of an object that is kept with its other polygons.
UNSOUND = "polygons of fewer than 3 points"
_UPRIGHT = Form(oriented=True)


@dataclass(frozen=True)
class CocoImage:
    """An image and what is annotated on it.

    Attributes:
        id: its id in the file.
        path: of the image.
        height, width: as the file says, or the image's.
        objects: its annotations that are no crowds, and sound.
    """

    id: int
    path: Path
    height: int
    width: int
    objects: tuple[Mapping[str, Any], ...]

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass
class CocoData:
    """The instances of a file.

    Attributes:
        images: by id.
        categories: ids in their order; a class is the index here.
        class_names: of the classes.
        content: of the file, for the evaluation: without the annotations that are left out.
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
    found = _images(images, folder, problems)
    sizes = {id: image.sides for id, image in found.items()}
    objects: dict[int, list[Mapping[str, Any]]] = {id: [] for id in found}
    sound = []
    for annotation in content["annotations"]:
        what, place = problem(annotation, sizes, categories), f"annotation {annotation['id']}"
        if what == UNKNOWN_IMAGE and is_id_of(annotation.get("image_id"), images):
            continue  # the image is named
        if what:
            problems.setdefault(what, []).append(place)
            continue
        if has_unsound_polygon(annotation["segmentation"]):
            problems.setdefault(UNSOUND, []).append(place)
        sound.append(annotation)
        if not annotation.get("iscrowd"):
            objects[annotation["image_id"]].append(annotation)
    kept = [
        dataclasses.replace(image, objects=tuple(objects[id]))
        for id, image in found.items()
        if objects[id] or not train
    ]
    order = sorted(categories)
    names = [str(categories[id].get("name", id)) for id in order]
    content = {**content, "annotations": sound}
    data = CocoData(kept, order, names, content, problems)
    if not kept:
        reasons = "; ".join(data.problem_lines()) or "it lists none with an object"
        raise UserError(f"{path}: no image can be used: {reasons}")
    return data


def _images(
    images: Mapping[int, Mapping[str, Any]], folder: Path, problems: dict[str, list[str]]
) -> dict[int, CocoImage]:
    """The images that can be used, by id, without their objects; adds to `problems`."""
    found: dict[int, CocoImage] = {}
    files: set[Path] = set()
    for id, image in sorted(images.items()):
        file = folder / str(image.get("file_name", ""))
        what, size = "missing image file", (0, 0)
        if _is_file(file):
            what, size = _size(image, file)
        if file in files:
            what = "image file that is listed twice"
        if what:
            problems.setdefault(what, []).append(
                printable(str(image.get("file_name", id)))[:_SHOWN]
            )
            continue
        files.add(file)
        found[id] = CocoImage(id, file, *size, ())
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _size(image: Mapping[str, Any], file: Path) -> tuple[str, tuple[int, int]]:
    """("", height and width) of an image, or what is wrong with it; the file's where none is said.

    That they are the file's is looked at when it is decoded.
    """
    said = [image.get(key) or 0 for key in ("height", "width")]
    if not any(said):
        try:
            return "", read_upright(file).shape[:2]
        except UserError:
            return "image that cannot be read", (0, 0)
    if not all(type(n) in (int, float) and n > 0 and n == n // 1 for n in said):
        return "height and width are no sides of an image", (0, 0)
    return "", (int(said[0]), int(said[1]))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=strict_json.unique_names)
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
        if type(id) is not int or abs(id) >= 1 << 63:
            raise UserError(f'{path}: an entry of "{key}" has the id {id!r}, no integer of 64 bits')
        if id in found:
            raise UserError(f'{path}: two entries of "{key}" have the id {id}')
        found[id] = entry
    return found


def load_scene(data: CocoData, image: CocoImage) -> Scene:
    """Decodes an image and its objects.

    Raises:
        DamagedImage: the image cannot be read, or has another size than the file says.
    """
    pixels = read_upright(image.path)
    if pixels.shape[:2] != image.sides:
        raise DamagedImage(
            f"{image.path} has {pixels.shape[0]} x {pixels.shape[1]} pixels; the annotations say "
            f"{image.height} x {image.width}"
        )
    corners = np.array([o["bbox"] for o in image.objects], np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    numbers = {id: i for i, id in enumerate(data.categories)}
    classes = np.array([numbers[o["category_id"]] for o in image.objects], np.int64)
    masks = [decode_mask(o["segmentation"]) for o in image.objects]
    return Scene(pixels, corners, classes, masks)


def truth(data: CocoData) -> dict[str, Any]:
    """The content of the file, of the images that are used, as pycocotools needs it.

    What is not said is added: the sides of images, areas, iscrowd. Polygons are those of training.
    """
    used = {image.id: image for image in data.images}
    images = [
        {**entry, "height": used[entry["id"]].height, "width": used[entry["id"]].width}
        for entry in data.content["images"]
        if entry["id"] in used
    ]
    annotations = []
    for entry in data.content["annotations"]:
        if image := used.get(entry["image_id"]):
            segmentation = entry["segmentation"]
            if isinstance(segmentation, list):
                segmentation = sound_polygons(segmentation)
            own = {"iscrowd": 0, **entry, "segmentation": segmentation}
            if "area" not in own:
                own["area"] = int(bitmap(decode_mask(segmentation), *image.sides).sum())
            annotations.append(own)
    return {**data.content, "images": images, "annotations": annotations}


def read_upright(path: Path) -> np.ndarray:
    """An image as its camera held it, (H, W, 3) uint8 RGB.

    16 bits are scaled to 8.

    Raises:
        DamagedImage: it cannot be read, or has 32 bits.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedImage(f"{path} cannot be read: {error.strerror}") from None
    return decode(content, str(path), form=_UPRIGHT)


def decode_mask(segmentation: Any) -> Mask:
    """A segmentation's polygons, or its bitmap if it is run-length coded."""
    if isinstance(segmentation, list):
        return [np.asarray(p, np.float64).reshape(-1, 2) for p in sound_polygons(segmentation)]
    coding = library("pycocotools.mask")
    coded = segmentation
    if isinstance(coded["counts"], list):
        coded = coding.frPyObjects(coded, *coded["size"])
    return coding.decode(coded).astype(bool)
