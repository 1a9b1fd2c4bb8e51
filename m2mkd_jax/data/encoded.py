"""A source whose images are decoded when they are asked for, and what it does about damaged ones.

Axes: N images, B batch, H height, W width, S wanted size in pixels.
"""

import os
import sys

import numpy as np

from m2mkd_jax.data import augment
from m2mkd_jax.data.decode import DamagedImage, decode
from m2mkd_jax.errors import UserError


class FolderFiles:
    """Image files below a folder. root, a path; paths bytes (N,), below root."""

    def __init__(self, root, paths):
        self.root = os.fspath(root)
        # Encoded, in one array: a million str objects take 150 MB in every worker.
        self.paths = np.asarray(paths)

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        """Where a file lies."""
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))

    def content(self, index):
        """A file's bytes."""
        with open(self.name(index), "rb") as file:
            return file.read()

    def take(self, indices):
        """Only these files, in this order."""
        return FolderFiles(self.root, self.paths[indices])


class EncodedSource:
    """Images as encoded files, wherever they lie.

    Attributes: files, with `len`, `name(index)`, `content(index)` -> bytes and `take(indices)`;
    labels int32 (N,), or something that gives them for `labels[indices]`; class_names, a tuple of
    strings.
    """

    def __init__(self, files, labels, class_names):
        self.files = files
        self.labels = labels
        self.class_names = tuple(class_names)

    def __len__(self):
        return len(self.files)

    def name(self, index):
        """What a message calls an image."""
        return self.files.name(index)

    def read(self, index, shrink=None):
        """One image: uint8 (H, W, 3), RGB; `shrink` as in decode.py.

        Raises: DamagedImage.
        """
        try:
            content = self.files.content(index)
        except OSError as error:
            raise DamagedImage(f"cannot read the image {self.name(index)} ({error})") from error
        return decode(content, self.name(index), shrink)

    def reader(self):
        """What a batch reads its images through."""
        return Mended(self)

    def select(self, indices, labels=None, class_names=None):
        """A source of only these images, in this order; with other labels where given."""
        labels = self.labels[indices] if labels is None else np.asarray(labels, np.int32)
        return EncodedSource(self.files.take(indices), labels, class_names or self.class_names)


class Mended:
    """Reads a source; in the place of a damaged image stands the next one that decodes.

    Which one that is depends on the images alone, so every run and every worker takes the same.
    Attributes: replaced, {index: the index that was read in its place}.
    """

    def __init__(self, source):
        self._source = source
        self.replaced = {}

    def read(self, index, shrink=None):
        """One image: uint8 (H, W, 3). Raises UserError where none of the source decodes."""
        count = len(self._source)
        for offset in range(count):
            candidate = (index + offset) % count
            try:
                image = self._source.read(candidate, shrink)
            except DamagedImage:
                continue
            if offset:
                self.replaced[int(index)] = int(candidate)
            return image
        raise UserError(f"none of the {count} images can be decoded: {self._source.name(index)}...")

    def evaluation_images(self, indices, size):
        """The images at `indices` int (B,), resized and cut to the centre: uint8 (B, S, S, 3)."""
        return np.stack([augment.evaluation_image(self.read(i), size) for i in indices])

    def labels_of(self, indices):
        """Labels of what was read for `indices` (B,): int32 (B,)."""
        return self._source.labels[np.array([self.replaced.get(int(i), i) for i in indices])]


class Damage:
    """Counts the damaged images of a run, names each once, and stops it when there are too many.

    limit: how many distinct ones a run bears.
    """

    def __init__(self, source, share):
        self._source = source
        self._limit = int(share * len(source) + 1e-6)  # 29% of 100 are 28.999... in floats
        self._share = share
        self._seen = set()

    def note(self, replaced):
        """Takes (image, replacement) pairs (K, 2), -1 where there is none.

        Raises: UserError beyond the limit.
        """
        for index, instead in replaced:
            if index < 0 or index in self._seen:
                continue
            self._seen.add(index)
            reason = self._reason(int(index))
            if len(self._seen) > self._limit:
                raise UserError(
                    f"{len(self._seen)} damaged images are more than {self._share:.2%} of"
                    f" {len(self._source)} (data.damaged_share); the last: {reason}"
                )
            print(
                f"warning: {reason}; {self._source.name(int(instead))} stands in for it"
                f" ({len(self._seen)} of at most {self._limit})",
                file=sys.stderr,
            )

    def _reason(self, index):
        try:
            self._source.read(index)
        except DamagedImage as error:
            return str(error)
        return f"the image {self._source.name(index)} could not be read for a while"
