"""The report on runs that are whole, killed, damaged, of earlier versions."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import read_record, write_record
from m2mkd_jax.config.files import find_config, read_config
from m2mkd_jax.errors import UserError
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.report import analysis, curves, measure, overview
from m2mkd_jax.report.__main__ import main
from m2mkd_jax.report.analysis import Analysis, _keep
from m2mkd_jax.report.measure import Images
from m2mkd_jax.report.measure_families import measure_experts
from m2mkd_jax.report.records import read_run, restore_config
from tests.e2e import tiny
from tests.unit.report import runs

VOID = {"meta", "img", "br", "use", "path"}


class Page(HTMLParser):
    """Collects what a page holds, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.used, self.tags, self.attributes = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        self.tags.append(tag)
        self.attributes.append((tag, own))
        self.ids += [own["id"]] if "id" in own else []
        self.used += [v[1:] for k, v in own.items() if k == "href" and v.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def report(capsys, *directories, flags=("--no_analysis",)):
    out = directories[0].parent / "page.html"
    code = main([*map(str, directories), f"--out={out}", *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    return out.read_text(encoding="utf-8")


def test_the_page_replaces_nothing_but_an_earlier_page(tmp_path, capsys):
    run = runs.add_run(tmp_path / "run")
    (tmp_path / "notes.html").write_text("<!DOCTYPE html>mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out, words in (
        (run / "config.json", "is no report"),
        (tmp_path / "notes.html", "is no report"),
        (run / "jobs" / "new.html", f"lies in {run}, which is read"),
        (run / "jobs", "is a directory"),
    ):
        assert main([str(run), f"--out={out}", "--no_analysis"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for flags in ([], [f"--out={run / 'report' / 'b.html'}"], [f"--out={tmp_path / 'c.html'}"]):
        for _ in range(2):  # the second time over the first page
            assert main([str(run), *flags, "--no_analysis"]) == 0
    assert "report</title>" in (run / "report" / "index.html").read_text(encoding="utf-8")


def test_a_whole_run_is_shown_without_the_network(tmp_path, capsys):
    text = report(capsys, runs.add_run(tmp_path / "run"))
    page = Page(text)
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//|@import|url\(['\"]?http", text)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.used) <= set(page.ids)
    assert all(own.get("alt") for tag, own in page.attributes if tag == "img")
    charts = [own for tag, own in page.attributes if tag == "svg"]
    assert len(charts) >= 10
    assert all(own["role"] == "img" and len(own["aria-label"]) > 20 for own in charts)
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert not re.findall(r"#0000(0[0-9a-b])\b", text)  # colours are the style sheet's
    assert len(text) < 5e6
    # e2e - scratch by seed: 0.05, 0.04, 0.03; their deviation is 0.01, t(2, 0.975) = 4.3027:
    # 4.3027 * 0.01 / sqrt(3) = 0.0248.
    row = re.search(r"<tr><td>m2mKD \(e2e\)</td>.*?</tr>", text)[0]
    assert ">+0.0400<" in row and ">0.0248<" in row and ">0.9600<" in row


def test_an_unfinished_run_with_a_damaged_file_is_said_to_be_one(tmp_path, capsys):
    workdir = runs.add_run(tmp_path / "run", students=2)
    runs.add_job(workdir, "m2mkd/2")
    (workdir / "summary.json").write_bytes(b"\xff\xfe")
    text = report(capsys, workdir)
    Page(text)
    assert "summary.json is damaged" in text
    assert "m2mkd/2 (stopped before its end)" in text
    assert "e2e (not begun)" in text


def test_the_status_of_jobs_without_a_summary(tmp_path):
    workdir = runs.add_run(tmp_path / "run", students=1)
    runs.add_job(workdir, "m2mkd/1")
    run = read_run(workdir)
    statuses = {name: job.status for name, job in run.jobs.items()}
    assert statuses["m2mkd/0"] == "done"
    assert statuses["m2mkd/1"] == "interrupted"
    assert statuses["m2mkd/2"] == statuses["eval"] == "pending"
    stopped = run.jobs["m2mkd/1"]
    assert (stopped.steps, stopped.seconds) == (20, pytest.approx(2.0))


def damaged(workdir, name):
    """Damages a run; the words that a page has about it."""
    if name == "done.json":
        (workdir / "jobs" / "ft" / "done.json").write_text('{"name": "ft", ')
        return "done.json is damaged"
    if name == "config.json":
        (workdir / "config.json").write_text("[]")
        return "The jobs are those on disk"
    if name == "no config.json":
        (workdir / "config.json").unlink()
        return "config.json does not exist"
    (workdir / "summary.json").write_bytes(b"\xff\xfe")
    return "summary.json is damaged"


@pytest.mark.parametrize("name", ["done.json", "config.json", "no config.json", "summary.json"])
def test_damaged_files_are_named_and_left_out(name, tmp_path):
    workdir = runs.add_run(tmp_path / "run", seeds=1)
    words = damaged(workdir, name)
    run = read_run(workdir)
    assert words in " ".join(run.notes)
    assert run.jobs["e2e"].accuracy == 0.95


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"phases": 3, "e2e_seeds": "x"}', ""),
        ("config.json", '{"data": [1]}', "data is no group of keys"),
        ("summary.json", '{"jobs": 3}', ""),
        ("summary.json", '{"jobs": [{"name": 3}, {"x": 1}, 4]}', ""),
        ("jobs/ft/done.json", '{"metrics": {"eval_accuracy": "x"}}', "is not what a finished job"),
        ("jobs/ft/done.json", '{"metrics": {"eval_accuracy": [1]}}', "is not what a finished job"),
        ("jobs/ft/done.json", '{"metrics": {"eval_loss": {}}}', "is not what a finished job"),
        ("jobs/ft/done.json", '{"metrics": {}, "steps": NaN}', "is damaged, not JSON"),
        ("jobs/ft/done.json", '{"metrics": {}, "steps": null}', "is not what a finished job"),
        ("jobs/ft/done.json", '{"metrics": {}, "networks": [1]}', "is not what a finished job"),
        ("jobs/ft/inputs.json", '{"config": [], "needs": 3}', "inputs.json is damaged"),
        ("jobs/ft/metrics.jsonl", "[" * 100_000 + '\n{"step": "x"}\n{"step": true}\n', ""),
    ],
)
def test_whole_json_of_another_kind_is_left_out(name, text, words, tmp_path, capsys):
    workdir = runs.add_run(tmp_path / "run", seeds=1)
    (workdir / name).write_text(text)
    run = read_run(workdir)
    assert words in " ".join(run.notes)
    assert run.jobs["e2e"].accuracy == 0.95
    report(capsys, workdir)


def test_a_config_of_an_earlier_version(tmp_path):
    saved = json.loads(runs.config().to_json())
    saved["teacher"]["remat"] = True  # which is "auto", "always" or "never"
    saved["gone"] = {"key": 1}
    del saved["distillation"]
    config = restore_config(saved)
    assert config.teacher.remat == "auto"
    assert config.teacher.depths == (1, 2, 1)
    assert config.distillation.kind == "soft"
    assert config.recipes.m2mkd.modules["1"].to_dict() == {"epochs": 3, "clip": 1.0}


def test_runs_side_by_side_show_what_differs(tmp_path, capsys):
    first = runs.add_run(tmp_path / "a", seeds=1)
    second = runs.add_run(tmp_path / "b", seeds=2, log_every=7)
    text = report(capsys, first, second)
    Page(text)
    assert re.search(r"<td>log_every</td><td>5</td><td>7</td>", text)
    assert "recipes.pt.epochs" not in text


def test_what_the_analysis_has_kept_is_shown(tmp_path, capsys):
    workdir = runs.add_run(tmp_path / "run", seeds=1)
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    logits = rng.normal(size=(40, 10)) + 3 * np.eye(10)[labels]
    modules = {"agreement": 0.77, "cka": 0.66, "stitches": {"post_stitch": 5.5}}
    numbers = {
        "main": "e2e",
        "class_names": [f"<class {i}>" for i in range(10)],
        "modules": {"0": modules},
        "costs": {name: {"flops_per_step": 1e9, "memory": 2.0**20} for name in ("pt", "e2e")},
    }
    pixels = rng.integers(0, 255, (4, 8, 8, 3), np.uint8)
    links = rng.uniform(size=(2, 6, 9))
    arrays = {
        "logits/e2e": logits,
        "labels": labels,
        "samples": np.arange(4),
        "sample_images": pixels,
        "nac/links": links,
        "nac/output_links": rng.uniform(size=(3, 9)),
        "nac/signatures": np.zeros((6, 4)),
        "nac/prior": np.eye(6)[::-1],
        "nac/read_in": rng.uniform(size=(4, 3, 16)),
        "nac/read_in_images": pixels,
        "nac/use": rng.uniform(size=(10, 9)),
        "vmoe/class_load": rng.uniform(size=(10, 2, 4)),
        "vmoe/classes": np.arange(10),
    }
    _keep(workdir, Analysis(numbers, arrays))
    measured = {
        "eval_accuracy": 0.95,
        "corrupted_accuracy": 0.61,
        "corruptions": {"blur": [0.9, 0.8, 0.7, 0.5, 0.3], "noise": [0.9, 0.7, 0.6, 0.4, 0.3]},
        "reductions": [
            {"removed": "experts", "kept": 2, "flops_saved": 0.125, "eval_accuracy": 0.5}
        ],
    }
    done = {"name": "eval", "status": "done", "metrics": {"eval_accuracy": 0.95}}
    write_record(workdir / "jobs" / "eval" / "done.json", done | {"networks": {"e2e": measured}})
    text = report(capsys, workdir)
    page = Page(text)
    assert {"0.7700", "0.6600", "post_stitch 5.5", "1 MiB", "20 G", "0.6400", "12.5%"} <= set(
        re.findall(r">([^<>]+)</td>", text)
    )
    assert "<class" not in text  # names of classes are text, not tags
    assert page.tags.count("img") == 4 + 4 * 5


COSTS = {"flops_per_step": 10.0, "memory": 1.0}


def counted(run, **more):
    return {name: COSTS | more.get(name.partition("/")[0], {}) for name in run.jobs}


def test_teaching_is_charged_whole_or_what_is_left_out_is_said(tmp_path):
    """Jobs of 20 steps: pt, three of mt, ft, three of m2mkd with targets that are kept."""
    workdir = runs.add_run(tmp_path / "run", seeds=1)
    run = read_run(workdir)
    costs = counted(run, m2mkd={"flops_once": 7.0})
    assert overview.teaching_flops(run, "e2e", costs) == 8 * 200 + 3 * 7
    assert overview.teaching_flops(run, "e2e_kd", costs) == 5 * 200
    assert overview.teaching_flops(run, "e2e_scratch", costs) == 0
    assert "1.82 kFLOP" in curves.against_compute(run, costs)[0].body
    assert "Not charged" not in curves.against_compute(run, costs)[0].caption
    assert ">207<" in overview.costs(run, costs)
    # A directory may be deleted once what needed it is done: what it cost is not known then.
    shutil.rmtree(workdir / "jobs" / "mt" / "1")
    run = read_run(workdir)
    charged, given = curves.against_compute(run, costs)
    assert "1.62 kFLOP" in charged.body
    assert "does not have their steps: mt/1;" in charged.caption
    assert "Not charged" not in given.caption
    assert overview.uncharged(run, "e2e_scratch", costs) == []


def test_what_students_did_not_learn_from_is_not_charged(tmp_path):
    distillation = runs.config().distillation
    distillation.teach_from = "mt"
    run = read_run(runs.add_run(tmp_path / "run", seeds=1, distillation=distillation))
    costs = counted(run)
    assert overview.teaching_flops(run, "e2e", costs) == 7 * 200
    assert overview.teaching_flops(run, "e2e_kd", costs) == 5 * 200


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("module_2", "ft")),
        ({"teach_from": "mt"}, ("module_2", "mt/2")),
        ({"teacher_of": (0, 4, 3, 2, 1, 5)}, ("module_3", "ft")),
    ],
)
def test_a_student_is_measured_beside_the_module_it_imitated(changes, expected):
    config = read_config(find_config("nac_fashion"))
    config.distillation.update(changes)
    weights = SimpleNamespace(stage=lambda phase, name, job: (name, job))
    assert measure.imitated(weights, build_phase(config, "m2mkd/2")) == expected


