"""Images, shards and tables with random damage: refused in one line, or what Pillow reads too."""

import io
import os
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from m2mkd_jax.data.decode import DamagedImage, decode
from m2mkd_jax.data.formats import tar
from m2mkd_jax.errors import UserError

SEED = int(os.environ.get("CHAOS_SEED", "0"))
COUNT = int(os.environ.get("CHAOS_FILES", "500"))
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")


def picture(form):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8).repeat(2, 0)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form)
    return content.getvalue()


def mutated(content, draw):
    """A truncation, flipped bits, zeros, a removed or a doubled part."""
    new, at = bytearray(content), draw.randrange(len(content))
    kind = draw.choice(["cut", "flip", "zeros", "remove", "double", "noise"])
    if kind == "cut":
        del new[at:]
    elif kind == "flip":
        for _ in range(draw.randint(1, 8)):
            new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        new[at : at + 32] = bytes(len(new[at : at + 32]))
    elif kind == "remove":
        del new[at : at + draw.randint(1, 64)]
    elif kind == "double":
        new[at:at] = new[at : at + 64]
    else:
        new[at : at + 16] = draw.randbytes(len(new[at : at + 16]))
    return bytes(new)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is damaged
def test_a_damaged_image_is_refused_or_reads_as_pillow_reads_it():
    draw = random.Random(SEED)
    whole = [picture(form) for form in FORMATS]
    outcomes = {"refused": 0, "read": 0}
    for number in range(COUNT):
        content = mutated(whole[number % len(whole)], draw)
        try:
            with Image.open(io.BytesIO(content)) as image:
                expected = np.asarray(image.convert("RGB")) if image.mode != "I;16" else None
        except Exception:
            expected = "damaged"
        try:
            pixels = decode(content, "x")
        except DamagedImage as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert not isinstance(expected, str), f"seed {SEED}, file {number}: taken for whole"
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert expected is None or pixels.shape == expected.shape
    print(f"seed {SEED}: {outcomes}")
    assert min(outcomes.values()) > COUNT // 20


def test_a_damaged_shard_is_refused_or_has_all_its_images(tmp_path):
    draw, path = random.Random(SEED), tmp_path / "train-0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(6):
            data = picture(FORMATS[number])
            member = tarfile.TarInfo(f"class_{number % 3}/{number}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    whole = path.read_bytes()
    outcomes = {"refused": 0, "read": 0}
    for _ in range(COUNT // 5):
        path.write_bytes(mutated(whole, draw))
        try:
            files, labels, names = tar.list_images(tmp_path, "train")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        for index in range(len(files)):  # a damaged member is found when it is decoded
            assert len(files.content(index)) == files.size[index]
        assert len(labels) == len(files) == 6 and labels.max() < len(names)
    print(f"seed {SEED}: {outcomes}")
