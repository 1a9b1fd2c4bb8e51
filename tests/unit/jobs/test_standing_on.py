"""What jobs stand on: other weights in the place of those are noticed, by what is in them."""

import json
import shutil

import numpy as np
import pytest
from etils import epath

from m2mkd_jax.checkpoint.files import read_record, sealed, write_record
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import pipeline, rounds
from m2mkd_jax.jobs.changes import (
    check_finished,
    check_not_running,
    check_same_config,
    jobs_to_extend,
)
from m2mkd_jax.jobs.checks import check_weights
from m2mkd_jax.jobs.data_checks import check_same_images, image_facts
from m2mkd_jax.jobs.few_shot import _finished
from m2mkd_jax.jobs.finished import run_of
from m2mkd_jax.jobs.locks import acquire
from m2mkd_jax.jobs.plan import (
    Plan,
    inputs_path,
    is_current,
    jobs_to_run,
    read_inputs,
    stale_after,
    standing_on,
    write_inputs,
)
from m2mkd_jax.jobs.summary import summarise
from m2mkd_jax.phases.weight_digests import digest
from m2mkd_jax.phases.weight_files import weights_directory
from m2mkd_jax.report.records import read_run
from tests.e2e import tiny, tiny_vmoe


def leave_weights(workdir, name, value):
    """Weights of a job, told apart by one number."""
    save_weights(
        workdir / "jobs" / name / "weights", {"all": {"w": np.full(3, value)}}, {"job": name}
    )


def finish(plan, workdir, names, value=1.0):
    """Leaves what finished jobs leave, with small weights."""
    for name in names:
        job = plan.job(name)
        write_inputs(workdir, job, weights=standing_on(plan.config, workdir, job))
        result = {"name": name, "status": "done", "steps": 1, "seconds": 1.0}
        result |= {"metrics": {"eval_accuracy": value / 10}}
        if name == "eval":
            result["networks"] = {n: {"eval_accuracy": value / 10} for n in job.needs}
        else:
            leave_weights(workdir, name, value)
        write_record(workdir / "jobs" / name / "done.json", result)


def made(config, **values):
    for key, value in values.items():
        config[key] = value
    return config


def test_given_weights_that_have_changed_under_their_path_are_refused(tmp_path):
    other, workdir = tmp_path / "other", tmp_path / "run"
    leave_weights(other, "pt", 1.0)
    config = tiny.get_config()
    config.init.meta = str(other)
    plan = Plan(config)
    finish(plan, workdir, ["mt/0"])
    check_same_config(plan, workdir, plan.names)
    leave_weights(other, "pt", 2.0)
    with pytest.raises(UserError, match=r"mt/0 stands on other weights of pt than") as error:
        check_same_config(plan, workdir, plan.names)
    assert "config.init.meta has now" in str(error.value) and "\n" not in str(error.value)
    check_same_config(plan, workdir, plan.names, stale=["mt/0"])
    shutil.rmtree(other)  # gone is not changed: what is done is done
    check_same_config(plan, workdir, plan.names)


def test_given_files_are_told_apart_by_their_bytes(tmp_path):
    file = tmp_path / "meta.safetensors"
    file.write_bytes(b"a" * 8)
    one = digest(file)
    file.write_bytes(b"b" * 8)
    other = digest(file)
    shutil.copy(file, tmp_path / "again.safetensors")
    assert one != other == digest(tmp_path / "again.safetensors")


def test_a_deleted_job_that_is_made_again_otherwise_is_noticed(tmp_path):
    """As one that was extended, and is then trained at once."""
    plan = Plan(tiny.get_config())
    finish(plan, tmp_path, ["pt", "mt/0", "mt/1"])
    shutil.rmtree(tmp_path / "jobs" / "pt")
    check_same_config(plan, tmp_path, plan.names)
    finish(plan, tmp_path, ["pt"], value=2.0)
    with pytest.raises(UserError, match=r"mt/0 stands on other weights of pt .*--redo=mt/0 "):
        check_same_config(plan, tmp_path, plan.names)
    shutil.rmtree(tmp_path / "jobs" / "pt")
    finish(plan, tmp_path, ["pt"])  # as before
    check_same_config(plan, tmp_path, plan.names)


