"""Small data sets on disk, in the published layouts."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from m2mkd_jax.errors import UserError

CLASSES = ("n01", "n02", "n03")


def make_config(name, root, classes=3, **fields):
    return ConfigDict(
        {
            "name": name,
            "root": str(root),
            "image_size": 16,
            "classes": classes,
            "train_images": 0,
            "test_images": 0,
            **fields,
        }
    )


def message(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_folders(root, classes=CLASSES, per_class=3):
    """train/CLASS/ and val/CLASS/, every image different."""
    rng = np.random.default_rng(0)
    for folder, count in (("train", per_class), ("val", 2)):
        for name in classes:
            for number in range(count):
                path = root / folder / name / f"{name}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (18 + number, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)


def write_cub(root):
    """Five images of two classes; number 2 and 5 are for testing."""
    rows = [
        (1, "001.A/a.jpg", 1, 1),
        (2, "001.A/b.jpg", 1, 0),
        (3, "002.B/c.jpg", 2, 1),
        (4, "002.B/d.jpg", 2, 1),
        (5, "002.B/e.jpg", 2, 0),
    ]
    for number, path, _, _ in rows:
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * number,) * 3).save(root / "images" / path)
    tables = {
        "images.txt": [f"{row[0]} {row[1]}" for row in rows],
        "image_class_labels.txt": [f"{row[0]} {row[2]}" for row in rows],
        "train_test_split.txt": [f"{row[0]} {row[3]}" for row in rows],
        "classes.txt": ["1 001.A", "2 002.B"],
    }
    for name, lines in tables.items():
        (root / name).write_text("\n".join(lines) + "\n")
