"""Batches from a source, by Grain: the same stream for any number of workers and processes.

One Grain element is one whole batch, made from (seed, step) alone. So a resumed run is a slice
of the steps, and neither threads, workers nor processes can change what a step sees.
Axes: B global batch, L local batch (B / processes), S image size, C channels (3).
"""

import gc
import math
import os
import weakref

import grain
import numpy as np
from absl import flags

from m2mkd_jax.data import augment
from m2mkd_jax.data.arrays import ArraySource
from m2mkd_jax.data.encoded import Damage
from m2mkd_jax.data.indices import BatchIndices, step_generator
from m2mkd_jax.data.workers import automatic_workers, usable_cores
from m2mkd_jax.errors import UserError

# Batches waiting in memory, per process: more threads are not started than fit.
_BUFFER_BYTES = 1 << 30
_MAX_THREADS = 8
_REPLACED = "replaced"  # a batch's damaged images; the program does not get to see it


def train_batches(
    source,
    config,
    *,
    batch_size,
    total_steps,
    start_step=0,
    seed,
    process_index=0,
    process_count=1,
):
    """The training batches start_step, start_step + 1, ..., total_steps - 1.

    Batch t depends on (seed, t) only: starting at t gives exactly what an uninterrupted run
    would have seen from t on. A process gets its contiguous share of the global batch.

    Args:
      source: see sources.py; config: fields image_size, augment, repeated_augmentation, workers,
        damaged_share.
      batch_size: the global B, a multiple of process_count.
      config.workers > 0 decodes in that many processes; 0 in threads, which is the better choice
        for images in memory; -1 chooses. Processes take about 2 s to start and hold about 4 local
        batches each in shared memory (a container may need a larger --shm-size), and the program's
        main module must be importable (`if __name__ == "__main__"`), as they are spawned.
    Returns: an iterator of {'image': uint8 (L, S, S, 3), 'label': int32 (L,)}. Its `close()`
      ends workers and threads; dropping it does the same.
    Raises: UserError for a wrong batch size, seed or augmentation, and from the iterator when more
      than `config.damaged_share` of the images cannot be decoded; ValueError for steps or a
      process out of range.
    """
    if not 0 <= start_step <= total_steps:
        raise ValueError(f"cannot start at step {start_step} of {total_steps}")
    share = _share(batch_size, process_index, process_count)
    indices = BatchIndices(len(source), batch_size, seed, config.repeated_augmentation)
    augmentation = augment.Augmentation.from_config(config)
    load = _TrainBatch(source, indices, augmentation, seed, share, config.image_size)
    return _iterate(source, load, range(start_step, total_steps), config, share)


def first_images(source, config, *, batch_size, seed, count=16):
    """The first images of the first training batch: 'image' and 'label' as in `train_batches`.

    Made in this process, without workers. count: how many, at most batch_size.
    """
    indices = BatchIndices(len(source), batch_size, seed, config.repeated_augmentation)
    augmentation = augment.Augmentation.from_config(config)
    share = slice(0, min(count, batch_size))
    batch = _TrainBatch(source, indices, augmentation, seed, share, config.image_size)(0)
    del batch[_REPLACED]
    return batch


def eval_batches(source, config, *, batch_size, process_index=0, process_count=1):
    """Every image of a source once, in order, on any number of processes.

    The last global batch is filled with black images of mask 0; every process gets the same
    number of batches, so that collective operations match.

    Args: as `train_batches`.
    Returns: an iterator of {'image': uint8 (L, S, S, 3), 'label': int32 (L,), 'mask': float32
      (L,), 1 for an image that counts}.
    Raises: as `train_batches`.
    """
    share = _share(batch_size, process_index, process_count)
    load = _EvalBatch(source, batch_size, share, config.image_size)
    return _iterate(source, load, range(math.ceil(len(source) / batch_size)), config, share)


