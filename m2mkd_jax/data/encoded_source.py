"""Images held as encoded files, decoded on request.

Axes: N images, H height, W width, C channels.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from m2mkd_jax.data.damaged_images import SubstitutingReader
from m2mkd_jax.data.decode import RGB, DamagedImage, Form, decode
from m2mkd_jax.data.image_source import Labels, Shrink


class EncodedFiles(Protocol):
    """N encoded image files, wherever they are stored: each layout on disk has its own."""

    def __len__(self) -> int:
        """N."""

    def name(self, index: int) -> str:
        """Where a file is, for messages."""

    def content(self, index: int) -> bytes:
        """A file's bytes."""

    def take(self, indices: np.ndarray) -> "EncodedFiles":
        """The files at `indices`, in this order."""


class EncodedImageSource:
    """An `ImageSource` of encoded files.

    Attributes:
        files: the files.
        labels: int32 (N,), or labels that are read on request.
        class_names: the name of each class.
        form: what decoded images look like.
    """

    in_memory = False

    def __init__(
        self,
        files: EncodedFiles,
        labels: Labels,
        class_names: Iterable[str],
        form: Form = RGB,
    ) -> None:
        self.files = files
        self.form = form
        self.labels = labels
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The image's name in messages."""
        return self.files.name(index)

    def read(self, index: int, shrink: Shrink | None = None) -> np.ndarray:
        """One image: uint8 (H, W, C).

        Args:
            index: number of the image.
            shrink: see `decode`.

        Raises:
            DamagedImage: the file cannot be read or decoded.
        """
        try:
            content = self.files.content(index)
        except OSError as error:
            raise DamagedImage(f"cannot read the image {self.name(index)} ({error})") from error
        return decode(content, self.name(index), shrink, self.form)

    def reader(self) -> SubstitutingReader:
        """A reader that replaces damaged images."""
        return SubstitutingReader(self)

    def select(
        self,
        indices: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "EncodedImageSource":
        """A source of the images at `indices`; see `ImageSource.select`."""
        labels = self.labels[indices] if labels is None else np.asarray(labels, np.int32)
        names = class_names or self.class_names
        return EncodedImageSource(self.files.take(indices), labels, names, self.form)

    def with_form(self, form: Form) -> "EncodedImageSource":
        """The same images, decoded to another form."""
        return EncodedImageSource(self.files, self.labels, self.class_names, form)