def test_what_is_measured_is_measured_again_once_the_networks_are_others(tmp_path):
    config = made(tiny_vmoe.get_config(), phases=("e2e_scratch", "eval"))
    plan = Plan(config)
    finish(plan, tmp_path, plan.names)
    (tmp_path / "config.json").write_text(config.to_json())
    assert is_current(plan, tmp_path, "eval") and jobs_to_run(plan, tmp_path) == []
    assert [job["status"] for job in summarise(plan, tmp_path)["jobs"]] == ["done", "done"]
    leave_weights(tmp_path, "e2e_scratch", 2.0)
    assert not is_current(plan, tmp_path, "eval") and jobs_to_run(plan, tmp_path) == ["eval"]
    assert [job["status"] for job in summarise(plan, tmp_path)["jobs"]] == ["done", "pending"]
    run = read_run(tmp_path)
    assert run.jobs["eval"].status == "pending"
    assert "eval has measured other weights of e2e_scratch" in run.notes[-1]


def test_seeds_that_the_config_has_no_more_are_in_no_mean(tmp_path):
    config = made(tiny_vmoe.get_config(), phases=("e2e_scratch", "eval"), e2e_seeds=3)
    plan = Plan(config)
    finish(plan, tmp_path, plan.names)
    assert len(summarise(plan, tmp_path)["results"]["e2e_scratch"]["values"]) == 3
    config.e2e_seeds = 2
    assert len(summarise(Plan(config), tmp_path)["results"]["e2e_scratch"]["values"]) == 2


def test_what_measures_the_network_that_a_run_trains_from_a_given_one_stands_on_it(tmp_path):
    given, workdir = tmp_path / "given", tmp_path / "run"
    leave_weights(given, "e2e", 1.0)
    config = made(tiny_vmoe.get_config(), phases=("e2e", "eval"))
    config.init.network = str(given)
    plan = Plan(config)
    assert set(plan.job("eval").inputs["needs"]) == {"e2e"}
    assert plan.closure(["eval"]) == ["e2e", "eval"]
    with pytest.raises(UserError, match="job e2e is not done; run it first"):
        weights_directory(config, workdir, "e2e")
    finish(plan, workdir, plan.names)
    known = read_inputs(workdir, "e2e")[1]["weights"]
    assert known == {"init.network": digest(given / "jobs/e2e/weights")}
    assert stale_after(workdir, ["e2e"]) == ["e2e", "eval"]
    leave_weights(given, "e2e", 2.0)
    with pytest.raises(UserError, match=r"e2e stands on other weights of init.network than"):
        check_same_config(plan, workdir, plan.names)
    config.phases = ("eval",)
    assert weights_directory(config, workdir, "e2e") == given / "jobs/e2e/weights"


@pytest.mark.parametrize("key", ["precision", "vmoe"])
def test_a_given_network_is_measured_again_as_the_config_has_it_now(tmp_path, key):
    given, workdir = tmp_path / "given", tmp_path / "run"
    leave_weights(given, "e2e", 1.0)
    config = made(tiny_vmoe.get_config(), phases=("eval",))
    config.init.network = str(given)
    finish(Plan(config), workdir, ["eval"])
    assert is_current(Plan(config), workdir, "eval")
    config.recipes.e2e.lr = 0.5  # by which nothing is measured
    assert is_current(Plan(config), workdir, "eval")
    if key == "vmoe":
        config.vmoe.capacity_factor = 0.25
    else:
        config.precision = "bfloat16"
    assert not is_current(Plan(config), workdir, "eval")


