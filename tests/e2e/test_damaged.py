"""Damaged images end a run with exit code 2 and one line, but only beyond the limit."""

import json

from tests.data_files import write_folders
from tests.e2e import command


def test_too_many_damaged_images_are_one_line(tmp_path):
    write_folders(tmp_path / "data", per_class=4)
    bad = tmp_path / "data" / "train" / "n02" / "n02_1.JPEG"
    bad.write_bytes(b"")
    flags = (
        "--only=pt",
        "--config.data.name=image_folder",
        f"--config.data.root={tmp_path / 'data'}",
        "--config.data.classes=3",
        "--config.data.train_images=0",
        "--config.data.test_images=0",
        "--config.recipes.pt.batch=4",
        "--config.recipes.pt.epochs=1",
    )
    environment = command.environment(str(tmp_path / "xla"))
    result = command.run("tiny", environment, tmp_path / "run", *flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "more than 0.10% of 12 (data.damaged_share)" in result.stderr
    assert str(bad) in result.stderr
    (tmp_path / "data" / "val" / "n01" / "n01_1.JPEG").write_bytes(b"")
    borne = command.run(
        "tiny", environment, tmp_path / "borne", *flags, "--config.data.damaged_share=0.17"
    )
    assert borne.returncode == 0, borne.stderr
    assert "n02_2.JPEG stands in for it (1 of at most 2)" in borne.stderr
    assert "it is not counted (1 of at most 1)" in borne.stderr
    done = json.loads((tmp_path / "borne" / "jobs" / "pt" / "done.json").read_text())
    assert (done["metrics"]["eval_images"], done["metrics"]["eval_damaged"]) == (5, 1)
