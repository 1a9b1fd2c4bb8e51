"""Batches of annotated scenes of one size, for training and evaluation.

Axes: B images, H height, W width, G objects of an image (padded).

Source: docs/detection.md#batching, docs/detection.md#data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2mkd_jax.data.annotations import Scene, bitmap, flipped, large_scale_jitter, plain_resize
from m2mkd_jax.data.batches import REPLACED, Batch
from m2mkd_jax.data.damaged_images import first_sound
from m2mkd_jax.data.decode import DamagedImage
from m2mkd_jax.data.indices import BatchIndices, epoch_permutation, step_generator
from m2mkd_jax.data.pipeline import BatchIterator, iterate, local_share
from m2mkd_jax.data.scenes import SceneSource

DRAWS = 3  # random numbers of an image: flip, scale or edge, crop


def collate(scenes: Sequence[Scene], size: tuple[int, int], limit: int) -> Batch:
    """A batch of one size: images padded with zeros after normalisation, objects padded to G.

    Args:
        scenes: annotated images, none larger than `size`.
        size: height and width of the batch, W a multiple of 8.
        limit: G; of an image with more objects the largest boxes are kept.

    Returns:
        'image' (B, H, W, 3) uint8, 'size' (B, 2) float32, 'boxes' (B, G, 4) float32, 'classes'
        (B, G) int32, 'valid' (B, G) bool and 'masks' (B, G, H, W / 8) uint8, eight pixels a byte.
    """
    count, (height, width) = len(scenes), size
    batch: Batch = {
        "image": np.zeros((count, height, width, 3), np.uint8),
        "size": np.array([scene.size for scene in scenes], np.float32),
        "boxes": np.zeros((count, limit, 4), np.float32),
        "classes": np.zeros((count, limit), np.int32),
        "valid": np.zeros((count, limit), bool),
        "masks": np.zeros((count, limit, height, width // 8), np.uint8),
    }
    for i, scene in enumerate(scenes):
        h, w = scene.size
        batch["image"][i, :h, :w] = scene.image
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        largest = np.argsort(-sides.prod(1), kind="stable")[:limit]
        for j, number in enumerate(sorted(largest)):
            batch["boxes"][i, j] = scene.boxes[number]
            batch["classes"][i, j] = scene.classes[number]
            batch["valid"][i, j] = True
            whole = np.zeros((height, width), bool)
            whole[:h, :w] = bitmap(scene.masks[number], h, w)
            batch["masks"][i, j] = np.packbits(whole, axis=-1)
    return batch


def training_scene(scene: Scene, data: Any, draws: np.ndarray) -> Scene:
    """A scene as training shows it.

    Args:
        scene: before.
        data: config.detection.data.
        draws: DRAWS numbers from (0, 1).
    """
    augment, side = data.augment, data.image_size
    flip = float(draws[0]) if augment.flip else 1.0
    if augment.resize == "jitter":
        low, high = augment.scale
        scale = low + (high - low) * float(draws[1])
        return large_scale_jitter(scene, side, flip, scale, float(draws[2]))
    if augment.resize == "plain":
        edge = augment.edges[int(draws[1] * len(augment.edges))]
        return plain_resize(scene, edge, min(augment.longest, side), flip)
    return flipped(scene) if flip < 0.5 else scene


def evaluation_scene(scene: Scene, data: Any) -> Scene:
    """A scene as evaluation shows it: resized, not flipped."""
    edges = evaluation_edges(data)
    return plain_resize(scene, *edges) if edges else scene


def evaluation_edges(data: Any) -> tuple[int, ...]:
    """Shortest and longest edge to which evaluation resizes scenes; (): it leaves them as is."""
    augment, side = data.augment, data.image_size
    if augment.resize == "jitter":
        return side, side
    return (augment.test_edge, min(augment.longest, side)) if augment.resize == "plain" else ()


class RepeatedIndices(BatchIndices):
    """Batches in which images of rare classes come more often; epochs stay as long as they were.

    Image i is drawn in proportion to its repeat factor, the largest of its classes' factors
    max(1, sqrt(t / f)), f being the share of the images that have the class.

    Source: Gupta et al. 2019 (arXiv 1908.03195), section 3.4; docs/detection.md#data.

    Args:
        source: the scenes.
        batch_size: B, of the global batch.
        seed: 0 or larger.
        threshold: t.
    """

    def __init__(self, source: SceneSource, batch_size: int, seed: int, threshold: float):
        super().__init__(len(source), batch_size, seed)
        self._factors = repeat_factors(
            [source.classes_of(i) for i in range(len(source))], len(source.class_names), threshold
        )

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, place = self.epoch(step), int(step) % self.steps_per_epoch
        # Systematic sampling: an image comes floor or ceil of its share times.
        shares = np.cumsum(self._factors) / self._factors.sum() * self.length
        chosen = np.searchsorted(shares, np.arange(self.length) + 0.5, side="right")
        order = epoch_permutation(self.length, self._seed, epoch)
        row = slice(place * self.batch_size, (place + 1) * self.batch_size)
        return np.minimum(chosen, self.length - 1)[order][row]


def repeat_factors(classes: Sequence[np.ndarray], count: int, threshold: float) -> np.ndarray:
    """How often each image is drawn, relative to one of frequent classes.

    Args:
        classes: of the objects of each image.
        count: of the classes.
        threshold: share of the images below which a class is rare.

    Returns:
        float64 (N,), 1 or more.

    Source: docs/detection.md#data.
    """
    present = np.zeros((len(classes), count), bool)
    for row, own in zip(present, classes, strict=True):
        row[own] = True
    shares = np.maximum(present.mean(0), 1e-12)
    of_class = np.maximum(1.0, np.sqrt(threshold / shares))
    return np.maximum(1.0, np.where(present, of_class, 1.0).max(1))


class TrainScenes:
    """Step -> training batch. A class, because it is pickled to Grain's workers."""

    def __init__(
        self, source: SceneSource, indices: BatchIndices, data: Any, seed: int, share: slice
    ):
        self._source, self._indices, self._data = source, indices, data
        self._seed, self._share = seed, share

    def __call__(self, step: int) -> Batch:
        chosen = self._indices[step][self._share]
        # Numbers for the global batch, of which this process uses its share.
        generator = step_generator(self._seed, step)
        draws = generator.random((self._indices.batch_size, DRAWS))[self._share]
        scenes, replaced = [], np.full((len(chosen), 2), -1, np.int64)
        for row, (index, own) in enumerate(zip(chosen, draws, strict=True)):
            whole, found = first_sound(self._source, int(index), self._source.read)
            scenes.append(training_scene(whole, self._data, own))
            if found != index:
                replaced[row] = index, found
        side = self._data.image_size
        batch = collate(scenes, (side, side), self._data.objects)
        return batch | {REPLACED: replaced}