def test_a_job_that_is_extended_is_nothing_to_stand_on(tmp_path):
    config = tiny.get_config()
    finish(Plan(config), tmp_path, ["pt"])
    (tmp_path / "jobs" / "pt" / "checkpoints" / "40").mkdir(parents=True)
    config.recipes.pt.epochs = 6
    plan = Plan(config)
    assert jobs_to_extend(plan, tmp_path, ["pt"]) == ["pt"]
    (tmp_path / "jobs" / "pt" / "done.json").unlink()  # it began, and was stopped
    write_inputs(tmp_path, plan.job("pt"))
    with pytest.raises(UserError, match="job pt is not done; run it first"):
        check_weights(plan, tmp_path, ["mt/0"])


def test_weights_that_are_missing_from_a_finished_job_are_said_to_be(tmp_path):
    plan = Plan(tiny.get_config())
    finish(plan, tmp_path, ["pt"])
    shutil.rmtree(tmp_path / "jobs" / "pt" / "weights")
    with pytest.raises(UserError, match="is missing, though pt is done; restore it, or --redo=pt "):
        check_weights(plan, tmp_path, ["mt/0"])


@pytest.mark.parametrize(("job", "left"), [("pt", "checkpoints/10/state"), ("eval", "done")])
def test_an_unfinished_job_of_unknown_inputs_is_refused(tmp_path, job, left):
    plan = Plan(tiny.get_config())
    (tmp_path / "jobs" / job / left).mkdir(parents=True)
    if job == "eval":  # which starts anew
        check_same_config(plan, tmp_path, plan.names)
        return
    with pytest.raises(UserError, match=r"inputs.json is missing.*--redo=pt"):
        check_same_config(plan, tmp_path, plan.names)


def test_jobs_are_not_done_again_under_the_process_that_runs_them(tmp_path):
    directory = tmp_path / "jobs" / "pt"
    directory.mkdir(parents=True)
    check_not_running(tmp_path, ["pt"])
    lock = acquire(directory)
    with pytest.raises(UserError, match=r"pt: another process is running it in .*; stop that one"):
        check_not_running(tmp_path, ["mt/0", "pt"])
    lock.close()
    check_not_running(tmp_path, ["mt/0", "pt"])


def test_inputs_of_an_earlier_version_have_no_digests(tmp_path):
    plan = Plan(tiny.get_config())
    finish(plan, tmp_path, ["pt", "mt/0"])
    inputs = read_record(inputs_path(tmp_path, "mt/0"))
    assert set(inputs.pop("weights")) == {"pt"}
    write_record(inputs_path(tmp_path, "mt/0"), inputs)
    leave_weights(tmp_path, "pt", 2.0)
    check_same_config(plan, tmp_path, plan.names)


def test_episodes_after_a_damaged_line_are_done_again(tmp_path):
    lines = [json.dumps({"episode": i, "eval_accuracy": 0.5}) for i in range(3)]
    path = tmp_path / "episodes.jsonl"
    path.write_text("\n".join([*lines[:2], lines[2][:9]]))
    assert [entry["episode"] for entry in _finished(path)] == [0, 1]
    path.write_text("\n".join([lines[0], lines[2]]))
    assert [entry["episode"] for entry in _finished(path)] == [0]


def test_episodes_that_were_changed_or_of_another_run_are_done_again(tmp_path, capsys):
    path = tmp_path / "episodes.jsonl"
    lines = [
        json.dumps(sealed({"episode": i, "run": "a", "eval_accuracy": 0.25 * i})) for i in range(3)
    ]
    path.write_text("\n".join(lines))
    assert [entry["eval_accuracy"] for entry in _finished(path, "a")] == [0.0, 0.25, 0.5]
    assert not capsys.readouterr().out
    assert _finished(path, "b") == []
    path.write_text("\n".join([lines[0], lines[1].replace("0.25", "0.75"), lines[2]]))
    assert [entry["eval_accuracy"] for entry in _finished(path, "a")] == [0.0]
    assert "from line 2 on it is damaged" in capsys.readouterr().out
    path.write_text(json.dumps({"episode": 0}))  # without its result
    assert _finished(path, "a") == []


