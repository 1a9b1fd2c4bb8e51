"""Annotated scenes by number: what every detection data set looks like to the rest of the package.

Axes: N scenes, K classes.

Source: docs/detection.md#data.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from m2mkd_jax.arguments import at_home
from m2mkd_jax.data.annotations import Scene, bitmap, library
from m2mkd_jax.data.coco import CocoData, load_scene, read_coco, truth
from m2mkd_jax.data.digits_scene import CLASSES, digits_scene
from m2mkd_jax.errors import UserError, did_you_mean, printable, require

NAMES = ("digits_scene", "coco")
SPLITS = ("train", "test")


class SceneSource(Protocol):
    """N scenes, by number. Picklable: it is sent to Grain's worker processes."""

    @property
    def class_names(self) -> Sequence[str]:
        """In the order of the classes."""

    @property
    def categories(self) -> Sequence[int]:
        """The classes' ids in COCO's results."""

    @property
    def in_memory(self) -> bool:
        """Whether threads read it as fast as processes."""

    def __len__(self) -> int:
        """N."""

    def name(self, index: int) -> str:
        """What messages call scene `index`."""

    def read(self, index: int) -> Scene:
        """Scene `index`. Raises DamagedImage where its image cannot be used."""

    def image_id(self, index: int) -> int:
        """The id of scene `index` in COCO's results."""

    def classes_of(self, index: int) -> np.ndarray:
        """The classes of its objects."""

    def truth(self) -> dict[str, Any]:
        """All annotations, as the content of a file of COCO's instances."""


