"""Paths in a bucket: what a run does with files, and what a checkpoint promises, there too."""

import io
import json
import sys
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from m2mkd_jax.checkpoint.files import read_record, replace_file, write_json, write_record
from m2mkd_jax.checkpoint.steps import latest_step
from m2mkd_jax.checkpoint.store import RunCheckpoints, load_weights, save_weights
from m2mkd_jax.data import layouts
from m2mkd_jax.errors import UserError
from m2mkd_jax.files import lines, paths
from m2mkd_jax.jobs.log import Log
from tests.bucket_server import server_of_this_process


@pytest.fixture
def root(tmp_path, monkeypatch, request):
    """A directory in the bucket of a server on loopback."""
    server = server_of_this_process()
    monkeypatch.setenv("M2MKD_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    yield paths.as_path(f"gs://bucket/{request.node.name}")
    assert not (tmp_path / "gs:").exists()  # a path that lost its scheme
    server.objects.buckets["bucket"].clear()


def objects() -> dict:
    return server_of_this_process().objects.buckets["bucket"]


def damage(name: str, change) -> None:
    held = objects()
    held[name] = (change(held[name][0]), held[name][1])


def test_files_are_written_whole_listed_moved_and_deleted(root):
    write_json(root / "a" / "x.json", {"n": 1})
    paths.write_bytes(root / "a" / "b" / "y", b"\r\n\0y\r\n")
    replace_file(root / "page.html", lambda tmp: tmp.write_text("page"))
    assert json.loads((root / "a" / "x.json").read_bytes()) == {"n": 1}
    assert paths.read_part(root / "a" / "b" / "y", 2, 2) == b"\0y"
    assert paths.file_names(root) == ["a/b/y", "a/x.json", "page.html"]
    paths.move_tree(root / "a", root / "a.damaged")
    assert paths.file_names(root) == ["a.damaged/b/y", "a.damaged/x.json", "page.html"]
    paths.remove_tree(root / "a.damaged")
    paths.remove_tree(root / "a.damaged")  # which is gone already
    assert paths.file_names(root) == ["page.html"]


def test_a_record_that_was_changed_is_refused(root):
    write_record(root / "done.json", {"steps": 5})
    assert read_record(root / "done.json") == {"steps": 5}
    damage(f"{root.name}/done.json", lambda content: content.replace(b"5", b"6", 1))
    with pytest.raises(UserError, match="its checksum is another"):
        read_record(root / "done.json")
    with pytest.raises(UserError, match="does not exist"):
        read_record(root / "none.json")


def test_a_busy_bucket_is_asked_again(root):
    server_of_this_process().objects.failing = 1
    write_json(root / "x.json", {"n": 1})
    assert server_of_this_process().objects.failing == 0
    assert (root / "x.json").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gs://nowhere/run", "there is no such bucket; make it first"),
        ("gs://forbidden/run", "the bucket cannot be used .Forbidden"),
        ("gs:///run", "names no bucket"),
        ("s3://bucket/run", "s3:// cannot hold a run"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(given, said):
    server_of_this_process()
    with pytest.raises(UserError, match=said) as raised:
        paths.check_bucket(paths.as_path(given))
    assert "\n" not in str(raised.value)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    paths.prepare.cache_clear()
    with pytest.raises(
        UserError, match=r"needs the package gcsfs: pip install 'm2mkd_jax\[buckets"
    ):
        paths.as_path("gs://bucket/run")


def test_lines_are_uploaded_before_a_state_is_saved_and_after_a_while(root, monkeypatch):
    path = root / "metrics.jsonl"
    log = Log(path, "pt", 9, 0)
    log({"step": 1, "loss": 1.0})
    assert path.read_bytes() == b""
    log.upload()
    assert len(path.read_bytes().splitlines()) == 1
    monkeypatch.setattr(lines, "UPLOAD_SECONDS", 0.0)
    for step in (2, 3):
        log({"step": step, "loss": 1.0})
    assert len(path.read_bytes().splitlines()) == 3
    # As after a kill: the run goes on from the checkpoint of step 2.
    log = Log(path, "pt", 9, 2)
    log({"step": 3, "loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3]


def state(step: int) -> dict:
    return {"step": np.int32(step), "params": {"w": np.full((4, 3), step, np.float32)}}


def abstract() -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), state(0))


def test_a_damaged_or_unfinished_checkpoint_is_not_used(root, tmp_path, capsys):
    checkpoints = RunCheckpoints(root / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"eval_accuracy": 1 / step})
    checkpoints.close()
    where = f"{root.name}/checkpoints"
    assert latest_step(root / "checkpoints") == 3
    del objects()[f"{where}/3/commit_success.txt"]  # killed before the last object
    assert latest_step(root / "checkpoints") == 2
    data = next(name for name in objects() if name.startswith(f"{where}/2/state/d/"))
    damage(data, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    checkpoints = RunCheckpoints(root / "checkpoints")
    step, restored = checkpoints.restore_latest(abstract())
    assert step == 1 and (restored["params"]["w"] == 1).all()
    assert "has another checksum" in capsys.readouterr().err
    assert checkpoints.save(2, state(2))  # the damaged one is out of the way
    checkpoints.close()
    assert not any(name.startswith(f"{where}/3/") for name in objects())
    for name, (content, _) in objects().items():  # copied out of the bucket, the run goes on
        paths.write_bytes(tmp_path / name, content)
    copied = RunCheckpoints(tmp_path / where)
    assert copied.restore_latest(abstract())[0] == 2
    copied.close()


def test_weights_are_there_whole_or_not_at_all(root):
    tree = {"params": {"w": np.arange(6.0, dtype=np.float32)}}
    save_weights(root / "weights", {"m": tree}, {"job": "pt"})
    save_weights(root / "weights", {"m": tree}, {"job": "ft"})
    loaded, description = load_weights(root / "weights")
    assert description == {"job": "ft"}
    np.testing.assert_array_equal(loaded["m"]["params"]["w"], tree["params"]["w"])

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_weights(root / "weights", {"m": tree}, killed)
    with pytest.raises(UserError, match="holds no finished weights"):
        load_weights(root / "weights")
    save_weights(root / "weights", {"m": tree}, {"job": "ft"})  # over the leftovers
    paths.write_bytes(root / "weights" / "notes.txt", b"mine")
    with pytest.raises(UserError, match="holds notes"):
        save_weights(root / "weights", {"m": tree}, {"job": "ft"})
    assert (root / "weights" / "notes.txt").read_bytes() == b"mine"


def test_shards_are_read_in_place(root, tmp_path):
    data = root / "images"
    for split in ("train", "val"):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for i, name in enumerate(("cat/a.png", "dog/b.png")):
                picture = io.BytesIO()
                Image.new("RGB", (4, 4), (100 * i, 0, 0)).save(picture, "png")
                member = tarfile.TarInfo(name)
                member.size = len(picture.getvalue())
                tar.addfile(member, io.BytesIO(picture.getvalue()))
        paths.write_bytes(data / f"{split}-0.tar", content.getvalue())
    assert layouts.require(str(data), ["shards", "folders"]) == "shards"
    for _ in range(2):  # the second time with the members that are kept
        source = layouts.open_split(str(data), "shards", "train")
        assert source.class_names == ("cat", "dog")
        assert [int(source.read(i)[0, 0, 0]) for i in range(2)] == [0, 100]
    assert list((tmp_path / "scratch").rglob("*.members.json"))
    with pytest.raises(UserError, match="from a bucket tar files"):
        layouts.require(str(root / "other"), ["shards"])
