"""A source that holds its images in memory.

Axes: N images, B batch, H height, W width, C channels (3), S the wanted image size.
"""

from types import MappingProxyType

import numpy as np
from PIL import Image

from m2mkd_jax.data import augment


class ArraySource:
    """Images that are already decoded.

    Attributes: images uint8 (N, H, W, 3), labels int32 (N,), class_names, a tuple of strings.
    """

    replaced = MappingProxyType({})  # nothing here can be damaged

    def __init__(self, images, labels, class_names):
        self.images = images
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        """What a message calls an image."""
        return f"number {index}"

    def read(self, index, shrink=None):
        """One image: uint8 (H, W, 3); `shrink` is for sources that decode."""
        return self.images[index]

    def reader(self):
        """What a batch reads its images through: itself."""
        return self

    def evaluation_images(self, indices, size):
        """The images at `indices` int (B,): uint8 (B, S, S, 3), a copy.

        As they are where they have the wanted size S, else resized and cut to the centre.
        """
        if self.images.shape[1:3] == (size, size):
            return self.images[indices]
        return np.stack([augment.evaluation_image(self.read(i), size) for i in indices])

    def labels_of(self, indices):
        """int32 (B,)."""
        return self.labels[indices]

    def select(self, indices, labels=None, class_names=None):
        """A source of only these images, in this order; with other labels where given."""
        labels = self.labels[indices] if labels is None else labels
        return ArraySource(self.images[indices], labels, class_names or self.class_names)


def to_images(grey, size):
    """Grey pictures as the sources hold them: three equal channels, `size` pixels.

    Pictures of 28 pixels become 32 by two black pixels on every side, which keeps every stroke
    as sharp as it is; any other change of size is bicubic, one picture at a time.

    Args: grey uint8 (N, H, W), H = W; size S in pixels.
    Returns: uint8 (N, S, S, 3).
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
