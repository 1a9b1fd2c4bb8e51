"""What happens to images that cannot be decoded: in training they are replaced, in evaluation left
out; they are counted and reported.

Axes: B batch, H height, W width, S size in pixels, K damaged images of a batch.
"""

import sys
from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

import numpy as np

from m2mkd_jax.data import augment
from m2mkd_jax.data.decode import DamagedImage
from m2mkd_jax.data.image_source import ImageSource, Shrink
from m2mkd_jax.errors import UserError

T = TypeVar("T")


class Named(Protocol):
    """N things that are read by number."""

    def __len__(self) -> int:
        """N."""

    def name(self, index: int) -> str:
        """What messages call one."""


class Readable(Named, Protocol):
    """N things, each of which `read` gives."""

    def read(self, index: int) -> object:
        """One of them. Raises DamagedImage where it cannot be decoded."""


def first_sound(source: Named, index: int, read: Callable[[int], T]) -> tuple[T, int]:
    """What is read at `index`, or at the next number where it can be.

    The replacement depends on the images alone, so every run and every worker picks the same one.

    Args:
        source: what is read.
        index: where.
        read: number -> what is there. Raises DamagedImage.

    Returns:
        What was read, and its number.

    Raises:
        UserError: nothing of the source can be decoded.
    """
    count = len(source)
    for offset in range(count):
        candidate = (index + offset) % count
        try:
            return read(candidate), candidate
        except DamagedImage:
            continue
    raise UserError(f"none of the {count} images can be decoded: {source.name(index)}...")


class SubstitutingReader:
    """An `ImageReader` that reads the next decodable image in place of a damaged one.

    Attributes:
        replaced: index of a damaged image -> index of the image read in its place.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.replaced: dict[int, int] = {}

    def read(self, index: int, shrink: Shrink | None = None) -> np.ndarray:
        """One image: uint8 (H, W, C).

        Raises:
            UserError: no image of the source can be decoded.
        """
        image, found = first_sound(
            self._source, index, lambda place: self._source.read(place, shrink)
        )
        if found != index:
            self.replaced[int(index)] = int(found)
        return image

    def evaluation_images(self, indices: np.ndarray, size: int) -> np.ndarray:
        """The images at `indices` int (B,), resized and centre-cropped: uint8 (B, S, S, C)."""
        return np.stack([augment.evaluation_image(self.read(i), size) for i in indices])

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of the images read for `indices` (B,), replacements included: int32 (B,)."""
        return self._source.labels[np.array([self.replaced.get(int(i), i) for i in indices])]


class DamagedImageCounter:
    """Counts the distinct damaged images of a run, names each once, and limits their number."""

    def __init__(self, source: Readable, share: float) -> None:
        """Starts with no damaged image seen.

        Args:
            source: where the images come from.
            share: the largest share of its images that may be damaged.
        """
        self._source = source
        self._limit = int(share * len(source) + 1e-6)  # 29% of 100 are 28.999... in floats
        self._share = share
        self._seen: set[int] = set()

    def note(self, replaced: np.ndarray) -> None:
        """Counts the damaged images of a batch and warns of new ones on stderr.

        Args:
            replaced: int (K, 2), pairs (image, replacement), -1 where it is left out; rows of -1
                pad.

        Raises:
            UserError: more images are damaged than the limit allows.
        """
        for index, instead in replaced:
            if index < 0 or index in self._seen:
                continue
            self._seen.add(int(index))
            reason = self._reason(int(index))
            self._check(reason)
            what = "it is not counted"
            if instead >= 0:
                what = f"{self._source.name(int(instead))} stands in for it"
            print(
                f"warning: {reason}; {what} ({len(self._seen)} of at most {self._limit})",
                file=sys.stderr,
            )

    def note_others(self, union: Callable[[Collection[int]], set[int]]) -> None:
        """Counts what other processes have seen, each in its share of the batches.

        Args:
            union: of the numbers that each process gives; all make this call.

        Raises:
            UserError: together they are more than the limit allows.
        """
        others = union(self._seen) - self._seen
        if others:
            self._seen |= others
            self._check(self._reason(max(self._seen)))

    def _check(self, reason: str) -> None:
        """Raises UserError where more images are damaged than the limit allows."""
        if len(self._seen) > self._limit:
            raise UserError(
                f"{len(self._seen)} damaged images are more than {self._share:.2%} of"
                f" {len(self._source)} (data.damaged_share); the last: {reason}"
            )

    def _reason(self, index: int) -> str:
        try:
            self._source.read(index)
        except DamagedImage as error:
            return str(error)
        return f"the image {self._source.name(index)} could not be read for a while"
