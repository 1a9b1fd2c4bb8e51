"""A finished detector, or its backbone, as a function of images.

Axes: B images, H height, W width, N detections.

Source: docs/detection.md#batching, docs/detection.md#inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.checkpoint.store import load_weights
from m2mkd_jax.checkpoint.trees import match_tree
from m2mkd_jax.conversion.bundle import is_bundle
from m2mkd_jax.conversion.open_weights import description_errors, find_weights, local_path
from m2mkd_jax.detection.detector import builder
from m2mkd_jax.detection.spec import DetectorSpec, backbone_of, is_detection, spec_of
from m2mkd_jax.detection.weights import TREE, convert_detector, read_arch_file
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, registry
from m2mkd_jax.parallel import backend

# Images of a batch, if they are padded to a square.
BATCH = 8


@dataclass(frozen=True)
class ImageDetections:
    """The detections of one image, by falling score.

    Attributes:
        boxes: (N, 4) in the image's pixels.
        scores: (N).
        classes: (N).
        masks: (N, 28, 28), probabilities within the boxes.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray


class DetectionModel:
    """A detector or a backbone with its weights.

    Args:
        description: of the weights.
        tree: the parameters.
        assumed_normalisation: whether mean and std of the pixels are ImageNet's because nothing
            says what they are.

    Attributes:
        description, assumed_normalisation: as above.
        spec: the hyperparameters.
        class_names: names of the classes in their order; () if there are none.
        category_ids: their ids in COCO's format; () if the weights record none.
        test_edges: shortest and longest edge to which evaluation resizes images; (): it does not;
            None: the weights do not record it.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        tree: Mapping[str, Any],
        assumed_normalisation: bool = False,
    ):
        self.description, self.spec = description, spec_of(description)
        self.assumed_normalisation = assumed_normalisation
        part = chain.abstract(builder(self.spec))
        self._params = jax.tree.map(jnp.asarray, match_tree(tree, part.params, "the weights"))
        recorded = registry.normalisation(description)
        self._mean, self._std = (
            np.asarray(recorded[key], np.float32) * 255 for key in ("mean", "std")
        )
        self.class_names = registry.class_names(description)
        self.category_ids = _category_ids(description, self.classes)
        self.test_edges = _test_edges(description)
        self._features = backend.jit(
            lambda params, images: chain.merge(part.graph, params, {}).features(images)[0]
        )
        self._detect = backend.jit(
            lambda params, *arrays: chain.merge(part.graph, params, {}).detect(*arrays)
        )

    @property
    def classes(self) -> int:
        """How many classes it tells apart; 0 for a backbone."""
        return self.spec.classes if isinstance(self.spec, DetectorSpec) else 0

    @property
    def is_detector(self) -> bool:
        """Whether it gives detections, not features."""
        return isinstance(self.spec, DetectorSpec)

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The map `last_feat` and the levels `p2` to `p6` of normalised images (B, H, W, 3).

        Raises:
            UserError: the images have another shape, sides that are no multiples of the patch, or
                are no floats.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[3] != 3 or not images.size:
            raise UserError(f"a backbone takes images (B, H, W, 3), not {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"inputs are floats, not {images.dtype}; normalise pixels first: "
                "(x / 255 - mean) / std"
            )
        features = self._features(self._params, images.astype(np.float32))
        return {name: np.asarray(value) for name, value in features.items()}

    def detect(self, images: Sequence[np.ndarray]) -> list[ImageDetections]:
        """The detections of each image.

        Images that are not padded to a square are padded to the largest of them all, which the
        result depends on.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.

        Raises:
            UserError: an image is larger than the square that it would be padded to, or is no
                (H, W, 3) uint8; there are none; the weights are those of a backbone.
        """
        if not self.is_detector:
            raise UserError("this is the backbone of a detector; features(images) gives its maps")
        if not len(images):
            raise UserError("there are no images")
        images = [np.asarray(image) for image in images]
        for i, image in enumerate(images):
            _check_pixels(image, f"image {i}")
        count = BATCH if backbone_of(self.spec).square else len(images)
        found: list[ImageDetections] = []
        for start in range(0, len(images), count):
            found += self._detect_batch(images[start : start + count])
        return found

    def _detect_batch(self, images: Sequence[np.ndarray]) -> list[ImageDetections]:
        batch, sizes = pad_images(self.spec, images, self._mean, self._std)
        found = jax.tree.map(np.asarray, self._detect(self._params, batch, sizes))
        result = []
        for i in range(len(images)):
            boxes = found.boxes[i]
            sides = boxes[:, 2:] - boxes[:, :2]
            own = found.valid[i] & (sides > 0).all(-1)
            fields = (boxes, found.scores[i], found.classes[i], found.masks[i])
            result.append(ImageDetections(*(field[own] for field in fields)))
        return result


def _category_ids(description: Mapping[str, Any], classes: int) -> tuple[int, ...]:
    """The recorded ids of the classes, in their order; (): none are recorded.

    Raises:
        ValueError: they are no list of an id per class.
    """
    ids = description.get("category_ids", ())
    if not isinstance(ids, list | tuple) or not all(type(n) is int for n in ids):
        raise ValueError("category_ids is no list of integers")
    if ids and not len(set(ids)) == len(ids) == classes:
        raise ValueError(f"category_ids: {len(set(ids))} different ones for {classes} classes")
    return tuple(ids)


def _test_edges(description: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shortest and longest edge to which evaluation resizes; (): it does not; None: not recorded.

    Raises:
        ValueError: they are no two lengths.
    """
    edges = description.get("test_edges")
    if edges is None:
        return None
    if not isinstance(edges, list | tuple) or not all(type(n) is int and n > 0 for n in edges):
        raise ValueError("test_edges is no list of lengths in pixels")
    if len(edges) not in (0, 2):
        raise ValueError(f"test_edges has {len(edges)} lengths, not two or none")
    return tuple(edges)


