"""What wandb and trackio have kept, read back: metrics.jsonl, with every entry once."""

import json
import sqlite3
import struct
import sys
import time

import pytest

from tests.unit.jobs.test_log import entry, expected, log

BLOCK = 1 << 15  # of a .wandb file


def records(path):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, place, parts = path.read_bytes(), 7, []
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def in_wandb(directory):
    """The rows that a job's runs have: (step, {name: value})."""
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    runs = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in runs}) == 1  # one id
    for path in runs:
        for text in records(path):
            history = record.FromString(text).history
            if history.item:
                items = {i.key or "/".join(i.nested_key): i.value_json for i in history.item}
                yield history.step.num, {name: json.loads(value) for name, value in items.items()}


def in_trackio(directory):
    run = json.loads((directory / "trackio.json").read_text())["id"]
    (base,) = (directory.parent / "trackio").glob("*.db")
    with sqlite3.connect(base) as opened:
        rows = opened.execute(
            "select step, metrics from metrics where run_name = ? order by id", (f"e2e-{run}",)
        )
        return [(step, json.loads(text)) for step, text in rows]


def read_back(name, directory):
    """{metric: [(step, value)]} of the rows that a service has."""
    found = {}
    for step, row in {"wandb": in_wandb, "trackio": in_trackio}[name](directory):
        for key, value in row.items():
            if not key.startswith("_"):
                found.setdefault(key, []).append((step, value))
    return found


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_read_back_is_metrics_jsonl(name, tmp_path, monkeypatch):
    # trackio looks at its directory when it is imported.
    for module in [m for m in sys.modules if m.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pytest.importorskip(name)
    # Two runs of one name, at the same time.
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    logs = [log(directory, names=(name,)) for directory in directories]
    for step in (5, 10, 15):
        for number, own in enumerate(logs):
            own(entry(step, accuracy=number / step))
    logs[0]({"step": 15, "eval_loss": 0.5, "eval_accuracy": 0.9})
    for own in logs:
        own.close()
    second = log(directories[0], start=10, names=(name,))
    for step in (15, 20):
        second(entry(step, accuracy=0 / step))
        second({"step": step, "eval_loss": 0.5, "eval_accuracy": 0.9})
    second.close()
    for directory in directories:
        wanted, deadline = expected(directory), time.monotonic() + 60
        # wandb's own process may write its last rows after it has been closed.
        while (found := read_back(name, directory)) != wanted and time.monotonic() < deadline:
            time.sleep(1)
        assert found == wanted