@dataclasses.dataclass(frozen=True)
class GeneratedScenes:
    """Scenes of digits; see digits_scene.py.

    Attributes:
        seed, split, side: as `digits_scene` takes them.
        count: N.
    """

    seed: int
    split: str
    count: int
    side: int
    class_names: tuple[str, ...] = tuple(str(digit) for digit in range(CLASSES))
    categories: tuple[int, ...] = tuple(range(CLASSES))
    in_memory: bool = True

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Its number and the split."""
        return f"number {index} of {self.split}"

    def read(self, index: int) -> Scene:
        """Scene `index`."""
        return digits_scene(self.seed, self.split, int(index), self.side)

    def image_id(self, index: int) -> int:
        """Its number."""
        return int(index)

    def classes_of(self, index: int) -> np.ndarray:
        """The classes of its objects."""
        return self.read(index).classes

    def truth(self) -> dict[str, Any]:
        """All annotations, masks run-length coded."""
        coding = library("pycocotools.mask")
        annotations: list[dict[str, Any]] = []
        images: list[dict[str, int]] = []
        for index in range(self.count):
            scene = self.read(index)
            height, width = scene.size
            images.append({"id": index, "height": height, "width": width})
            for box, number, mask in zip(scene.boxes, scene.classes, scene.masks, strict=True):
                whole = bitmap(mask, height, width)
                coded = coding.encode(np.asfortranarray(whole, np.uint8))
                x0, y0, x1, y1 = (float(n) for n in box)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": int(number),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": int(whole.sum()),
                        "iscrowd": 0,
                        "segmentation": coded,
                    }
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(self.class_names)]
        return {"images": images, "annotations": annotations, "categories": categories}


class CocoScenes:
    """Scenes of a file of COCO's instances.

    Args:
        data: of the file.
        count: the first that are used; 0: all.
    """

    in_memory = False

    def __init__(self, data: CocoData, count: int = 0):
        images = data.images[:count] if count else data.images
        # What the evaluation alone needs is not sent to worker processes.
        self._data = dataclasses.replace(data, images=images, content={})
        self._content = data.content
        self.class_names, self.categories = tuple(data.class_names), tuple(data.categories)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_content": {}}

    def __len__(self) -> int:
        return len(self._data.images)

    def name(self, index: int) -> str:
        """The path of its image."""
        return str(self._data.images[index].path)

    def read(self, index: int) -> Scene:
        """Scene `index`. Raises DamagedImage where its image cannot be used."""
        return load_scene(self._data, self._data.images[index])

    def image_id(self, index: int) -> int:
        """The id of its image."""
        return self._data.images[index].id

    def classes_of(self, index: int) -> np.ndarray:
        """The classes of its objects."""
        numbers = {id: i for i, id in enumerate(self.categories)}
        objects = self._data.images[index].objects
        return np.array([numbers[o["category_id"]] for o in objects], np.int64)

    def check_sides(self, side: int) -> None:
        """Refuses images that do not fit into a square. Raises UserError."""
        for image in self._data.images:
            if max(image.sides) > side:
                raise UserError(
                    f"{image.path} has {image.height} x {image.width} pixels, and image_size is "
                    f"{side}: raise it, or set augment.resize to jitter or plain"
                )

    def truth(self) -> dict[str, Any]:
        """The content of the file, of the images that are used."""
        return truth(dataclasses.replace(self._data, content=self._content))


def is_scenes(data: Any) -> bool:
    """Whether a section of the config is of scenes, not of single labelled images."""
    return "objects" in data


def coco_paths(data: Any, split: str) -> tuple[Path, Path]:
    """The json file and the folder of a split."""
    given = data.root or os.path.join(os.environ.get("M2MKD_DATA") or "~/data", "coco")
    root = at_home(given)
    return root / data[f"{split}_json"], root / data[f"{split}_folder"]


def describe_missing(data: Any) -> str | None:
    """What keeps the scenes of a config from being read, in one line; None if nothing does."""
    if data.name == "digits_scene":
        return None
    if data.name not in NAMES:
        return f"data.name is {data.name!r}: {did_you_mean(str(data.name), NAMES)}"
    for split in SPLITS:
        for path in coco_paths(data, split):
            if not path.exists():
                return f"{path} does not exist: download COCO 2017 and unpack it, or set data.root"
    return None


def load_scenes(data: Any, split: str) -> SceneSource:
    """Opens a split of the scenes that a config names.

    Args:
        data: config.detection.data.
        split: 'train' or 'test'.

    Raises:
        UserError: they are missing, broken, or not of as many classes as the config says.
    """
    if line := describe_missing(data):
        raise UserError(line)
    count = data[f"{split}_images"]
    source: GeneratedScenes | CocoScenes
    if data.name == "digits_scene":
        require(count > 0, f"{split}_images is 0; digits_scene makes as many scenes as it says")
        require(data.classes == CLASSES, f"classes is {data.classes}; digits_scene has {CLASSES}")
        source = GeneratedScenes(data.seed, split, count, data.image_size)
    else:
        source = CocoScenes(_coco(*coco_paths(data, split), split == "train"), count)
        found = len(source.class_names)
        require(found == data.classes, f"classes is {data.classes}; the annotations have {found}")
        if data.augment.resize == "none":
            source.check_sides(data.image_size)
        if split == "test":
            _check_same_classes(data, source.class_names)
            some = any(len(source.classes_of(i)) for i in range(len(source)))
            require(some, f"no test image of {coco_paths(data, split)[0]} has an object")
    return source


def _check_same_classes(data: Any, names: Sequence[str]) -> None:
    """Refuses test scenes whose classes are not those of the training scenes, in their order.

    A class is the place of its category's id among all: other ids are as good, other names are not.
    """
    (path, folder), test = coco_paths(data, "train"), coco_paths(data, "test")[0]
    known = _coco(path, folder, True).class_names
    for i, (trained, tested) in enumerate(itertools.zip_longest(known, names, fillvalue="")):
        require(
            trained == tested,
            printable(
                f'{test}: class {i}, in the order of the ids, is "{tested}", and "{trained}" in '
                f"{path}: both need the same categories"
            ),
        )


@functools.lru_cache(maxsize=2)
def _coco(path: Path, folder: Path, train: bool) -> CocoData:
    data = read_coco(path, folder, train=train)
    for line in data.problem_lines():
        print(f"warning: {path}: {line}", file=sys.stderr)
    return data
