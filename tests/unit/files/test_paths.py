"""What the functions on paths say when the system refuses."""

import errno
import os
import resource
import shutil

import numpy as np
import pytest

from m2mkd_jax.data.kept import KeptViews, Row, ViewWriter
from m2mkd_jax.files.lines import Lines
from m2mkd_jax.files.paths import remove_tree, write_bytes


def test_what_cannot_be_removed_is_told_unless_it_may_stay(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()

    def refuse(path, ignore_errors=False, **_):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with pytest.raises(PermissionError):
            remove_tree(tmp_path / "a")
        remove_tree(tmp_path / "a", if_possible=True)
    assert (tmp_path / "a").is_dir()
    (tmp_path / "link").symlink_to("a")
    for name in ("link", "none", "a"):
        remove_tree(tmp_path / name)
        assert not (tmp_path / name).exists()
        assert (tmp_path / "a").exists() == (name != "a")


def test_a_full_disk_names_the_file_that_is_written(tmp_path):
    """Python's error of a write to an open file has no name."""
    views = KeptViews(tmp_path / "views", 99, {"label": Row((), "int32")})
    views.begin({})
    writer, lines = ViewWriter(views, 0, 0), Lines(tmp_path / "lines")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        writer.append({"label": np.zeros(99, np.int32)})
        written = {
            tmp_path / "file": lambda: write_bytes(tmp_path / "file", bytes(200)),
            tmp_path / "lines": lambda: lines.add("a" * 200),
            tmp_path / "views" / "0.unfinished" / "label": writer.finish,
        }
        for path, write in written.items():
            with pytest.raises(OSError) as refused:
                write()
            assert refused.value.filename == str(path)
        with pytest.raises(OSError) as refused:  # what could not be written waits
            lines.close()
        assert refused.value.filename == str(tmp_path / "lines")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.close()