class _TrainBatch:
    """Step -> batch. A class and not a closure, because it is pickled to Grain's workers."""

    def __init__(self, source, indices, augmentation, seed, share, size):
        self._source, self._indices, self._augmentation = source, indices, augmentation
        self._seed, self._share, self._size = seed, share, size

    def __call__(self, step):
        # Numbers for the whole global batch, of which this process uses its share: the union of
        # the processes' batches is then the batch of a single process.
        draws = augment.Draws.of(
            step_generator(self._seed, step), self._indices.batch_size, self._augmentation.layers
        )
        chosen = self._indices[step][self._share]
        reader = self._source.reader()
        image = augment.training_images(
            reader, chosen, self._augmentation, draws[self._share], self._size
        )
        label = reader.labels_of(chosen)
        return {"image": image, "label": label, _REPLACED: _pairs(reader, len(chosen))}


class _EvalBatch:
    """Number of the batch -> batch."""

    def __init__(self, source, batch_size, share, size):
        self._source, self._batch_size = source, batch_size
        self._share, self._size = share, size

    def __call__(self, number):
        start = number * self._batch_size
        chosen = np.arange(start + self._share.start, start + self._share.stop)
        chosen = chosen[chosen < len(self._source)]
        local = self._share.stop - self._share.start
        batch = {
            "image": np.zeros((local, self._size, self._size, 3), np.uint8),
            "label": np.zeros(local, np.int32),
            "mask": np.zeros(local, np.float32),
            _REPLACED: np.full((local, 2), -1, np.int64),
        }
        if len(chosen):
            count, reader = len(chosen), self._source.reader()
            batch["image"][:count] = reader.evaluation_images(chosen, self._size)
            batch["label"][:count] = reader.labels_of(chosen)
            batch["mask"][:count] = 1
            batch[_REPLACED][:] = _pairs(reader, local)
        return batch


def _pairs(reader, rows):
    """Damaged images and what was read in their place, for the main process to count: (rows, 2)."""
    pairs = np.full((rows, 2), -1, np.int64)
    if reader.replaced:
        pairs[: len(reader.replaced)] = list(reader.replaced.items())
    return pairs


def _share(batch_size, process_index, process_count):
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


def _iterate(source, load, steps, config, share):
    if config.workers < -1:
        raise UserError(
            f"data.workers is {config.workers}: use -1 (as fits the machine), 0 (threads) or more"
        )
    damage = Damage(source, config.damaged_share)
    if not len(steps):
        return _Batches(iter(()), damage)
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(load)
    batch_bytes = (share.stop - share.start) * config.image_size**2 * 3
    workers = config.workers
    if workers < 0:
        workers = 0 if isinstance(source, ArraySource) else automatic_workers(batch_bytes)
    if workers == 0:
        fitting = _BUFFER_BYTES // batch_bytes - 1
        threads = max(1, min(usable_cores(), _MAX_THREADS, fitting))
        return _Batches(
            iter(dataset.to_iter_dataset(grain.ReadOptions(threads, threads + 1))), damage
        )
    # Grain reads absl flags in mp_prefetch; a caller without absl's app.run has none parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # On a busy machine a worker may end before its last batch is fetched. Python's tracker frees
    # that shared memory; without its page of warnings, where one line is promised.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    dataset = dataset.to_iter_dataset(grain.ReadOptions(0, 0))
    return _Batches(
        iter(
            dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=min(workers, len(steps)), per_worker_buffer_size=1
                )
            )
        ),
        damage,
    )


class _Batches:
    """Batches of threads or worker processes, without what they report about damaged images.

    It gives back threads, processes and shared memory whenever it ends. Grain leaves that to
    destructors, which at the interpreter's exit find half of their modules gone and print a page
    of warnings; this also runs at exit, before that.
    """

    def __init__(self, iterator, damage):
        self._open = [iterator]
        self._damage = damage
        self.close = weakref.finalize(self, _shut_down, self._open)

    def __iter__(self):
        return self

    def __next__(self):
        if not self._open:
            raise StopIteration
        try:
            batch = next(self._open[0])
        except StopIteration:
            self.close()
            raise StopIteration from None
        # Out of shared memory at once: it is scarce, and its arrays must not outlive the workers.
        batch = {
            name: value if type(value) is np.ndarray else np.array(value, subok=False)
            for name, value in batch.items()
        }
        self._damage.note(batch.pop(_REPLACED))
        return batch


def _shut_down(open_iterators):
    iterator = open_iterators.pop()
    if hasattr(iterator, "close"):
        iterator.close()
    # Grain's exhausted iterators hold their last batch in a circle of tracebacks.
    gc.collect()
