"""Images held in memory as one array.

Axes: N images, B batch, H height, W width, C channels (3), S size in pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from PIL import Image

from m2mkd_jax.data import augment
from m2mkd_jax.data.image_source import Shrink


class ArrayImageSource:
    """An `ImageSource` and `ImageReader` of decoded images.

    Attributes:
        images: uint8 (N, H, W, 3).
        labels: int32 (N,).
        class_names: the name of each class.
    """

    in_memory = True
    replaced: Mapping[int, int] = MappingProxyType({})  # decoded images cannot be damaged

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | Sequence[int], class_names: Iterable[str]
    ) -> None:
        self.images = images
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The image's name in messages."""
        return f"number {index}"

    def read(self, index: int, shrink: Shrink | None = None) -> np.ndarray:
        """One image: uint8 (H, W, 3); `shrink` has no effect on decoded images."""
        return self.images[index]

    def reader(self) -> "ArrayImageSource":
        """The source itself."""
        return self

    def evaluation_images(self, indices: np.ndarray, size: int) -> np.ndarray:
        """The images at `indices` int (B,): uint8 (B, S, S, 3), a copy.

        Unchanged if they already have the size S, else resized and centre-cropped.
        """
        if self.images.shape[1:3] == (size, size):
            return self.images[indices]
        return np.stack([augment.evaluation_image(self.read(i), size) for i in indices])

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels at `indices` (B,): int32 (B,)."""
        return self.labels[indices]

    def select(
        self,
        indices: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "ArrayImageSource":
        """A source of the images at `indices`; see `ImageSource.select`."""
        labels = self.labels[indices] if labels is None else labels
        return ArrayImageSource(self.images[indices], labels, class_names or self.class_names)


def to_images(grey: np.ndarray, size: int) -> np.ndarray:
    """Turns grey images into RGB images of `size` pixels.

    Images of 28 pixels get a black border of two pixels to become 32, which keeps strokes sharp;
    any other change of size is bicubic.

    Args:
        grey: uint8 (N, H, W), H = W.
        size: S in pixels.

    Returns:
        uint8 (N, S, S, 3), three equal channels.
    """
    side = grey.shape[1]
    if (side, size) == (28, 32):
        grey = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
    elif side != size:
        grey = np.stack(
            [
                np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC))
                for one in grey
            ]
        )
    return np.repeat(grey[..., None], 3, axis=-1)
