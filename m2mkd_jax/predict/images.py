"""Image files and folders, decoded by threads into batches of one size.

Axes: B images of a batch, S side of the network's images.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from m2mkd_jax.data.augment import evaluation_image
from m2mkd_jax.data.decode import SUFFIXES, DamagedImage, Form, decode
from m2mkd_jax.data.formats.folder import files_below, say_left_out
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.inference import Model

AHEAD = 2  # batches that are decoded while one is computed


def image_files(given: Sequence[str]) -> list[tuple[str, bool]]:
    """The image files that the arguments mean, in order.

    Args:
        given: files, and folders that are searched with all folders in them. What is no image by
            its name there is named on stderr.

    Returns:
        (path, whether it was found in a folder) of each.

    Raises:
        UserError: a path does not exist, or a folder holds no images.
    """
    found: list[tuple[str, bool]] = []
    for path in given:
        if not Path(path).is_dir():
            if not Path(path).exists():
                raise UserError(f"{path} cannot be read: No such file or directory")
            found.append((path, False))
            continue
        inside, others = files_below(path)
        if not inside:
            raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        say_left_out(Path(path), others)
        found += [(str(p), True) for p in sorted(Path(path, name) for name in inside)]
    return found


def read_image(path: str, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image, resized and cropped as in evaluation.

    Args:
        path: of the image file.
        model: whose image size S, channels C, orientation, mean and standard deviation are used.

    Returns:
        Its pixels (S, S, C), uint8, and the same normalised, float32.

    Raises:
        DamagedImage: it cannot be read or decoded.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DamagedImage(f"{path} cannot be read: {error.strerror}") from None
    form = Form(model.channels, model.oriented)
    pixels = evaluation_image(decode(content, path, form=form), model.image_size)
    scaled = np.asarray(pixels, np.float32) / 255
    mean, std = np.asarray(model.mean, np.float32), np.asarray(model.std, np.float32)
    return pixels, (scaled - mean) / std


class Batch:
    """Images that the network takes at once.

    Attributes:
        paths: of the images.
        pixels: (B, S, S, C) uint8.
        inputs: (B, S, S, C) float32, normalised.
    """

    def __init__(self, images: Sequence[tuple[str, np.ndarray, np.ndarray]]):
        self.paths = [path for path, _, _ in images]
        self.pixels = np.stack([pixels for _, pixels, _ in images])
        self.inputs = np.stack([normalised for _, _, normalised in images])

    def padded(self, size: int) -> np.ndarray:
        """The inputs, the last one repeated up to `size`, so that one program serves all."""
        missing = size - len(self.inputs)
        if missing <= 0:
            return self.inputs
        return np.concatenate([self.inputs, np.repeat(self.inputs[-1:], missing, axis=0)])


def batches(
    files: Sequence[tuple[str, bool]], model: Model, size: int, workers: int
) -> Iterator[Batch]:
    """Decodes files in threads and gives them in batches, in their order.

    A damaged image that was found in a folder is named on stderr and left out.

    Args:
        files: see `image_files`.
        model: that takes them.
        size: B, of all but the last batch.
        workers: threads; 0: as many as cores.

    Raises:
        UserError: a file that was named cannot be decoded, or none at all.
    """
    threads = workers or os.cpu_count() or 1
    whole: list[tuple[str, np.ndarray, np.ndarray]] = []
    count = 0
    with ThreadPoolExecutor(threads) as pool:
        for path, found in _in_order(pool, files, model, AHEAD * size):
            if isinstance(found, DamagedImage):
                print(printable(f"left out: {found}"), file=sys.stderr)
                continue
            whole.append((path, *found))
            count += 1
            if len(whole) == size:
                yield Batch(whole)
                whole = []
    if whole:
        yield Batch(whole)
    if not count:
        raise UserError(
            f"none of the {len(files)} images can be decoded; {files[0][0]} is the first"
        )


_Read = tuple[np.ndarray, np.ndarray]


def _in_order(
    pool: ThreadPoolExecutor, files: Iterable[tuple[str, bool]], model: Model, ahead: int
) -> Iterator[tuple[str, _Read | DamagedImage]]:
    """(path, what was read) of every file; at most `ahead` are read in advance."""

    def read(path: str, lenient: bool) -> _Read | DamagedImage:
        try:
            return read_image(path, model)
        except DamagedImage as error:
            if not lenient:
                raise
            return error

    rest = iter(files)
    waiting: deque[tuple[str, Future[_Read | DamagedImage]]] = deque()
    try:
        while True:
            for path, lenient in itertools.islice(rest, ahead - len(waiting)):
                waiting.append((path, pool.submit(read, path, lenient)))
            if not waiting:
                return
            path, future = waiting.popleft()
            yield path, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
