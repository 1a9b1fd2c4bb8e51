"""Data sets that TensorFlow Datasets prepared, read without TensorFlow.

A prepared directory holds dataset_info.json and *.array_record files: prepare with
`file_format="array_record"`. Axes: N images.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from m2mkd_jax.errors import UserError

_INFO = "dataset_info.json"
# imagenet2012 has a test split without labels: validation comes first.
_SPLITS = {"train": ("train",), "test": ("validation", "test")}


class RecordFiles:
    """Encoded images of a prepared split.

    records: TFDS's data source, whose items hold "image" as bytes and "label"; rows int (N,), which
    of them. Labels stand in the records alone: `known` int32 (records,) keeps those seen, else -1.
    """

    def __init__(self, directory, records, rows=None, known=None):
        self.directory = str(directory)
        self._records = records
        self._rows = np.arange(len(records)) if rows is None else rows
        self._known = np.full(len(records), -1, np.int32) if known is None else known

    def __len__(self):
        return len(self._rows)

    def name(self, index):
        """Where a record lies."""
        return f"number {self._rows[index]} of {self._records.split} in {self.directory}"

    def content(self, index):
        """An image's bytes."""
        row = int(self._rows[index])
        record = self._records[row]
        self._known[row] = record["label"]
        return record["image"]

    def take(self, indices):
        """Only these records, in this order."""
        return RecordFiles(self.directory, self._records, self._rows[indices], self._known)

    def labels_of(self, indices):
        """Labels of the records at `indices` int (B,): int32 (B,)."""
        rows = self._rows[indices]
        for row in rows[self._known[rows] < 0]:
            self._known[row] = self._records[int(row)]["label"]
        return self._known[rows]


class RecordLabels:
    """Labels that are read when they are asked for.

    `labels[indices]` costs nothing for images just read; `np.asarray(labels)` reads the split once.
    new: None, or int32 (classes,), other numbers for the classes.
    """

    def __init__(self, files, new=None):
        self._files, self._new = files, new

    def __len__(self):
        return len(self._files)

    def __getitem__(self, indices):
        labels = self._files.labels_of(indices)
        if self._new is None:
            return labels
        if (self._new[labels] < 0).any():
            raise UserError(f"{self._files.directory} has images of classes that are not expected")
        return self._new[labels]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[np.arange(len(self))], dtype)


def find_prepared(root):
    """The newest prepared version in `root`, in a folder of it, or one below that; None if none."""
    root = Path(root)
    for pattern in (_INFO, f"*/{_INFO}", f"*/*/{_INFO}"):
        found = [path.parent for path in root.glob(pattern)]
        if found:
            return max(found, key=lambda path: [_number(part) for part in path.name.split(".")])
    return None


def _number(text):
    return int(text) if text.isdigit() else -1


def has_split(directory, split):
    """Whether a prepared directory holds a split."""
    splits = tfds.builder_from_directory(str(directory)).info.splits
    return any(name in splits for name in _SPLITS[split])


def list_images(directory, split):
    """A split of a prepared directory: RecordFiles, class names.

    Raises: UserError for one that is not array_record, lacks the split, or has no image and label.
    """
    builder = tfds.builder_from_directory(str(directory))
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(
            f"{directory} has the features {', '.join(features)}: image and label are needed"
        )
    name = next((name for name in _SPLITS[split] if name in builder.info.splits), None)
    if name is None:
        raise UserError(
            f"{directory} has the splits {', '.join(builder.info.splits)}: no"
            f" {' or '.join(_SPLITS[split])}"
        )
    try:
        # None: CUB's records hold a mask too, which nobody looks at.
        images = [key for key in features if isinstance(features[key], tfds.features.Image)]
        records = builder.as_data_source(
            name, decoders={key: tfds.decode.SkipDecoding() for key in images}
        )
    except NotImplementedError as error:
        raise UserError(
            f"{directory} is prepared as {builder.info.file_format.value}: prepare it again with"
            ' file_format="array_record", which can be read in any order'
        ) from error
    return RecordFiles(directory, records), tuple(features["label"].names)