def test_what_a_job_needs_is_not_dropped_without_being_done_again(tmp_path):
    plan = Plan(tiny_vmoe.get_config())
    finish(plan, tmp_path, plan.names[: plan.names.index("e2e") + 1])
    stale = stale_after(tmp_path, ["pt"])
    with pytest.raises(UserError, match="--only leaves out m2mkd/0, which is done again and which"):
        check_weights(plan, tmp_path, ["e2e"], stale)
    check_weights(plan, tmp_path, [n for n in plan.names if n in stale], stale)


def test_a_job_that_is_to_be_extended_is_named_in_only(tmp_path):
    config = tiny.get_config()
    finish(Plan(config), tmp_path, ["pt"])
    (tmp_path / "jobs" / "pt" / "checkpoints" / "40").mkdir(parents=True)
    config.recipes.pt.epochs = 6
    with pytest.raises(UserError, match="--extend=pt: --only=mt/0 leaves it out"):
        pipeline.run(config, tmp_path, only="mt/0", extend="pt")
    assert (tmp_path / "jobs" / "pt" / "done.json").is_file()


def test_images_that_were_added_since_are_refused(tmp_path):
    plan = Plan(tiny.get_config())
    facts = image_facts(plan.job("pt").phase)
    assert facts["data"].startswith("160 training images (labels ")
    write_inputs(tmp_path, plan.job("pt"), images=facts)
    check_same_images(plan, tmp_path, ["pt"])
    check_same_images(plan, tmp_path, ["mt/0"])
    write_inputs(tmp_path, plan.job("pt"), images={"data": "150 training images (labels 0)"})
    for job in ("pt", "mt/0"):  # which goes on, and which stands on it
        with pytest.raises(UserError, match=r"pt was made with 150 .* there are 160 training"):
            check_same_images(plan, tmp_path, [job])
    check_same_images(plan, tmp_path, ["pt"], stale=["pt"])
    check_same_images(plan, tmp_path, ["e2e_scratch"])  # stands on nothing


def test_weights_of_another_result_are_refused(tmp_path):
    """As where those of another run, or of another seed, were copied in their place."""
    plan = Plan(tiny.get_config())
    finish(plan, tmp_path, ["pt"])
    done = read_record(tmp_path / "jobs/pt/done.json")
    weights, arrays = tmp_path / "jobs/pt/weights", {"all": {"w": np.ones(3)}}
    save_weights(weights, arrays, {"job": "pt", "metrics": done["metrics"]})
    check_finished(tmp_path, "pt")
    for other in ({"job": "pt", "metrics": {"eval_accuracy": 0.9}}, {"job": "ft"}):
        save_weights(weights, arrays, other)
        with pytest.raises(UserError, match="weights are not those that pt ended with") as error:
            check_weights(plan, tmp_path, ["mt/0"])
        assert "--redo=pt " in str(error.value) and "\n" not in str(error.value)


def test_options_of_modules_of_ones_own_count_whatever_they_are_called():
    """Other keys of these names are where data lie, or are left out at their defaults."""
    config = tiny.get_config()
    config.teacher.options = {"root": "here", "channels": 3}
    config.data.root = "there"
    known = Plan(config).job("ft").inputs["config"]
    assert known["teacher.options.root"] == "here" and known["teacher.options.channels"] == 3
    assert {"data.root", "data.channels", "recipes.ft.freeze"}.isdisjoint(known)


def test_an_option_that_is_given_since_is_a_change(tmp_path):
    config = tiny.get_config()
    finish(Plan(config), tmp_path, ["ft"])
    config.teacher.options = {"channels": 3}
    with pytest.raises(UserError, match=r"ft was made with config.teacher.options.channels = None"):
        check_same_config(Plan(config), tmp_path, ["ft"])


