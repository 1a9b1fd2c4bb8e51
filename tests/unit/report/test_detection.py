"""Detectors in the report: COCO's numbers, classes and pictures, as far as they are there."""

import numpy as np
from PIL import Image

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.evaluate.coco import NUMBERS
from m2mkd_jax.jobs.summary import results
from m2mkd_jax.report import detection
from m2mkd_jax.report.records import read_run
from tests.unit.report import runs


def detector(workdir, name, ap50):
    metrics = {f"eval_{t}_{n}": 0.25 for t in ("box", "mask") for n in NUMBERS}
    metrics |= {"eval_box_AP50": ap50, "eval_box_APl": -1.0}
    by_class = {title: {"cat": 0.5, "<b>": -1.0} for title in ("box", "mask")}
    result = {"name": name, "status": "done", "steps": 4, "seconds": 1.0, "metrics": metrics}
    folder = workdir / "jobs" / name
    (folder / "detections").mkdir(parents=True)
    write_record(folder / "done.json", result | {"per_class": by_class})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "detections" / "0.png")
    (folder / "detections" / "1.png").write_bytes(b"cut off")
    return result


def test_numbers_classes_and_pictures(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(runs.config("tiny_detect").to_json())
    assert detection.figures(read_run(workdir)) == []
    jobs = [detector(workdir, "detect", 0.75), detector(workdir, "detect/1", 0.25)]
    boxes, masks, classes, *pictures = detection.figures(read_run(workdir))
    assert "0.7500" in boxes and "0.7500" not in masks
    assert "&lt;b&gt;" in classes and "<b>" not in classes
    assert [figure.body.count("<img") for figure in pictures] == [1, 1]
    found = results(jobs)["detect_box_AP50"]
    assert found["mean"] == 0.5 and found["values"] == [0.75, 0.25]
