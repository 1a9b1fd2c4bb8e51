"""Text files beside images: lists of classes, tables of annotations. UTF-8, whatever the locale."""

from __future__ import annotations

import os

from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import as_path


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: it is in another encoding.
    """
    content = as_path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}): "
            "convert it, for example with iconv"
        ) from None


def readable(name: str) -> str:
    """A file's name as UTF-8 text; what is not UTF-8 in it stays escaped as os.listdir gives it."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")