def test_a_job_that_another_command_began_otherwise_meanwhile_is_refused(tmp_path, monkeypatch):
    config = made(tiny_vmoe.get_config(), phases=("e2e_scratch",), e2e_seeds=2)
    config.vmoe.keep_stitches = False
    other = made(config.copy_and_resolve_references(), e2e_seeds=2)
    other.recipes.e2e.lr = 0.5
    trained = []

    def run_training(run, jobs, schedule, **_):
        trained.extend(job.name for job in jobs)
        finish(Plan(config), tmp_path, ["e2e_scratch"])
        finish(Plan(other), tmp_path, ["e2e_scratch/1"])  # by the other command

    monkeypatch.setattr(pipeline, "run_training", run_training)
    with pytest.raises(UserError, match=r"e2e_scratch/1 was made with config.recipes.e2e.lr = 0.5"):
        pipeline.run(config, tmp_path)
    assert trained == ["e2e_scratch"]


def test_a_module_is_refused_that_another_command_began_otherwise_before_its_turn(
    tmp_path, monkeypatch
):
    config = made(tiny.get_config(), phases=("pt", "mt"))
    config.distillation.joint = False  # one after the other
    other = config.copy_and_resolve_references()
    other.recipes.mt.lr = 0.5
    finish(Plan(config), tmp_path, ["pt"])
    trained = []

    def train_round(run, jobs, *_):
        trained.extend(job.name for job in jobs)
        finish(Plan(config), tmp_path, ["mt/0"])
        write_inputs(tmp_path, Plan(other).job("mt/1"))  # by the other command, then interrupted
        return []

    monkeypatch.setattr(rounds, "_train_round", train_round)
    with pytest.raises(UserError, match=r"mt/1 was made with config.recipes.mt.lr = 0.5"):
        pipeline.run(config, tmp_path)
    assert trained == ["mt/0"]


def test_what_is_not_needed_is_not_said_to_be_done(tmp_path, capsys):
    config = made(tiny_vmoe.get_config(), phases=("e2e_scratch", "eval"))
    config.vmoe.keep_stitches = False
    finish(Plan(config), tmp_path, Plan(config).names)
    shutil.rmtree(tmp_path / "jobs" / "e2e_scratch")
    pipeline.run(config, tmp_path)
    said = capsys.readouterr().out
    assert "[e2e_scratch] not needed any more" in said and "[eval] done already" in said


def test_a_torch_file_in_a_bucket_has_the_digest_of_its_bytes(tmp_path):
    """etils's paths, which those of buckets are, give other facts than pathlib's."""
    (tmp_path / "a.pth").write_bytes(b"weights")
    there = epath.Path(tmp_path / "a.pth")
    assert not hasattr(there.stat(), "st_size")
    assert digest(there) == digest(tmp_path / "a.pth")


def test_a_job_keeps_what_tells_it_from_the_same_job_elsewhere(tmp_path):
    plan, runs = Plan(tiny.get_config()), []
    for workdir in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        write_inputs(workdir, plan.job("pt"))
        runs.append(run_of(inputs_path(workdir, "pt"))["id"])
        assert read_inputs(workdir, "pt")[1]["run"] == {"id": runs[-1]}
    assert runs[0] == runs[1] != runs[2]
    # Of an earlier version.
    inputs = read_record(inputs_path(tmp_path / "a", "pt"))
    del inputs["run"]
    write_record(inputs_path(tmp_path / "a", "pt"), inputs)
    assert read_inputs(tmp_path / "a", "pt")[1]["run"] == {}
    check_same_config(plan, tmp_path / "a", ["pt"])


def test_the_summary_does_not_make_a_vanished_directory_again(tmp_path):
    plan, workdir = Plan(tiny_vmoe.get_config()), tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    summarise(plan, workdir)
    assert (workdir / "summary.json").is_file()
    shutil.rmtree(workdir)
    summarise(plan, workdir)
    assert not workdir.exists()
    workdir.mkdir()  # where its disk was mounted
    summarise(plan, workdir)
    assert not list(workdir.iterdir())