def _check_pixels(image: np.ndarray, name: str) -> None:
    """Raises UserError unless an image is what a detector takes."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"{name} is {image.dtype} {list(image.shape)}, not uint8 (H, W, 3)")


def pad_images(
    spec: Any, images: Sequence[np.ndarray], mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Normalises images, then pads them with zeros, right and below, to one size.

    Args:
        spec: of the network.
        images: (H, W, 3) uint8 each.
        mean, std: of the pixels, 0 to 255.

    Returns:
        The batch (B, ., ., 3) float32, and height and width of each image (B, 2) float32.

    Raises:
        UserError: an image is too large, see `BackboneSpec.padded`.
    """
    sizes = np.array([image.shape[:2] for image in images])
    height, width = backbone_of(spec).padded(*(int(n) for n in sizes.max(0)))
    batch = np.zeros((len(images), height, width, 3), np.float32)
    for i, image in enumerate(images):
        batch[i, : image.shape[0], : image.shape[1]] = (image.astype(np.float32) - mean) / std
    return batch, sizes.astype(np.float32)


def open_detection(path: str | Path, arch: str = "", seed: int = 0) -> DetectionModel | None:
    """Opens a detector or a backbone; None if the weights are of another network.

    Args:
        path: converted or trained weights, or with `arch` a torch or safetensors file.
        arch: an --arch file of a detector, for torch weights.
        seed: see `weights.convert_detector`.

    Raises:
        UserError: the weights cannot be read, or do not fit their description.
    """
    local = local_path(path)
    content = read_arch_file(arch)
    if content is not None:
        converted = convert_detector(local, content, arch, seed)
        tree = converted.trees[TREE]["params"]
        return DetectionModel(converted.description, tree, converted.assumed_normalisation)
    stored = find_weights(local)
    if stored is None or is_bundle(stored):  # the hub has no detectors
        return None
    _, description = load_weights(stored, [])
    if not is_detection(description):
        return None
    with description_errors(path):
        return DetectionModel(description, load_weights(stored, [TREE])[0][TREE]["params"])


def refuse_detector(path: str | Path, arch: str, instead: str) -> None:
    """Raises UserError where weights are those of a detector, or of the backbone of one.

    Args:
        path, arch: as of `open_detection`.
        instead: what to do, for the message.
    """
    found = read_arch_file(arch) is not None
    stored = find_weights(local_path(path))
    if stored is not None and not is_bundle(stored):
        found = is_detection(load_weights(stored, [])[1])
    if found:
        raise UserError(f"{path} is a detector; {instead}")


def read_images(path: str) -> list[np.ndarray] | None:
    """The images `image_0`, `image_1`, ... of an .npz file; None if it has no such array.

    Raises:
        UserError: it cannot be read, or an image is no (H, W, 3) uint8.
    """
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            named = {key: file[key] for key in file.files if key.startswith("image_")}
    except Exception as error:  # a broken file can cause any error in zipfile, zlib and numpy
        raise UserError(f"--npz_in: {path} cannot be read: {error}") from None
    if not named:
        return None
    images = []
    for i in range(len(named)):
        image = named.get(f"image_{i}")
        if image is None:
            raise UserError(f"--npz_in: {path} has {len(named)} images, but no image_{i}")
        _check_pixels(image, f"--npz_in: {path}: image_{i}")
        images.append(image)
    return images