class EvalScenes:
    """Batch number -> evaluation batch."""

    def __init__(self, source: SceneSource, data: Any, batch_size: int, share: slice):
        self._source, self._data = source, data
        self._batch_size, self._share = batch_size, share

    def __call__(self, number: int) -> Batch:
        side, local = self._data.image_size, self._share.stop - self._share.start
        start = number * self._batch_size + self._share.start
        batch: Batch = {
            "image": np.zeros((local, side, side, 3), np.uint8),
            "size": np.ones((local, 2), np.float32),
            "original": np.ones((local, 2), np.float32),
            REPLACED: np.full((local, 2), -1, np.int64),
        }
        for row, index in enumerate(range(start, min(start + local, len(self._source)))):
            try:
                whole = self._source.read(index)
            except DamagedImage:
                batch["original"][row] = 0
                batch[REPLACED][row, 0] = index
                continue
            scene = evaluation_scene(whole, self._data)
            h, w = scene.size
            batch["original"][row] = whole.size
            batch["image"][row, :h, :w] = scene.image
            batch["size"][row] = h, w
        return batch


def scene_indices(source: SceneSource, data: Any, batch_size: int, seed: int) -> BatchIndices:
    """Which scenes each training batch has."""
    if data.repeat_threshold:
        return RepeatedIndices(source, batch_size, seed, data.repeat_threshold)
    return BatchIndices(len(source), batch_size, seed)


def train_scenes(
    source: SceneSource,
    data: Any,
    *,
    batch_size: int,
    total_steps: int,
    start_step: int = 0,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """The training batches start_step, ..., total_steps - 1; batch t depends on (seed, t) only.

    Args:
        source: the scenes.
        data: config.detection.data.
        batch_size: B, a multiple of process_count.
        total_steps: steps of the whole training.
        start_step: the first step of the iterator.
        seed: 0 or larger.
        process_index, process_count: this process, and how many there are.

    Returns:
        An iterator of batches of `collate`, with `close()` as of `pipeline.train_batches`.

    Raises:
        UserError: a wrong batch size; raised by the iterator if more than `data.damaged_share` of
            the images cannot be used. Another stands in for each.
    """
    share = local_share(batch_size, process_index, process_count)
    indices = scene_indices(source, data, batch_size, seed)
    load = TrainScenes(source, indices, data, seed, share)
    return iterate(source, load, range(start_step, total_steps), data, share)


def eval_scenes(
    source: SceneSource,
    data: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Every scene once, in order; the last batch is filled up with black images of one pixel.

    Such an image is in the place of a damaged one too, and its `original` is 0.

    Args:
        source, data, process_index, process_count: as for `train_scenes`.
        batch_size: B, a multiple of process_count.

    Returns:
        An iterator of {'image': uint8 (L, S, S, 3), 'size' and, before resizing, 'original':
        float32 (L, 2)}.

    Raises:
        UserError: as for `train_scenes`.
    """
    share = local_share(batch_size, process_index, process_count)
    load = EvalScenes(source, data, batch_size, share)
    return iterate(source, load, range(math.ceil(len(source) / batch_size)), data, share)
