"""What a command must not write over: its inputs, and what is there already."""

import os

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.files.outputs import check_file, check_new_directory, refuse_inputs


def test_inputs_and_what_lies_in_them_are_not_written_over(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    (folder / "inner").mkdir(parents=True)
    file.touch()
    (tmp_path / "link").symlink_to(folder)
    inputs = ["", "hf://owner/name", str(file), str(folder)]
    for path, words in (
        (file, "OUT: it is read"),
        (folder, "OUT: it is read"),
        (folder / "x", "OUT lies in"),
        (folder / "inner" / ".." / "x", "OUT lies in"),
        (tmp_path / "link" / "inner" / "x", "OUT lies in"),
    ):
        with pytest.raises(UserError, match=words):
            refuse_inputs(path, inputs, "OUT")
    for path in (tmp_path / "new", tmp_path, tmp_path / "folder2" / "x"):
        refuse_inputs(path, inputs, "OUT")
    (folder / "jobs").mkdir()  # a run's
    refuse_inputs(folder / "table.csv", inputs, "OUT")
    for name in ("config.json", "summary.json", "jobs/table.csv"):
        with pytest.raises(UserError, match="OUT lies in"):
            refuse_inputs(folder / name, inputs, "OUT")
    with pytest.raises(UserError, match="lies in gs://bucket/run, which is read"):
        refuse_inputs("gs://bucket/run/jobs/x", ["gs://bucket/run"], "OUT")
    refuse_inputs("gs://bucket/run2", ["gs://bucket/run"], "OUT")


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    check_file(tmp_path / "file", "OUT")
    check_file(tmp_path / "new" / "inner" / "file", "OUT")
    check_new_directory(tmp_path / "new", "OUT")
    for check, name, words in (
        (check_file, "", "OUT is a directory"),
        (check_file, "file/x", "file is not a directory"),
        (check_new_directory, "file/x/y", "file is not a directory"),
        (check_new_directory, "file", "OUT is there already"),
        (check_new_directory, "gone", "OUT is there already"),
        (check_file, "gone/x", "gone is not a directory"),
    ):
        with pytest.raises(UserError, match=words):
            check(tmp_path / name, "OUT")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_places(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="is read-only"):
        check_file(tmp_path / "x", "OUT")
    tmp_path.chmod(0o700)
