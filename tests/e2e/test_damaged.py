"""Damaged images end a run with exit code 2 and one line, but only beyond the limit.

The weights that are trained all the same refuse data of other classes.
"""

import json

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs import run as run_data
from m2mkd_jax.parallel.mesh import make_mesh
from tests.data_files import write_folders
from tests.e2e import command, tiny


def test_too_many_damaged_images_are_one_line(tmp_path, tmp_path_factory):
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
    environment = command.environment(tmp_path_factory)
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
    check_weights_and_other_classes(tmp_path / "data", tmp_path / "borne")


def check_weights_and_other_classes(data, run):
    """Measures the run's weights, but not once a folder is renamed so that it sorts elsewhere."""
    config = tiny.get_config()
    config.data.update(name="image_folder", root=str(data), classes=3, train_images=0)
    config.data.test_images = 0
    config.init.meta, config.phases = str(run), ("eval",)
    plan = checks.validate(config)
    checks.validate_jobs(plan, data.parent / "other", make_mesh(), ["eval"])
    for split in ("train", "val"):
        (data / split / "n01").rename(data / split / "n04")
    run_data._IMAGES.clear()  # a run reads its images once
    with pytest.raises(UserError) as error:
        checks.validate_jobs(plan, data.parent / "other", make_mesh(), ["eval"])
    assert str(error.value).startswith(
        'config.data has other classes: class 0 is "n02", and "n01" in the weights in '
    )
