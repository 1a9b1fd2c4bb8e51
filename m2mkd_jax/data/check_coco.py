"""Reports what a directory of COCO's format holds, for `python -m m2mkd_jax.data.check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from m2mkd_jax.data.coco import CocoData, load_scene, read_coco
from m2mkd_jax.errors import UserError, printable

PREFIX = "instances_"
SHOWN = 10  # broken images or classes that are named


def find_instances(root: Path) -> list[tuple[Path, Path]]:
    """The files of instances of a directory, each with the folder of its images.

    They are annotations/instances_NAME.json with the folder NAME, as COCO names them; `root` may
    also be such a file.
    """
    if root.is_file() and root.suffix == ".json":
        files, top = [root], root.parent.parent
    else:
        files, top = sorted((root / "annotations").glob(f"{PREFIX}*.json")), root
    return [(file, top / file.stem.removeprefix(PREFIX)) for file in files]


def check_instances(file: Path, folder: Path, quick: bool, out: Callable[[str], object]) -> bool:
    """Reports on one file of instances.

    Args:
        file: json.
        folder: of its images.
        quick: decode no image.
        out: called with each line.

    Returns:
        Whether no problem was found.
    """
    split = folder.name
    try:
        data = read_coco(file, folder, train=False)
    except UserError as error:
        out(f"{split}: {error}")
        return False
    content, numbers = data.content, {id: i for i, id in enumerate(data.categories)}
    objects = [o for image in data.images for o in image.objects]
    crowds = sum(bool(a.get("iscrowd")) for a in content["annotations"])
    with_objects = sum(bool(image.objects) for image in data.images)
    out(
        f"{split}: {len(data.images)} images, {with_objects} of them with objects; "
        f"{len(objects)} objects of {len(numbers)} classes, {crowds} crowds"
    )
    out(f"{split}: classes, in their order: {_some(data.class_names)}")
    counts = Counter(numbers[o["category_id"]] for o in objects)
    empty = [name for i, name in enumerate(data.class_names) if not counts[i]]
    if empty:
        out(f"{split}: {len(empty)} classes without an object: {_some(empty)}")
    for line in data.problem_lines():
        out(f"{split}: {line}")
    broken = [] if quick else _broken(data)
    if broken:
        out(f"{split}: {len(broken)} images that cannot be used: {'; '.join(broken[:SHOWN])}")
    return not (data.problems or broken)


def _broken(data: CocoData) -> list[str]:
    """What is wrong with the images, and with masks that cannot be decoded."""
    found = []
    for image in data.images:
        try:
            load_scene(data, image)
        except UserError as error:
            found.append(str(error))
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return printable(", ".join(names[:SHOWN]) + more)
