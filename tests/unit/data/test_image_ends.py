"""Image files whose end is zeros, as of a download that stopped after its place was taken."""

import io

import numpy as np
import pytest
from PIL import Image

from m2mkd_jax.data.decode import DamagedImage, decode


def encoded(form, **options):
    """A picture of noise: no place of it can be guessed."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form, **options)
    return content.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20}])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_jpeg_files_without_an_end_are_damaged(share, options):
    content = encoded("jpeg", **options)
    assert decode(content + bytes(100), "x").tobytes() == decode(content, "x").tobytes()
    kept = int(share * len(content))
    with pytest.raises(DamagedImage, match=r"cannot decode the image x \("):
        decode(content[:kept] + bytes(len(content) - kept), "x")


def test_an_end_of_a_preview_is_no_end():
    """An EXIF tag holds a whole small JPEG file, before the picture."""
    preview, content = encoded("jpeg", quality=1), encoded("jpeg")
    assert preview.endswith(b"\xff\xd9")
    block = b"\xff\xe5" + (len(preview) + 2).to_bytes(2, "big") + preview
    content = content[:2] + block + content[2:]
    assert decode(content, "x").shape == (48, 64, 3)
    with pytest.raises(DamagedImage, match="it has no end"):
        decode(content[:-500] + bytes(500), "x")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_png_files_are_checked_by_their_checksums(share):
    content, kept = encoded("png"), int(share * len(encoded("png")))
    for tail in (bytes(len(content) - kept), bytes(64) + content[kept + 64 :]):
        with pytest.raises(DamagedImage, match="checksum of its pixels"):
            decode(content[:kept] + tail[: len(content) - kept], "x")
    grey = decode(content, "x")
    flipped = bytearray(content)
    flipped[kept] ^= 4
    with pytest.raises(DamagedImage):
        decode(bytes(flipped), "x")
    assert grey.shape == (48, 64, 3)
