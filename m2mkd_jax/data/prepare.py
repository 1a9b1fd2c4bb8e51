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

from m2mkd_jax.data import layouts
from m2mkd_jax.data.class_lists import wordnet_ids
from m2mkd_jax.data.encoded import FolderFiles
from m2mkd_jax.data.formats import folder
from m2mkd_jax.errors import UserError


class _Folders(tfds.core.GeneratorBasedBuilder):
    """A prepared copy of image folders.

    Paths are handed over, not arrays: encoding arrays is what TFDS needs TensorFlow for.
    Raises, before anything is written: UserError for a source of another layout, with other classes
    or without images.
    """

    VERSION = tfds.core.Version("1.0.0")
    names: tuple[str, ...]
    layout: str

    def __init__(self, *, source, data_dir):
        layouts.require(source, (self.layout,))
        found = layouts.class_names(source, self.layout)
        missing, strange = set(self.names) - set(found), set(found) - set(self.names)
        if missing:
            raise UserError(
                f"{source} lacks {len(missing)} of the {len(self.names)} classes"
                f" (the first: {min(missing)}): unpack the archive again"
            )
        if strange and self.layout == "folders":  # renditions are taken out of more
            raise UserError(
                f"{source} has {len(strange)} classes beside the {len(self.names)}"
                f" (the first: {min(strange)}): remove them"
            )
        self._source, self._splits = source, self._list(source)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _list(self, source):
        """{split: (paths bytes (N,), labels int (N,))}."""
        raise NotImplementedError

    def _info(self):
        # TFDS's own helper for this asks TensorFlow for the class's documentation.
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

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(*listed) for name, listed in self._splits.items()}

    def _generate_examples(self, paths, labels):
        files = FolderFiles(self._source, paths)
        for i, label in enumerate(labels):
            yield (
                i,
                {
                    "image": files.name(i),
                    "label": int(label),
                    "file_name": bytes(paths[i]).decode(),
                },
            )


class TinyImagenet(_Folders):
    """Tiny-ImageNet: 200 classes at 64 px; splits train and validation."""

    names, layout = wordnet_ids("tiny_imagenet"), "folders"

    def _list(self, source):
        return {
            name: folder.list_images(source, split, self.names)
            for name, split in (("train", "train"), ("validation", "test"))
        }


class TinyImagenetR(_Folders):
    """Tiny-ImageNet-R: renditions of 62 classes of Tiny-ImageNet; split test."""

    names, layout = wordnet_ids("tiny_imagenet_r"), "classes"

    def _list(self, source):
        return {"test": folder.list_classes(source, "", self.names)}


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
    except OSError as error:
        print(f"m2mkd_jax: cannot prepare in {given.data_dir} ({error})", file=sys.stderr)
        return 2
    splits = [f"{name} {split.num_examples}" for name, split in builder.info.splits.items()]
    print(f"{builder.data_path}: {', '.join(splits)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
