"""Numbers of the report, and what its captions say of them."""

import re
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import base
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.plan import stale_after
from m2mkd_jax.report import curves, measure, modules, overview
from m2mkd_jax.report.analysis import Analysis
from m2mkd_jax.report.measure import Images, LoadedStage
from m2mkd_jax.report.measure_families import measure_experts
from m2mkd_jax.report.records import JobRecord, RunRecord, read_run
from tests.data_files import write_folders
from tests.unit.report import runs


@pytest.mark.parametrize(
    ("given", "charged", "left_out"),
    [
        ({"students": "w"}, 0, ["m2mkd (config.init.students)"]),
        ({"network": "w"}, 0, ["e2e (config.init.network)"]),
        ({"teacher": "w"}, 4, ["ft (config.init.teacher)"]),
        ({"meta": "w", "teacher": "w"}, 3, ["pt (config.init.meta)", "ft (config.init.teacher)"]),
        ({"modules": "w"}, 5, ["mt (config.init.modules)"]),
    ],
)
def test_what_given_weights_stand_on_is_not_charged(given, charged, left_out, tmp_path):
    """Of pt, three mt, ft, three m2mkd, which the directory has for other networks."""
    init = runs.config().init
    init.update(given)
    run = read_run(runs.add_run(tmp_path / "run", seeds=1, init=init))
    costs = {name: {"flops_per_step": 10.0} for name in run.jobs}
    assert overview.teaching_flops(run, "e2e", costs) == charged * 200
    assert overview.uncharged(run, "e2e", costs) == left_out
    assert overview.teaching_flops(run, "e2e_scratch", costs) == 0
    of_kd = {"teacher": 0, "modules": 1}
    expected = next((of_kd[name] for name in of_kd if name in given), 5) * 200
    assert overview.teaching_flops(run, "e2e_kd", costs) == expected


def test_each_of_ten_modules_has_a_name_beside_its_curve(tmp_path):
    entry = {"step": 5, "loss": 1.0, "accuracy": 0.5}
    jobs = {
        name: JobRecord(name, "done", entries=(entry,))
        for name in [*(f"m2mkd/{i}" for i in range(10)), "e2e", "e2e/1"]
    }
    figures = curves.learning_curves(RunRecord(tmp_path, {}, jobs))
    students = next(f for f in figures if f.title == "Training loss, students in the meta model")
    assert {f"m2mkd/{i}" for i in range(10)} <= set(
        re.findall(r">(m2mkd/\d)</text>", students.body)
    )
    assert "modules from number 8 on" in students.caption
    networks = next(f for f in figures if f.title == "Training loss, end to end")
    assert networks.body.count(">m2mKD</text>") == 1 and "Paler" in networks.caption


def test_the_most_used_quarter_is_of_all_mediators():
    """A quarter of 256 that is read three times as much as the others gets half of what is read."""
    use = np.ones((40, 260), np.float32)
    use[:, 4:68] = 3
    use[35] = 0  # a class without images
    figure = modules._use(use, 256, [str(i) for i in range(40)])
    assert "quarter gets 50%" in figure.body
    words = "the first 30 of 39 classes and the 64 most used of 256 mediators"
    assert words in figure.caption
    assert "Shown" not in modules._use(use[:3, :20], 16, ["a", "b", "c"]).caption


def test_every_image_counts_equally_in_a_load_whatever_the_batch_of_evaluation(monkeypatch):
    """16 images, of which 10 go to expert 0 and 6 to expert 1."""

    def route(graph, params, fixed, x):
        return x, {"load": np.eye(2)[x[:, 0, 0, 0].astype(int)].mean(0)[None]}

    monkeypatch.setattr(measure, "_RUN", route)
    pixels = np.zeros((16, 1, 1, 3), np.uint8)
    pixels[10:] = 1
    data = ConfigDict({"mean": (0.0,) * 3, "std": (1 / 255,) * 3})
    images = Images(pixels, np.zeros(16, int), ("0",), data)
    load = measure_experts([LoadedStage(None, {}, {}, 10)], images)["class_load"]
    np.testing.assert_allclose(load, [[[10 / 16, 6 / 16]]])


def folders(root, **changes):
    data = base().data
    data.update({"name": "image_folder", "root": str(root), "image_size": 16, "classes": 3})
    data.update(changes)
    return data


def test_images_say_which_they_are(tmp_path):
    write_folders(tmp_path)
    assert measure.test_images(folders(tmp_path), 4).split == "test"
    held_out = measure.test_images(folders(tmp_path / "train", validation=0.4), 4)
    assert (held_out.split, len(held_out.labels)) == ("held-out", 3)


def test_images_that_are_all_damaged_are_refused(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "val" / "n01" / "n01_0.JPEG").write_bytes(b"no image")
    assert len(measure.test_images(folders(tmp_path), 2).labels) == 1
    with pytest.raises(UserError, match=r"none of the 1 test images .* raise --images"):
        measure.test_images(folders(tmp_path), 1)


def test_the_images_of_agreement_and_of_scores_may_differ(tmp_path):
    """The teacher's data has no test images, the network's has."""
    run = read_run(runs.add_run(tmp_path / "run", seeds=1))
    found = Analysis({"modules_split": "held-out", "split": "test", "modules": {}})
    table = modules.health(run, found)[1]
    assert "held-out images that both put" in table and "test images" not in table


def test_copies_that_lie_beside_jobs_are_no_jobs(tmp_path):
    workdir = runs.add_run(tmp_path / "run", seeds=1)
    for name in ("m2mkd/0.bak", "m2mkd/.0.copy", "e2e/old", "m2mkd/\u0661"):
        shutil.copytree(workdir / "jobs" / "m2mkd" / "0", workdir / "jobs" / name)
    (workdir / "summary.json").write_text('{"jobs": [{"name": "e2e/best", "status": "done"}]}')
    run = read_run(workdir)
    assert [job.name for job in run.of_phase("m2mkd")] == ["m2mkd/0", "m2mkd/1", "m2mkd/2"]
    assert [job.name for job in run.of_phase("e2e")] == ["e2e"]
    assert curves.learning_curves(run) and overview.results(run)
    # Nor are they dropped with the jobs whose copies they are.
    assert set(stale_after(workdir, ["ft"])) == {"ft", "e2e", *(f"m2mkd/{i}" for i in range(3))}


def test_a_gap_says_of_how_many_seeds_it_is(tmp_path):
    workdir = runs.add_run(tmp_path / "run", seeds=3)
    assert "seeds)" not in overview.results(read_run(workdir))[1]
    shutil.rmtree(workdir / "jobs" / "e2e_scratch" / "2")
    # Pairs of 0.95 - 0.9 and 0.96 - 0.92.
    assert ">+0.0450 (2 of 3 seeds)<" in overview.results(read_run(workdir))[1]
