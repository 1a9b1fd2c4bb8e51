"""Batches from an image source, by Grain: one stream for any number of workers and processes.

Each Grain element is a complete batch, computed from (seed, step) alone. A resumed run is a slice
of the steps, and the number of threads, workers or processes cannot change what a step sees.
Axes: B global batch, L local batch (B / processes), S image size, C channels.
"""

import functools
import gc
import math
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from m2mkd_jax.data import augment
from m2mkd_jax.data.batches import REPLACED, Batch, EvalBatch, KeptBatch, TrainBatch, ViewBatch
from m2mkd_jax.data.channels import image_shape
from m2mkd_jax.data.damaged_images import DamagedImageCounter
from m2mkd_jax.data.image_source import ImageSource
from m2mkd_jax.data.indices import BatchIndices
from m2mkd_jax.data.kept import KeptBatches
from m2mkd_jax.data.workers import (
    automatic_workers,
    beginning,
    check_main_module,
    end_in_worker,
    end_with_parent,
    usable_cores,
)
from m2mkd_jax.errors import Lost, UserError

# Limit for the batches waiting in memory, per process; it bounds the number of threads.
_BUFFER_BYTES = 1 << 30
_MAX_THREADS = 8
_ENDED = re.compile(r"terminated unexpectedly with (exit code -?\d+)")  # Grain, of a worker


def batch_indices(source: ImageSource, config: Any, batch_size: int, seed: int) -> BatchIndices:
    """Which images each batch has.

    Args:
        source: the images.
        config: where they are there, repeated_augmentation and sampler ('shuffle' or 'balanced').
        batch_size: B.
        seed: 0 or larger.

    Raises:
        UserError: an epoch without a full batch, or a negative seed.
    """
    balanced = config.get("sampler", "shuffle") == "balanced"
    labels = np.asarray(source.labels) if balanced else None
    return BatchIndices(
        len(source), batch_size, seed, config.get("repeated_augmentation", 1), labels
    )


def train_batches(
    source: ImageSource,
    config: Any,
    *,
    batch_size: int,
    total_steps: int,
    start_step: int = 0,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    views: int = 0,
    kept: KeptBatches | None = None,
) -> "BatchIterator":
    """The training batches start_step, start_step + 1, ..., total_steps - 1.

    Batch t depends on (seed, t) only: starting at t gives exactly what an uninterrupted run
    would have seen from t on. A process gets its contiguous share of the global batch.

    With config.workers > 0 that many processes decode the images, with 0 threads do (better for
    images in memory); -1 chooses. Processes are spawned: they take about 2 s to start, hold about 4
    local batches each in shared memory (a container may need a larger --shm-size), and the
    program's main module must be importable (`if __name__ == "__main__"`).

    Args:
        source: the images.
        config: fields image_size, augment, repeated_augmentation, workers and damaged_share.
        batch_size: B, a multiple of process_count.
        total_steps: steps of the whole training.
        start_step: the first step of the iterator.
        seed: 0 or larger.
        process_index: this process.
        process_count: all processes.
        views: with 0, every epoch augments the images anew; else epoch e shows view e modulo
            `views` of each, augmented from the seed, the view and the image's number alone.
        kept: what is read in place of images.

    Returns:
        An iterator of {'image': uint8 (L, S, S, 3), 'label': int32 (L,)}, or of what `kept` gives.
        Its `close()` ends workers and threads; so does dropping it.

    Raises:
        UserError: a wrong batch size, seed or augmentation, or workers that would start the
            program again; raised by the iterator if more than `config.damaged_share` of the images
            cannot be decoded.
        ValueError: steps or a process out of range.
    """
    if not 0 <= start_step <= total_steps:
        raise ValueError(f"cannot start at step {start_step} of {total_steps}")
    share = local_share(batch_size, process_index, process_count)
    indices = batch_indices(source, config, batch_size, seed)
    steps = range(start_step, total_steps)
    if kept is not None:
        return iterate(source, KeptBatch(kept, indices, share, views), steps, config, share, 0)
    augmentation = augment.Augmentation.from_config(config)
    load = TrainBatch(source, indices, augmentation, seed, share, config.image_size, views)
    return iterate(source, load, steps, config, share)


def view_batches(
    source: ImageSource, config: Any, *, view: int, batch_size: int, start: int, seed: int
) -> "BatchIterator":
    """Every training image once, in order, as a view shows it (`train_batches`, views).

    The last batch is filled up with copies of the last image.

    Args:
        source: the images.
        config: as in `train_batches`.
        view: its number, from 0.
        batch_size: B.
        start: the first image.
        seed: as in `train_batches`.

    Returns:
        An iterator of {'image': uint8 (B, S, S, 3), 'label': int32 (B,)}, with `close()` as in
        `train_batches`.

    Raises:
        UserError: as in `train_batches`.
    """
    augmentation = augment.Augmentation.from_config(config)
    load = ViewBatch(source, augmentation, seed, view, config.image_size, start, batch_size)
    steps = range(math.ceil((len(source) - start) / batch_size))
    return iterate(source, load, steps, config, slice(0, batch_size))


def first_images(
    source: ImageSource,
    config: Any,
    *,
    batch_size: int,
    seed: int,
    count: int = 16,
    views: int = 0,
) -> Batch:
    """The first images of the first training batch, made in this process without workers.

    Args:
        source: the images.
        config: as in `train_batches`.
        batch_size: B.
        seed: as in `train_batches`.
        count: how many images, at most B.
        views: as in `train_batches`.

    Returns:
        'image' and 'label' as in `train_batches`.
    """
    indices = batch_indices(source, config, batch_size, seed)
    augmentation = augment.Augmentation.from_config(config)
    share = slice(0, min(count, batch_size))
    batch = TrainBatch(source, indices, augmentation, seed, share, config.image_size, views)(0)
    del batch[REPLACED]
    return batch


