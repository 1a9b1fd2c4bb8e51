"""Data sets prepared by TensorFlow Datasets as ArrayRecord files, read without TensorFlow.

    root[/name[/version]]/dataset_info.json, *.array_record

Axes: N images, R records of the split, B batch.
"""

from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.errors import UserError, printable

_INFO = "dataset_info.json"
_HUGGING_FACE = "state.json"  # stands beside a dataset_info.json that is not of TFDS
_NAMED = 5  # data sets that a message names
_SHOWN = 200  # characters of an error of TFDS
# imagenet2012 has a test split without labels, so validation is preferred.
_SPLITS = {"train": ("train",), "test": ("validation", "test")}


class RecordFiles:
    """`EncodedFiles` that are records of a prepared split."""

    def __init__(
        self,
        directory: str | Path,
        records: Any,
        classes: int,
        rows: np.ndarray | None = None,
        known: np.ndarray | None = None,
    ) -> None:
        """Refers to records of a split.

        Args:
            directory: the prepared directory, for messages.
            records: TFDS's data source of R records with "image" (bytes) and "label".
            classes: how many there are.
            rows: int (N,), the records to use; None: all.
            known: int32 (R,), labels read so far (-1: not yet), shared by selections of a split.
        """
        self.directory = str(directory)
        self._records, self._classes = records, classes
        self._rows = np.arange(len(records)) if rows is None else rows
        self._known = np.full(len(records), -1, np.int32) if known is None else known

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """A record's number and directory."""
        return f"number {self._rows[index]} of {self._records.split} in {self.directory}"

    def content(self, index: int) -> bytes:
        """An image's bytes."""
        row = int(self._rows[index])
        record = self._record(row)
        self._known[row] = record["label"]
        return record["image"]

    def _record(self, row: int) -> Any:
        """Record `row` of the split.

        Raises:
            UserError: its file is missing or damaged, or it has no class, for which -1 stands.
        """
        try:
            record = self._records[row]
            if record["image"] is None or record["label"] is None:
                raise ValueError("its file is cut off")
        except Exception as error:  # whatever readers make of files that are cut off
            reason = printable(" ".join(str(error).split()))[:_SHOWN]
            raise UserError(
                f"number {row} of {self._records.split} in {self.directory} cannot be read "
                f"({reason}): prepare it again"
            ) from error
        if not 0 <= record["label"] < self._classes:
            raise UserError(
                f"number {row} of {self._records.split} in {self.directory} has the label "
                f"{record['label']} of {self._classes} classes: use a split with classes"
            )
        return record

    def take(self, indices: np.ndarray) -> "RecordFiles":
        """The records at `indices`, in this order."""
        return RecordFiles(
            self.directory, self._records, self._classes, self._rows[indices], self._known
        )

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels of the records at `indices` int (B,): int32 (B,)."""
        rows = self._rows[indices]
        for row in rows[self._known[rows] < 0]:
            self._known[row] = self._record(int(row))["label"]
        return self._known[rows]


class RecordLabels:
    """`Labels` read from the records on request.

    `labels[indices]` costs nothing for images just read; `np.asarray(labels)` reads the split.
    """

    def __init__(self, files: RecordFiles, new: np.ndarray | None = None) -> None:
        """Refers to the labels of records.

        Args:
            files: the records.
            new: int32 (classes,), the new number of each class, -1 for a class that must not occur;
                None: unchanged.
        """
        self._files, self._new = files, new

    def renumbered(self, new: np.ndarray) -> "RecordLabels":
        """The same labels with other numbers; `new` as in the constructor."""
        return RecordLabels(self._files, new)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        labels = self._files.labels_of(indices)
        if self._new is None:
            return labels
        if (self._new[labels] < 0).any():
            raise UserError(f"{self._files.directory} has images of classes that are not expected")
        return self._new[labels]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[np.arange(len(self))], dtype)


def prepared_in(root: str | Path) -> list[Path]:
    """The prepared versions in `root` or up to two folders below it; Hugging Face's are none."""
    root = Path(root)
    patterns = (_INFO, f"*/{_INFO}", f"*/*/{_INFO}")
    found = [path.parent for pattern in patterns for path in sorted(root.glob(pattern))]
    found = [path for path in found if not (path / _HUGGING_FACE).exists()]
    return [root] if root in found else found


def find_prepared(root: str | Path) -> Path | None:
    """The newest prepared version in `root` or up to two folders below it, or None.

    Raises:
        UserError: versions of more than one data set.
    """
    found = prepared_in(root)
    # Folders of versions of one data set are beside each other; others are data sets themselves.
    sets = sorted({path.parent if _version(path) else path for path in found})
    if len(sets) > 1:
        raise UserError(
            f"{root} holds {len(sets)} prepared data sets ({', '.join(map(str, sets[:_NAMED]))}"
            f"{', ...' if len(sets) > _NAMED else ''}): give the directory of one"
        )
    return max(found, key=_version, default=None)


def _version(directory: Path) -> list[int]:
    """The numbers of a version's folder (1.0.0); [] if its name is no version."""
    parts = directory.name.split(".")
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []


def _library() -> Any:
    import tensorflow_datasets  # noqa: PLC0415 - slow import

    return tensorflow_datasets


def _builder(directory: str | Path) -> Any:
    """TFDS's description of a prepared directory.

    Raises:
        UserError: its files are damaged, or not of TFDS.
    """
    try:
        return _library().builder_from_directory(str(directory))
    except Exception as error:  # damaged json can cause any error in TFDS's and protobuf's parsers
        reason = printable(" ".join(str(error).split()))[:_SHOWN]
        raise UserError(
            f"{directory}: its {_INFO} or features.json is none that TensorFlow Datasets writes "
            f"({type(error).__name__}: {reason}): prepare it again, or remove it"
        ) from error


def has_split(directory: str | Path, split: str) -> bool:
    """Whether a prepared directory holds the split 'train' or 'test'."""
    splits = _builder(directory).info.splits
    return any(name in splits for name in _SPLITS[split])


def list_images(directory: str | Path, split: str) -> tuple[RecordFiles, tuple[str, ...]]:
    """Opens a split of a prepared directory.

    Args:
        directory: from `find_prepared`.
        split: 'train' or 'test'.

    Returns:
        The records and the class names.

    Raises:
        UserError: damaged, not prepared as ArrayRecord, no such split, or no image and label
            features.
    """
    builder = _builder(directory)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(
            f"{directory} has the features {', '.join(features)}: image and label are needed"
        )
    tfds = _library()
    for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if not isinstance(features[key], kind):
            raise UserError(
                f"{directory}: its feature {key} is of the type {type(features[key]).__name__}; "
                f"{kind.__name__} is needed"
            )
    name = next((name for name in _SPLITS[split] if name in builder.info.splits), None)
    if name is None:
        raise UserError(
            f"{directory} has the splits {', '.join(builder.info.splits)}: no"
            f" {' or '.join(_SPLITS[split])}"
        )
    try:
        # All images stay undecoded: CUB's records also hold a mask, which is not used.
        images = [key for key in features if isinstance(features[key], tfds.features.Image)]
        records = builder.as_data_source(
            name, decoders={key: tfds.decode.SkipDecoding() for key in images}
        )
    except NotImplementedError as error:
        raise UserError(
            f"{directory} is prepared as {builder.info.file_format.value}: prepare it again with"
            ' file_format="array_record", which can be read in any order'
        ) from error
    names = tuple(features["label"].names)
    return RecordFiles(directory, records, len(names)), names
