"""Reports what a directory of images holds: layout, classes, counts, damaged and missing ones.

    python -m m2mkd_jax.data.check ROOT [--quick] [--validation=SHARE] [--numeric_order] ...

Of COCO's format, the images, objects and problems of every file of instances.

Every image is decoded, on all cores (with --quick none is). With the options that are keys of
config.data, what a run with these values gets. Exit code 0: no problem found; 2: a problem, or no
images.
"""

import signal

if __name__ == "__main__":  # Ctrl-C in the seconds of the imports prints no stack
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from m2mkd_jax.arguments import Arguments, answer
from m2mkd_jax.data import layouts
from m2mkd_jax.data.check_coco import check_instances, find_instances
from m2mkd_jax.data.class_lists import PARENTS, wordnet_ids
from m2mkd_jax.data.decode import RGB, DamagedImage, Form
from m2mkd_jax.data.encoded_source import EncodedImageSource
from m2mkd_jax.data.formats.tables import FOUND, Columns
from m2mkd_jax.data.image_source import ImageSource
from m2mkd_jax.data.indices import held_out
from m2mkd_jax.data.workers import usable_cores
from m2mkd_jax.errors import UserError, printable, require, show_any_name
from m2mkd_jax.interruption import ended_by_signals

_SHOWN = 10  # damaged files or missing classes that are named
_NEARLY = 0.9  # share of a known data set's classes from which on the others count as missing
_CHUNK = 256  # images per task of a thread


@dataclasses.dataclass(frozen=True)
class Options:
    """Keys of config.data that decide what is in a split and what its classes are called.

    Attributes:
        validation, validation_seed: share of the training images held out, and which.
        numeric_order: classes in the order of their numbers.
        columns: where images and classes are.
        channels: of an image.
    """

    validation: float = 0.0
    validation_seed: int = 0
    numeric_order: bool = False
    columns: Columns = FOUND
    channels: int = RGB.channels


def check(
    root: str | Path,
    quick: bool = False,
    out: Callable[[str], object] = print,
    options: Options | None = None,
) -> bool:
    """Checks a directory and reports line by line.

    Args:
        root: the directory.
        quick: decode no image.
        out: called with each line.
        options: as a run has them; None: the defaults.

    Returns:
        Whether no problem was found.

    Raises:
        UserError: no known layout, or a directory that cannot be read.
    """
    options = options or Options()
    if instances := find_instances(Path(root)):
        out(f"{root}: COCO's format (annotations/instances_*.json)")
        return all([check_instances(*paths, quick, out) for paths in instances])
    layout = layouts.require(root, tuple(layouts.LAYOUTS))
    place = layouts.prepared(root) if layout == "prepared" else root
    out(f"{place}: {layouts.LAYOUTS[layout]}")
    good, found, order = True, 0, ""
    renditions = layouts.test_only(root, layout) and not options.validation
    tested = renditions or layouts.has_test(root, layout)
    for split in ("test",) if renditions else ("train", "test") if tested else ("train",):
        try:
            source = layouts.open_split(root, layout, split, options.columns)
            source = _as_renditions(source) if renditions else source
            if isinstance(source, EncodedImageSource):
                source = source.with_form(Form(options.channels))
            source = layouts.in_numeric_order(source) if options.numeric_order else source
            parts = _parts(source, split, options)
        except UserError as error:
            out(f"{split}: {error}")
            good = False
            continue
        found += 1
        if (listed := _order(source.class_names)) != order:
            out(f"classes, in the order of their labels: {listed}{_numbers(source.class_names)}")
            order = listed
        for name, part in parts:
            good &= _check_split(part, name, quick, out)
    if not tested or layout == "classes":
        _say_train_alone(options, out)
    return good and found > 0 and (tested or options.validation > 0)


def _parts(source: ImageSource, split: str, options: Options) -> list[tuple[str, ImageSource]]:
    """A split by itself, or the training images with those held out of them apart."""
    if split == "test" or not options.validation:
        return [(split, source)]
    kept, held = held_out(np.asarray(source.labels), options.validation, options.validation_seed)
    return [("train", source.select(kept)), ("validation", source.select(held))]


def _say_train_alone(options: Options, out: Callable[[str], object]) -> None:
    if options.validation:
        out("test: no images; eval looks at the validation images")
    else:
        out(
            "test: no images beside these; to train on them, data.validation=0.1 (here "
            "--validation=0.1) holds out a tenth of them"
        )


def _numbers(names: Sequence[str]) -> str:
    """A remark on numbers that sort as text, or nothing."""
    unsorted = all(name.isdecimal() for name in names) and list(names) != sorted(names, key=int)
    return " (numbers as text; data.numeric_order=True sorts them as numbers)" if unsorted else ""