def eval_batches(
    source: ImageSource,
    config: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "BatchIterator":
    """Every image of a source once, in order, on any number of processes.

    Damaged images, which are not replaced here, and those that fill up the last global batch are
    black, of mask 0. Every process gets equally many batches, so that collective operations match.

    Args:
        source: the images.
        config: as in `train_batches`.
        batch_size: B, a multiple of process_count.
        process_index: this process.
        process_count: all processes.

    Returns:
        An iterator of {'image': uint8 (L, S, S, 3), 'label': int32 (L,), 'mask': float32 (L,), 1
        for images that count}, with `close()` as in `train_batches`.

    Raises:
        UserError: as in `train_batches`.
        ValueError: a process out of range.
    """
    share = local_share(batch_size, process_index, process_count)
    load = EvalBatch(source, batch_size, share, image_shape(config))
    return iterate(source, load, range(math.ceil(len(source) / batch_size)), config, share)


def local_share(batch_size: int, process_index: int, process_count: int) -> slice:
    """The slice of the global batch that a process loads."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"no process {process_index} of {process_count}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a batch of {batch_size} cannot be shared by {process_count} processes:"
            f" use a multiple of {process_count}"
        )
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)


def iterate(
    source: Any,
    load: Callable[[int], Batch],
    steps: range,
    config: Any,
    share: slice,
    workers: int | None = None,
) -> "BatchIterator":
    """The batches of `load` for `steps`, from threads or worker processes.

    Args:
        source: the images or scenes.
        load: number of a batch -> the batch, this process's share of it.
        steps: numbers of the batches.
        config: fields image_size and workers; of images also damaged_share.
        share: which rows of the global batch are this process's.
        workers: None: the config's.
    """
    end_in_worker()
    if config.workers < -1:
        raise UserError(
            f"data.workers is {config.workers}: use -1 (as fits the machine), 0 (threads) or more"
        )
    damaged = DamagedImageCounter(source, getattr(config, "damaged_share", 0.0))
    if not len(steps):
        return BatchIterator(iter(()), damaged)
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(load)
    # Masks have a bit for every pixel of an object.
    pixel_bytes = 3 + getattr(config, "objects", 0) // 8
    batch_bytes = (share.stop - share.start) * config.image_size**2 * pixel_bytes
    workers = config.workers if workers is None else workers
    if workers < 0:
        workers = 0 if source.in_memory else automatic_workers(batch_bytes)
    if workers == 0:
        fitting = _BUFFER_BYTES // batch_bytes - 1
        threads = max(1, min(usable_cores(), _MAX_THREADS, fitting))
        return BatchIterator(
            iter(dataset.to_iter_dataset(grain.ReadOptions(threads, threads + 1))), damaged
        )
    check_main_module()
    # mp_prefetch reads absl flags, which are unparsed in a program without absl's app.run.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # On a busy machine a worker may end before its last batch is fetched. Python's resource tracker
    # then frees the shared memory and would print a page of warnings.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    dataset = dataset.to_iter_dataset(grain.ReadOptions(0, 0))
    return BatchIterator(
        iter(
            dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=min(workers, len(steps)), per_worker_buffer_size=1
                ),
                worker_init_fn=functools.partial(end_with_parent, os.getpid()),
            )
        ),
        damaged,
        from_processes=True,
    )


class BatchIterator:
    """Batches from threads or worker processes; counts their damaged images.

    `close()` frees threads, processes and shared memory; it also runs when the iterator ends, is
    dropped, or the interpreter exits. Grain's own destructors run too late at exit, when modules
    are already unloaded, and print warnings.
    """

    def __init__(
        self, iterator: Iterator[Batch], damaged: DamagedImageCounter, from_processes: bool = False
    ) -> None:
        self._open = [iterator]
        self._damaged, self._begun = damaged, not from_processes
        self.close = weakref.finalize(self, _shut_down, self._open, from_processes)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        try:
            batch = self._next()
        except StopIteration:
            self.close()
            raise StopIteration from None
        except RuntimeError as error:
            ended = _ENDED.search(str(error))
            if ended is None:
                raise
            self.close()
            raise Lost(
                f"a worker process that makes batches was ended ({ended[1]}); if memory ran out, "
                "lower config.data.workers"
            ) from None
        # Copied out of shared memory, which is scarce and must not be used after the workers end.
        batch = {
            name: value if type(value) is np.ndarray else np.array(value, subok=False)
            for name, value in batch.items()
        }
        self._damaged.note(batch.pop(REPLACED))
        return batch

    def _next(self) -> Batch:
        """Grain's next batch; its threads and processes begin with the first one."""
        if self._begun:
            return next(self._open[0])
        self._begun = True
        with beginning():
            return next(self._open[0])

    def note_others(self, union: Callable[[Collection[int]], set[int]]) -> None:
        """Counts the damaged images of all processes, as `DamagedImageCounter.note_others`."""
        self._damaged.note_others(union)


def _shut_down(open_iterators: list[Any], from_processes: bool) -> None:
    iterator = open_iterators.pop()
    if hasattr(iterator, "close"):
        iterator.close()
    if from_processes:
        # Grain holds the last batches, which lie in shared memory, in a reference cycle of
        # tracebacks. Beside large compiled programs this takes seconds.
        gc.collect()
