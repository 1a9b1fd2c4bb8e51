"""Prepares Tiny-ImageNet and Tiny-ImageNet-R for TensorFlow Datasets, without TensorFlow.

    python -m m2mkd_jax.data.prepare tiny_imagenet tiny-imagenet-200 ~/tensorflow_datasets
    python -m m2mkd_jax.data.prepare tiny_imagenet_r imagenet-r ~/tensorflow_datasets

The source is the unpacked archive; tiny_imagenet_r can also be made from ImageNet-R, of which it
has 62 classes. File contents are stored unchanged, in the order in which folders are read, so that
training from prepared data equals training from folders. Axes: N images.
"""

import signal

if __name__ == "__main__":  # Ctrl-C in the seconds of the imports prints no stack
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from m2mkd_jax.arguments import Arguments, answer
from m2mkd_jax.data import layouts
from m2mkd_jax.data.class_lists import wordnet_ids
from m2mkd_jax.data.formats import folder
from m2mkd_jax.errors import UserError
from m2mkd_jax.interruption import ended_by_signals


class _Folders(tfds.core.GeneratorBasedBuilder):
    """Prepares image folders.

    Examples have paths instead of arrays, which TFDS would need TensorFlow to encode.
    """

    VERSION = tfds.core.Version("1.0.0")
    names: tuple[str, ...]
    layout: str

    def __init__(self, *, source: str, data_dir: str) -> None:
        """Checks and lists the source.

        Args:
            source: the unpacked archive.
            data_dir: the directory of prepared data sets.

        Raises:
            UserError: prepared already, another layout, other classes, or no images; nothing is
                written then.
        """
        there = Path(data_dir) / self.name / str(self.VERSION)
        if there.exists():  # which TFDS would take for prepared from this source
            raise UserError(f"{there} is there already; remove it or choose another DATA_DIR")
        layouts.require(source, (self.layout,))
        found = layouts.class_names(source, self.layout) or []
        missing, unknown = set(self.names) - set(found), set(found) - set(self.names)
        if missing:
            raise UserError(
                f"{source} lacks {len(missing)} of the {len(self.names)} classes"
                f" (the first: {min(missing)}): unpack the archive again"
            )
        if unknown and self.layout == "folders":  # renditions may be part of a larger set
            raise UserError(
                f"{source} has {len(unknown)} classes beside the {len(self.names)}"
                f" (the first: {min(unknown)}): remove them"
            )
        self._source, self._splits = source, self._list(source)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _list(self, source: str) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """{split: (paths bytes (N,), labels int32 (N,))}."""
        raise NotImplementedError

    def _info(self) -> Any:
        # TFDS's helper for this imports TensorFlow.
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=list(self.names)),
                    "file_name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {name: self._generate_examples(*listed) for name, listed in self._splits.items()}

    def _generate_examples(
        self, paths: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        files = folder.FolderFiles(self._source, paths)
        for i, label in enumerate(labels):
            yield (
                i,
                {
                    "image": files.name(i),
                    "label": int(label),
                    "file_name": bytes(paths[i]).decode(errors="backslashreplace"),
                },
            )


class TinyImagenet(_Folders):
    """Tiny-ImageNet: 200 classes at 64 px; splits train and validation."""

    names, layout = wordnet_ids("tiny_imagenet"), "folders"

    def _list(self, source: str) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        return {
            name: folder.list_images(source, split, self.names)
            for name, split in (("train", "train"), ("validation", "test"))
        }


class TinyImagenetR(_Folders):
    """Tiny-ImageNet-R: renditions of 62 classes of Tiny-ImageNet; split test."""

    names, layout = wordnet_ids("tiny_imagenet_r"), "classes"

    def _list(self, source: str) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        return {"test": folder.list_classes(source, "", self.names)}


BUILDERS = {"tiny_imagenet": TinyImagenet, "tiny_imagenet_r": TinyImagenetR}


def _run(arguments: Sequence[str] | None) -> int:
    parser = Arguments(
        "python -m m2mkd_jax.data.prepare", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("name", choices=BUILDERS)
    parser.add_argument("source", help="the unpacked archive")
    parser.add_argument("data_dir", help="the directory of prepared data sets")
    given = parser.parse_args(arguments)
    try:
        builder = BUILDERS[given.name](source=given.source, data_dir=given.data_dir)
        builder.download_and_prepare()
    except OSError as error:
        raise UserError(f"cannot prepare in {given.data_dir} ({error})") from None
    splits = [f"{name} {split.num_examples}" for name, split in builder.info.splits.items()]
    print(f"{builder.data_path}: {', '.join(splits)}")
    return 0


@ended_by_signals()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    return answer(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
