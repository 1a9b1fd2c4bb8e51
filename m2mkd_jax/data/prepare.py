"""Prepares Tiny-ImageNet and Tiny-ImageNet-R for TensorFlow Datasets, without TensorFlow.

    python -m m2mkd_jax.data.prepare tiny_imagenet tiny-imagenet-200 ~/tensorflow_datasets
    python -m m2mkd_jax.data.prepare tiny_imagenet_r imagenet-r ~/tensorflow_datasets

The source is the unpacked archive; for tiny_imagenet_r, ImageNet-R will do: the 62 classes are
taken out of it. The files' bytes are stored as they are, in the order in which folders are read, so
that a run from prepared data is the run from folders.
"""

import argparse
import sys

import tensorflow_datasets as tfds

from m2mkd_jax.data import folder
from m2mkd_jax.data.class_lists import wordnet_ids
from m2mkd_jax.data.encoded import FolderFiles
from m2mkd_jax.data.layouts import require
from m2mkd_jax.errors import UserError


class _Folders(tfds.core.GeneratorBasedBuilder):
    """A prepared copy of image folders.

    Paths are handed over, not arrays: encoding arrays is what TFDS needs TensorFlow for.
    """

    VERSION = tfds.core.Version("1.0.0")
    names: tuple[str, ...]

    def __init__(self, *, source, data_dir):
        self._source = source
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        # TFDS's own helper for this asks TensorFlow for the class's documentation.
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=list(self.names)),
                "file_name": tfds.features.Text(),
            }),
            disable_shuffling=True,
        )

    def _generate_examples(self, paths, labels):
        files = FolderFiles(self._source, paths)
        for i, label in enumerate(labels):
            yield i, {
                "image": files.name(i), "label": int(label), "file_name": bytes(paths[i]).decode(),
            }  # fmt: skip


class TinyImagenet(_Folders):
    """Tiny-ImageNet: 200 classes at 64 px; splits train and validation."""

    names = wordnet_ids("tiny_imagenet")

    def _split_generators(self, dl_manager):
        require(self._source, ("folders",))
        folder.check_same_classes(self._source, self.names, folder.check_layout(self._source))
        return {
            name: self._generate_examples(*folder.list_images(self._source, split, self.names))
            for name, split in (("train", "train"), ("validation", "test"))
        }


class TinyImagenetR(_Folders):
    """Tiny-ImageNet-R: renditions of 62 classes of Tiny-ImageNet; split test."""

    names = wordnet_ids("tiny_imagenet_r")

    def _split_generators(self, dl_manager):
        require(self._source, ("classes",))
        missing = sorted(set(self.names) - set(folder.class_folders(self._source)))
        if missing:
            raise UserError(
                f"{self._source} lacks {len(missing)} of the 62 classes (the first: {missing[0]})"
            )
        return {"test": self._generate_examples(
            *folder.list_classes(self._source, "", self.names)
        )}  # fmt: skip


BUILDERS = {"tiny_imagenet": TinyImagenet, "tiny_imagenet_r": TinyImagenetR}


def main(arguments=None):
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m m2mkd_jax.data.prepare")
    parser.add_argument("name", choices=BUILDERS)
    parser.add_argument("source", help="the unpacked archive")
    parser.add_argument("data_dir", help="where prepared data sets lie")
    given = parser.parse_args(arguments)
    try:
        builder = BUILDERS[given.name](source=given.source, data_dir=given.data_dir)
        builder.download_and_prepare()
    except UserError as error:
        print(f"m2mkd_jax: {error}", file=sys.stderr)
        return 2
    splits = [f"{name} {split.num_examples}" for name, split in builder.info.splits.items()]
    print(f"{builder.data_path}: {', '.join(splits)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
