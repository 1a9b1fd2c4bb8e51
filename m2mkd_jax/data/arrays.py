"""A source that holds its images in memory.

Axes: N images, B batch, H height, W width, C channels (3), S the wanted image size.
"""

import numpy as np
from PIL import Image


class ArraySource:
    """Images that are already decoded and of the wanted size.

    Attributes: images uint8 (N, S, S, 3), labels int32 (N,), class_names, a tuple of strings.
    """

    def __init__(self, images, labels, class_names):
        self.images = images
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        """One image as a PIL image in RGB."""
        return Image.fromarray(self.images[index])

    def evaluation_images(self, indices):
        """The images at `indices` int (B,), as they are: uint8 (B, S, S, 3), a copy."""
        return self.images[indices]

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
        grey = np.stack([
            np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC))
            for one in grey
        ])
    return np.repeat(grey[..., None], 3, axis=-1)
