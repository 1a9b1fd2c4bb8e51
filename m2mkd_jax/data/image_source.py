"""Images by number, with labels: what every data set looks like to the rest of the package.

Axes: N images, B batch, H height, W width, S size in pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# (H, W) of a file -> how many times smaller the caller can use it.
Shrink = Callable[[int, int], float]


class Labels(Protocol):
    """The labels of N images: an int32 array, or an object that reads them on request."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, indices: Any, /) -> Any:
        """The labels at `indices` (B,): int32 (B,)."""

    def __array__(self) -> np.ndarray:
        """All labels: int32 (N,)."""


class ImageReader(Protocol):
    """Reads the images of one batch."""

    @property
    def replaced(self) -> Mapping[int, int]:
        """Damaged images met so far: index -> index of the image read in its place."""

    def read(self, index: int, shrink: Shrink | None = None) -> np.ndarray:
        """One image: uint8 (H, W, C).

        Args:
            index: number of the image.
            shrink: allows a JPEG file to be decoded at a reduced size, see decode.py.

        Raises:
            UserError: no image of the source can be decoded.
        """

    def evaluation_images(self, indices: np.ndarray, size: int) -> np.ndarray:
        """The images at `indices` int (B,), resized and centre-cropped: uint8 (B, S, S, C)."""

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of the images that `read` gives for `indices` (B,): int32 (B,)."""


class ImageSource(Protocol):
    """N labelled images, by number. Picklable: it is sent to Grain's worker processes."""

    @property
    def labels(self) -> Labels:
        """The labels: (N,), numbers of `class_names`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, in the order of the labels."""

    @property
    def in_memory(self) -> bool:
        """Whether the images are already decoded, so that worker processes would not pay off."""

    def __len__(self) -> int:
        """N."""

    def name(self, index: int) -> str:
        """The image's name in messages: its path, or its place in an archive."""

    def read(self, index: int, shrink: Shrink | None = None) -> np.ndarray:
        """One image, decoded on each call: uint8 (H, W, C).

        Args:
            index: number of the image.
            shrink: allows a JPEG file to be decoded at a reduced size, see decode.py.

        Raises:
            DamagedImage: it cannot be read or decoded.
        """

    def reader(self) -> ImageReader:
        """A new reader for one batch, which replaces damaged images."""

    def select(
        self,
        indices: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "ImageSource":
        """A source of some of the images.

        Args:
            indices: int (B,), the images to keep, in this order.
            labels: int (B,), their new labels; None keeps the present ones.
            class_names: names for the new labels; None keeps the present ones.
        """
