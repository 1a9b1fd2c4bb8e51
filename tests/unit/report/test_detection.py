"""Detectors in the report: COCO's numbers, classes and pictures, as far as they are there."""

import json

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
    rows = [{"step": 2, "loss": 3.0, "loss_mask": 0.5}, {"step": 4, "eval_box_AP": 0.25}]
    result = {"name": name, "status": "done", "steps": 4, "seconds": 1.0, "metrics": metrics}
    folder = workdir / "jobs" / name
    (folder / "detections").mkdir(parents=True)
    write_record(folder / "done.json", result | {"per_class": by_class})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "detections" / "0.png")
    (folder / "detections" / "1.png").write_bytes(b"cut off")
    return result


def test_numbers_classes_and_pictures(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(runs.config("tiny_detect").to_json())
    assert detection.figures(read_run(workdir)) == []
    jobs = [detector(workdir, "detect", 0.75), detector(workdir, "detect/1", 0.25)]
    detector(workdir, "detect_scratch", 0.5)
    detector(workdir, "detect_scratch/1", 0.125)
    losses, precision, seeds, boxes, masks, classes, *pictures = detection.figures(
        read_run(workdir)
    )
    assert "detect ends at 3.000" in losses.body and "detect/1 ends at 0.250" in precision.body
    # Means 0.5 and 0.3125; gaps 0.25 and 0.125: t of one degree, 12.7062, times 0.0625.
    (row,) = [row for row in seeds.split("<tr>") if "(detect)" in row and "box AP50" in row]
    assert all(text in row for text in ("0.5000", "+0.1875", "0.7941", "0.7500, 0.2500"))
    assert "0.7500" in boxes and "0.7500" not in masks
    assert "&lt;b&gt;" in classes and "<b>" not in classes
    assert [figure.body.count("<img") for figure in pictures] == [1] * 4
    found = results(jobs)["detect_box_AP50"]
    assert found["mean"] == 0.5 and found["values"] == [0.75, 0.25]


def test_a_detector_under_way_has_its_curves(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(runs.config("tiny_detect").to_json())
    detector(workdir, "detect", 0.75)
    (workdir / "jobs" / "detect" / "done.json").unlink()
    losses, precision, *tables, _ = detection.figures(read_run(workdir))
    assert "detect ends at 3.000" in losses.body and "detect ends at 0.250" in precision.body
    # Numbers of the last evaluation, but none beside those of finished detectors.
    assert len(tables) == 2 and not any("minus fresh" in listed for listed in tables)
