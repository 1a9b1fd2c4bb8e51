"""Rows on disk: equal to what was written, never half a view, never from other inputs."""

import errno
import os
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest

from m2mkd_jax.data.kept import KeptBatches, KeptViews, Row, ViewWriter
from m2mkd_jax.errors import UserError

IMAGES = 7
ARRAYS = {"tokens": Row((2, 3), "bfloat16"), "label": Row((), "int32")}
INPUTS = {"stages": {"meta_0": "abc"}, "seed": 0}


@pytest.fixture
def kept(tmp_path):
    views = KeptViews(tmp_path / "views", IMAGES, ARRAYS)
    assert not views.begin(INPUTS)
    return views


def rows_of(view):
    rng = np.random.default_rng(view)
    return {
        "tokens": rng.normal(size=(IMAGES, 2, 3)).astype(ml_dtypes.bfloat16),
        "label": rng.integers(0, 9, IMAGES, np.int32),
    }


def write(kept, view, start=0, stop=IMAGES + 2, batch=3):
    """Writes rows in batches, the last one with copies of the last image, as the loader does."""
    writer, rows = ViewWriter(kept, view, start), rows_of(view)
    for first in range(start, stop, batch):
        chosen = np.minimum(np.arange(first, first + batch), IMAGES - 1)
        writer.append({name: array[chosen] for name, array in rows.items()})
    return writer


def test_rows_are_what_was_written(kept):
    for view in (0, 1):
        write(kept, view).finish()
    indices = np.array([6, 0, 3, 3])
    for view in (1, 0):
        found = pickle.loads(pickle.dumps(kept)).rows(view, indices)
        for name, array in rows_of(view).items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array[indices])
    assert kept.bytes == IMAGES * (6 * 2 + 4 + 2 * 4)  # with two checksums


def test_an_interrupted_view_is_not_whole_and_goes_on(kept, monkeypatch):
    monkeypatch.setattr("m2mkd_jax.data.kept._SAFE_SECONDS", -1.0)
    write(kept, 0, stop=6).close()
    assert kept.safe_rows(0) == 6 and not kept.is_whole(0)
    # A kill after more bytes were written than are safe: they are written again.
    with (kept.directory / "0.unfinished" / "tokens").open("ab") as file:
        file.write(b"half a row")
    write(kept, 0, start=kept.safe_rows(0)).finish()
    assert kept.is_whole(0)
    np.testing.assert_array_equal(kept.rows(0, np.arange(IMAGES))["tokens"], rows_of(0)["tokens"])


def test_a_view_without_a_safe_point_starts_again(kept):
    write(kept, 0, stop=6).close()
    assert kept.safe_rows(0) == 0 and not kept.is_whole(0)


def test_a_view_with_a_short_file_is_not_whole(kept):
    write(kept, 0).finish()
    file = kept.directory / "0" / "tokens"
    file.write_bytes(file.read_bytes()[:-1])
    assert not kept.is_whole(0)
    write(kept, 0).finish()
    assert kept.is_whole(0)


@pytest.mark.parametrize("name", ["tokens", "label", "tokens.crc32"])
def test_a_changed_bit_is_told(kept, name):
    write(kept, 0).finish()
    file = kept.directory / "0" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # of image 3
    file.write_bytes(content)
    assert kept.is_whole(0)
    kept.rows(0, np.array([0, 1, 6]))
    with pytest.raises(UserError, match=rf"{name[:5]}\w* is damaged: .* of image 3 .*; delete "):
        kept.rows(0, np.array([1, 3]))


def test_rows_of_another_image_or_view_are_told(kept):
    for view in (0, 1):
        write(kept, view).finish()
    one, two = (kept.directory / view for view in "01")
    row = ARRAYS["tokens"].bytes
    whole = (one / "tokens").read_bytes()
    (one / "tokens").write_bytes(whole[row : 2 * row] + whole[:row] + whole[2 * row :])
    (one / "tokens.crc32").write_bytes((one / "tokens.crc32").read_bytes())
    with pytest.raises(UserError, match="of image 0 was changed"):
        kept.rows(0, np.array([0]))
    for file in one.iterdir():
        (two / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="of image 4 was changed"):
        kept.rows(1, np.array([4]))


def test_a_view_that_is_cut_off_while_it_is_read_is_told(kept):
    write(kept, 0).finish()
    (kept.directory / "0" / "label").write_bytes(b"")
    with pytest.raises(UserError, match="label is damaged"):
        kept.rows(0, np.array([0]))
    (kept.directory / "0" / "label").unlink()
    with pytest.raises(UserError, match="label is damaged"):
        kept.rows(0, np.array([0]))


def test_rows_that_are_safe_are_no_more_than_are_there(kept, monkeypatch):
    monkeypatch.setattr("m2mkd_jax.data.kept._SAFE_SECONDS", -1.0)
    write(kept, 0, stop=6).close()
    with (kept.directory / "0.unfinished" / "tokens").open("r+b") as file:
        file.truncate(4 * ARRAYS["tokens"].bytes + 1)
    assert kept.safe_rows(0) == 4
    (kept.directory / "0.unfinished" / "rows").write_text("-3")
    assert kept.safe_rows(0) == 0


def test_views_of_other_inputs_are_dropped(kept):
    write(kept, 0).finish()
    assert not kept.begin(INPUTS) and kept.is_whole(0)
    assert kept.begin({**INPUTS, "stages": {"meta_0": "abd"}}) and not kept.is_whole(0)
    write(kept, 0).finish()
    wider = KeptViews(kept.directory, IMAGES, {**ARRAYS, "tokens": Row((2, 4), "bfloat16")})
    assert wider.begin({**INPUTS, "stages": {"meta_0": "abd"}})


def test_views_of_other_inputs_are_dropped_on_another_disk_too(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "views").symlink_to(tmp_path / "disk")
    views = KeptViews(tmp_path / "views", IMAGES, ARRAYS)
    assert not views.begin(INPUTS)
    write(views, 0).finish()
    assert views.begin({**INPUTS, "seed": 1}) and not views.is_whole(0)
    write(views, 0).finish()
    assert views.is_whole(0) and (tmp_path / "views").is_symlink()


def test_views_that_cannot_be_dropped_are_told(kept, monkeypatch):
    """They would be trained on as if they were of the new inputs."""
    write(kept, 0).finish()

    def refuse(path, ignore_errors=False, **_):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for _ in range(2):
        with pytest.raises(PermissionError):
            kept.begin({**INPUTS, "seed": 1})


def test_batches_name_arrays_by_job(kept):
    write(kept, 0).finish()
    batch = KeptBatches({"m2mkd/1": kept}).rows(0, np.array([2, 1]))
    assert batch.keys() == {"tokens/m2mkd/1", "label"}