def _as_renditions(source: ImageSource) -> ImageSource:
    """Renumbers renditions within their own classes; TFDS numbers ImageNet-R within ImageNet."""
    held = {source.class_names[label] for label in np.unique(np.asarray(source.labels))}
    for name, parent in PARENTS.items():
        if source.class_names == wordnet_ids(parent) and held <= set(wordnet_ids(name)):
            return layouts.reordered(source, wordnet_ids(name))
    return source


def _check_split(
    source: ImageSource, split: str, quick: bool, out: Callable[[str], object]
) -> bool:
    """Reports on one split; returns whether no problem was found."""
    names = source.class_names
    counts = np.bincount(np.asarray(source.labels), minlength=len(names))
    held = counts[counts > 0]
    out(
        f"{split}: {len(source)} images of {len(held)} classes,"
        f" {held.min(initial=len(source))} to {held.max(initial=0)} of each{_known(names)}"
    )
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        out(f"{split}: {len(empty)} classes without an image: {_some(empty)}")
    missing, unknown = _beside_known(names)
    for classes, words in ((missing, "are missing"), (unknown, "are none of its")):
        if classes:
            out(f"{split}: {len(classes)} classes {words}: {_some(classes)}")
    damaged = [] if quick else _damaged(source, split)
    if damaged:
        out(f"{split}: {len(damaged)} damaged images ({len(damaged) / len(source):.3%}):")
        for line in damaged[:_SHOWN]:
            out(f"  {line}")
        if len(damaged) > _SHOWN:
            out(f"  and {len(damaged) - _SHOWN} more")
    return not (empty or missing or unknown or damaged)


def _damaged(source: ImageSource, split: str) -> list[str]:
    """The error messages of the damaged images, in the order of the images."""

    def messages(start: int) -> list[str]:
        found = []
        for index in range(start, min(start + _CHUNK, len(source))):
            try:
                source.read(index)
            except DamagedImage as error:
                found.append(str(error))
            bar.update()
        return found

    bar = tqdm(total=len(source), desc=split, unit=" images", file=sys.stderr)
    # Decoding releases the interpreter lock.
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        chunks = pool.map(messages, range(0, len(source), _CHUNK))
        return [line for chunk in chunks for line in chunk]


def _known(names: Sequence[str]) -> str:
    """A remark naming the known data set that has (nearly) these classes, or nothing."""
    known = _nearest(names)
    missing, unknown = _beside_known(names)
    return f" ({'nearly ' if missing or unknown else ''}the classes of {known})" if known else ""


def _nearest(names: Sequence[str]) -> str | None:
    """The known data set that shares most of these classes, if any."""
    for known in ("imagenet", "tiny_imagenet", *PARENTS):
        ids = wordnet_ids(known)
        if len(set(ids) & set(names)) >= _NEARLY * max(len(ids), len(names)):
            return known
    return None


def _beside_known(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The classes missing from the nearest known data set, and those that it does not have."""
    known = _nearest(names)
    ids = wordnet_ids(known) if known else names
    return sorted(set(ids) - set(names)), sorted(set(names) - set(ids))


def _order(names: Sequence[str]) -> str:
    """The first classes in the order of their labels, and the last."""
    if len(names) <= _SHOWN:
        return printable(", ".join(names))
    return printable(f"{', '.join(names[: _SHOWN - 1])}, ..., {names[-1]}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _run(arguments: Sequence[str] | None) -> int:
    parser = Arguments(
        "python -m m2mkd_jax.data.check", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("root")
    parser.add_argument("--quick", action="store_true", help="count only, decode nothing")
    config = parser.add_argument_group("as in config.data")
    config.add_argument("--validation", type=float, default=0.0, metavar="SHARE")
    config.add_argument("--validation_seed", type=int, default=0, metavar="N")
    config.add_argument("--numeric_order", action="store_true")
    config.add_argument("--image_column", default="", metavar="NAME")
    config.add_argument("--label_column", default="", metavar="NAME")
    config.add_argument("--channels", type=int, default=RGB.channels, metavar="C")
    given = parser.parse_args(arguments)
    require(0 <= given.validation < 1, "--validation must be from 0 to below 1")
    require(given.channels > 0, "--channels must be above 0")
    options = Options(
        given.validation,
        given.validation_seed,
        given.numeric_order,
        Columns(given.image_column, given.label_column),
        given.channels,
    )
    return 0 if check(given.root, given.quick, options=options) else 2


@ended_by_signals()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    show_any_name()
    return answer(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