def test_networks_are_compared_on_test_images_once_all_are_measured(tmp_path):
    run = runs.add_run(tmp_path / "run", seeds=2)
    assert overview.compared(read_run(run))[1] == "test images"
    config = json.loads((run / "config.json").read_text())
    config["data"]["validation"] = 0.1
    (run / "config.json").write_text(json.dumps(config))
    found, images = overview.compared(read_run(run))
    assert images == "held-out images"
    assert found["e2e_scratch"] == pytest.approx({0: 0.9, 1: 0.92})
    runs.add_job(run, "eval", 0.5, ("e2e", "e2e/1", "e2e_scratch", "e2e_scratch/1"))
    done = run / "jobs" / "eval" / "done.json"
    result = read_record(done)
    names = ["e2e", "e2e/1", "e2e_scratch", "e2e_scratch/1"]
    measured = {name: {"eval_accuracy": i / 10} for i, name in enumerate(names)}
    for networks in (measured, {**measured, "e2e/1": None}):
        networks = {name: m for name, m in networks.items() if m}
        more = {"networks": networks, "splits": dict.fromkeys(networks, "test")}
        write_record(done, result | more)
        found, images = overview.compared(read_run(run))
        if len(networks) == 4:
            assert images == "test images"
            assert found == {"e2e": {0: 0.0, 1: 0.1}, "e2e_scratch": {0: 0.2, 1: 0.3}}
        else:  # never some of each
            assert images == "held-out images" and found["e2e"][1] == 0.96


