import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.checkpoint.files import read_json, read_record, write_json, write_record
from m2mkd_jax.errors import UserError


def test_round_trip_makes_directories_and_takes_numpy_and_jax(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"n": np.float32(0.5), "v": jnp.arange(2), "p": Path("/x"), "t": "ä"})
    assert read_json(path) == {"n": 0.5, "v": [0, 1], "p": "/x", "t": "ä"}
    assert os.listdir(path.parent) == ["b.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        write_json(path, {"new": object()})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "fsync", fail)
        write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_damaged_or_missing_json_is_the_users_error_in_one_line(tmp_path):
    path = tmp_path / "done.json"
    with pytest.raises(UserError, match=r"done\.json does not exist"):
        read_json(path)
    # What Python's own reader takes for numbers, or for the last value of a name.
    loose = (b'{"a": NaN}', b"[-Infinity]", b'{"a": 1e400}', b'{"a": 1, "a": 2}')
    for content in (b"", b'{"a": 1', b"\xff\xfe\x00", *loose):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"done\.json is damaged, not JSON") as error:
            read_json(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def test_what_is_not_finite_becomes_null_in_strict_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": float("nan"), "b": [np.inf, 1.5], "c": jnp.array([-jnp.inf, 2.0])})
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert strict == {"a": None, "b": [None, 1.5], "c": [None, 2.0]}


def test_a_record_whose_content_was_changed_is_refused(tmp_path):
    path, record = tmp_path / "done.json", {"mean": [0.485, None], "name": "pt", "n": {"1": 2}}
    write_record(path, record)
    assert read_record(path) == record
    content = path.read_bytes()
    kept = 0
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:  # a flip in white space or in the checksum's own key changes nothing
                assert {k: v for k, v in read_record(path).items() if k in record} == record
                kept += 1
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
    assert kept < len(content)
    for text in ("{}", "[]"):
        path.write_text(text)
    with pytest.raises(UserError, match="not a JSON object"):
        read_record(path)
