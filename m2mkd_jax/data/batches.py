"""What one batch holds: of training, of a view, of what is kept, of an evaluation.

Each is a class, because it is pickled to Grain's workers (pipeline.py).
Axes: B global batch, L local batch (B / processes), S image size, C channels.
"""

import numpy as np

from m2mkd_jax.data import augment
from m2mkd_jax.data.image_source import ImageReader, ImageSource
from m2mkd_jax.data.indices import BatchIndices, step_generator, view_generator
from m2mkd_jax.data.kept import KeptBatches

REPLACED = "replaced"  # a batch's damaged images (damaged_images.py), removed for the caller
Batch = dict[str, np.ndarray]


class TrainBatch:
    """Step -> training batch."""

    def __init__(
        self,
        source: ImageSource,
        indices: BatchIndices,
        augmentation: augment.Augmentation,
        seed: int,
        share: slice,
        size: int,
        views: int,
    ) -> None:
        self._source, self._indices, self._augmentation = source, indices, augmentation
        self._seed, self._share, self._size, self._views = seed, share, size, views

    def __call__(self, step: int) -> Batch:
        chosen = self._indices[step][self._share]
        if self._views:
            view = self._indices.epoch(step) % self._views
            draws = _view_draws(chosen, self._seed, view, self._augmentation)
        else:
            # Numbers for the global batch, of which this process uses its share: together the
            # processes have the same batch as a single process.
            generator, layers = step_generator(self._seed, step), self._augmentation.layers
            draws = augment.Draws.of(generator, self._indices.batch_size, layers)[self._share]
        return _augmented(self._source, chosen, self._augmentation, draws, self._size)


class ViewBatch:
    """Batch number -> images of a view in their order."""

    def __init__(
        self,
        source: ImageSource,
        augmentation: augment.Augmentation,
        seed: int,
        view: int,
        size: int,
        start: int,
        batch_size: int,
    ) -> None:
        self._source, self._augmentation, self._seed = source, augmentation, seed
        self._view, self._size, self._start, self._batch_size = view, size, start, batch_size

    def __call__(self, number: int) -> Batch:
        first = self._start + number * self._batch_size
        chosen = np.minimum(np.arange(first, first + self._batch_size), len(self._source) - 1)
        draws = _view_draws(chosen, self._seed, self._view, self._augmentation)
        return _augmented(self._source, chosen, self._augmentation, draws, self._size)


class KeptBatch:
    """Step -> what is kept of the images of a training batch."""

    def __init__(self, kept: KeptBatches, indices: BatchIndices, share: slice, views: int) -> None:
        self._kept, self._indices, self._share, self._views = kept, indices, share, views

    def __call__(self, step: int) -> Batch:
        chosen = self._indices[step][self._share]
        rows = self._kept.rows(self._indices.epoch(step) % self._views, chosen)
        return {**rows, REPLACED: np.full((len(chosen), 2), -1, np.int64)}


def _view_draws(
    chosen: np.ndarray, seed: int, view: int, augmentation: augment.Augmentation
) -> augment.Draws:
    """The random numbers of a view for images (B,)."""
    generators = [view_generator(seed, view, int(index)) for index in chosen]
    return augment.Draws.of_each(generators, augmentation.layers)


def _augmented(
    source: ImageSource,
    chosen: np.ndarray,
    augmentation: augment.Augmentation,
    draws: augment.Draws,
    size: int,
) -> Batch:
    """A training batch of the images `chosen` (B,)."""
    reader = source.reader()
    image = augment.training_images(reader, chosen, augmentation, draws, size)
    label = reader.labels_of(chosen)
    return {"image": image, "label": label, REPLACED: _pairs(reader, len(chosen))}


class EvalBatch:
    """Batch number -> evaluation batch."""

    def __init__(
        self, source: ImageSource, batch_size: int, share: slice, shape: tuple[int, int, int]
    ) -> None:
        """Makes batches of images of `shape`, (S, S, C)."""
        self._source, self._batch_size = source, batch_size
        self._share, self._shape = share, shape

    def __call__(self, number: int) -> Batch:
        start = number * self._batch_size
        chosen = np.arange(start + self._share.start, start + self._share.stop)
        chosen = chosen[chosen < len(self._source)]
        local = self._share.stop - self._share.start
        batch = {
            "image": np.zeros((local, *self._shape), np.uint8),
            "label": np.zeros(local, np.int32),
            "mask": np.zeros(local, np.float32),
            REPLACED: np.full((local, 2), -1, np.int64),
        }
        if len(chosen):
            count, reader = len(chosen), self._source.reader()
            images = reader.evaluation_images(chosen, self._shape[0])
            sound = ~np.isin(chosen, list(reader.replaced))
            batch["image"][:count] = images * sound[:, None, None, None]
            batch["label"][:count] = reader.labels_of(chosen)
            batch["mask"][:count] = sound
            batch[REPLACED][:, 0] = _pairs(reader, local)[:, 0]  # they count for nothing
        return batch


def _pairs(reader: ImageReader, rows: int) -> np.ndarray:
    """(damaged image, replacement) pairs for the main process to count: (rows, 2), -1 pads."""
    pairs = np.full((rows, 2), -1, np.int64)
    if reader.replaced:
        pairs[: len(reader.replaced)] = list(reader.replaced.items())
    return pairs