def test_networks_are_not_run_on_images_of_other_classes(tmp_path, monkeypatch):
    """A class folder that was renamed since would give other accuracies without a word."""
    own = Images(np.zeros((2, 8, 8, 3)), np.zeros(2, int), ("1", "10", "2"), ConfigDict())
    recorded = SimpleNamespace(path="w", class_names=("1", "2", "10"))
    monkeypatch.setattr(analysis, "test_images", lambda data, count: own)
    monkeypatch.setattr(analysis, "read_recorded", lambda *_: recorded)
    config, run = tiny.get_config(), SimpleNamespace(path=tmp_path)
    with pytest.raises(UserError, match='the same classes in another order: class 1 is "10"'):
        analysis._images_of(run, config, "e2e", 5)
    recorded.class_names = own.class_names
    assert analysis._images_of(run, config, "e2e", 5) is own


def test_every_image_of_a_class_counts_equally_in_its_load():
    """Six images go to experts 0 to 5, one each; four of them count."""

    @dataclasses.dataclass
    class Router:
        batch: int = 6

        def outputs(self, x):
            return x, {"load": np.eye(8)[x[:, 0, 0, 0].astype(int)].mean(0)[None]}

    pixels = np.zeros((6, 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0] = range(6)
    data = ConfigDict({"mean": (0.0,) * 3, "std": (1 / 255,) * 3})
    images = Images(pixels, np.zeros(6, int), ("0",), data)
    load = measure_experts([Router()], images)["class_load"]
    np.testing.assert_allclose(load, [[[0.25] * 4 + [0] * 4]])


def test_kept_numbers_of_an_earlier_state_are_said_to_be(tmp_path):
    workdir = runs.add_run(tmp_path / "run", seeds=1)
    key = analysis._key(read_run(workdir), 300)
    _keep(workdir, Analysis({"key": key, "images_at_most": 300}))
    assert analysis.kept_analysis(read_run(workdir)).notes == []
    shutil.rmtree(workdir / "jobs" / "e2e")
    (note,) = analysis.kept_analysis(read_run(workdir)).notes
    assert "earlier state" in note


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nowhere"], "nowhere is not a directory"),
        (["."], "neither config.json nor jobs/"),
        ([".", "--images=0"], "--images is 0"),
        ([".", "--imgs=2"], "--imgs"),
    ],
)
def test_wrong_input_is_one_line(given, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
