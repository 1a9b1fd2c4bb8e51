"""One directory, one run: what a second call may change, and what is done again."""

import json
import shutil

import pytest

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.changes import check_same_config, jobs_to_extend
from m2mkd_jax.jobs.log import Log
from m2mkd_jax.jobs.pipeline import _counted
from m2mkd_jax.jobs.plan import (
    Plan,
    inputs_path,
    is_done,
    jobs_to_run,
    stale_after,
    write_inputs,
)
from tests.e2e import tiny, tiny_vmoe


def finish(plan: Plan, workdir, names):
    """Leaves what finished jobs leave, weights apart."""
    for name in names:
        write_inputs(workdir, plan.job(name))
        result: dict = {"name": name, "status": "done", "metrics": {}}
        if name == "eval":
            result["networks"] = {job: {} for job in plan.job(name).needs}
        (workdir / "jobs" / name / "done.json").write_text(json.dumps(result))


def test_a_run_goes_on_with_other_machines(tmp_path):
    config = tiny_vmoe.get_config()
    finish(Plan(config), tmp_path, Plan(config).names)
    config.mesh.update(data=2, expert=4, fsdp=True)
    config.data.root, config.data.workers, config.log_every = "elsewhere", 3, 7
    config.data.damaged_share = 0.5  # after a run that too many damaged images ended
    config.vmoe.remat = config.teacher.remat = "always"
    config.evaluation.every, config.checkpoint_minutes = 3.0, 1.0
    config.phases = (*config.phases, "e2e_kd")
    plan = Plan(config)
    check_same_config(plan, tmp_path, plan.names)
    assert jobs_to_run(plan, tmp_path) == ["e2e_kd", "eval"]


def test_jobs_that_are_not_needed_any_more_are_not_counted_as_left(tmp_path):
    plan = Plan(tiny_vmoe.get_config())
    finish(plan, tmp_path, [n for n in plan.names if n.partition("/")[0] in ("m2mkd", "e2e")])
    todo = jobs_to_run(plan, tmp_path)
    assert todo == ["e2e_scratch", "eval"]
    kept = ["m2mkd/0", "m2mkd/1", "m2mkd/2", "e2e", "e2e_scratch", "eval"]
    assert _counted(plan, plan.names, tmp_path, todo) == kept


CHANGES = [  # what is set, the first job it touches, and the key that is named
    ({"recipes.pt.lr": 0.5}, "pt", "recipes.pt.lr"),
    ({"recipes.mt.modules": {"1": {"epochs": 3}}}, "mt/1", "recipes.mt.epochs"),
    ({"data.shift": 3}, "pt", "data.augment.shift"),
    ({"teacher.depths": (2, 2, 1)}, "mt/0", "teacher.depths"),
    ({"distillation.alpha": 0.9}, "m2mkd/0", "distillation.alpha"),
    ({"nac.heads": 1}, "m2mkd/0", "nac.heads"),
    ({"recipes.e2e.lr": 0.5}, "e2e", "recipes.e2e.lr"),
    ({"init.meta": "elsewhere"}, "mt/0", "init.meta"),
    ({"seed": 3}, "pt", "seed"),
]


def changed(values):
    config = tiny.get_config()
    for key, value in values.items():
        key = key.replace("data.shift", "data.augment.shift")
        *path, last = key.split(".")
        group = config
        for name in path:
            group = group[name]
        group[last] = value
    return config


@pytest.mark.parametrize(("values", "job", "key"), CHANGES, ids=lambda v: str(v)[:30])
def test_a_change_that_touches_a_finished_job_is_refused_by_job_and_key(tmp_path, values, job, key):
    before, after = Plan(tiny.get_config()), Plan(changed(values))
    finish(before, tmp_path, before.names[: before.names.index(job)])
    check_same_config(after, tmp_path, after.names)  # nothing it touches is there yet
    finish(before, tmp_path, [job])
    with pytest.raises(UserError) as error:
        check_same_config(after, tmp_path, after.names)
    said = str(error.value)
    assert f": {job} was made with config.{key} = " in said and "\n" not in said
    assert f"--redo={job} " in said
    check_same_config(after, tmp_path, after.names, stale=stale_after(tmp_path, [job]))


def test_a_job_that_stands_on_another_one_is_refused(tmp_path):
    before, after = Plan(tiny.get_config()), Plan(changed({"recipes.pt.lr": 0.5}))
    finish(before, tmp_path, ["pt", "mt/0"])
    shutil.rmtree(tmp_path / "jobs" / "pt")
    with pytest.raises(UserError, match=r"mt/0 stands on another pt; --redo=mt/0 "):
        check_same_config(after, tmp_path, after.names)


def test_redoing_a_job_redoes_all_that_stand_on_it_and_no_more(tmp_path):
    plan = Plan(tiny.get_config())
    finish(plan, tmp_path, plan.names)
    stale = stale_after(tmp_path, ["mt/1"])
    assert sorted(stale) == sorted(
        ["mt/1", "ft", "m2mkd/0", "m2mkd/1", "m2mkd/2", "e2e", "e2e_kd", "eval"]
    )
    assert jobs_to_run(plan, tmp_path, stale=stale) == [n for n in plan.names if n in stale]
    assert jobs_to_run(plan, tmp_path, "mt", stale) == ["mt/1"]


def test_what_is_deleted_is_made_again_only_where_it_is_needed(tmp_path):
    plan = Plan(tiny.get_config())
    assert jobs_to_run(plan, tmp_path) == plan.names
    finish(plan, tmp_path, plan.names[: plan.names.index("ft") + 1])
    rest = plan.names[plan.names.index("ft") + 1 :]
    shutil.rmtree(tmp_path / "jobs" / "mt")
    assert jobs_to_run(plan, tmp_path) == rest
    assert jobs_to_run(plan, tmp_path, "mt/2") == ["mt/2"]
    shutil.rmtree(tmp_path / "jobs" / "ft")  # m2mkd needs it, and it needs mt
    assert jobs_to_run(plan, tmp_path) == ["mt/0", "mt/1", "mt/2", "ft", *rest]
    finish(plan, tmp_path, rest)
    assert jobs_to_run(plan, tmp_path) == []


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null"])
def test_damaged_results_are_refused_with_their_path(tmp_path, text):
    plan = Plan(tiny_vmoe.get_config())
    finish(plan, tmp_path, ["mt/1"])
    (tmp_path / "jobs" / "mt" / "1" / "done.json").write_text(text)
    with pytest.raises(UserError, match="delete it") as error:
        is_done(tmp_path, "mt/1")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    inputs_path(tmp_path, "mt/1").write_text(text)
    with pytest.raises(UserError) as error:
        check_same_config(plan, tmp_path, plan.names)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "odd",
    [
        {"metrics": {"eval_accuracy": "0.9"}},
        {"metrics": {"eval_accuracy": None}},
        {"metrics": {}, "networks": [1]},
        {"metrics": {}, "networks": {"e2e": None}},
        {"metrics": {}, "steps": "x"},
        {"metrics": {}, "seconds": None},
        {"metrics": {}, "episodes": ["a"]},
    ],
)
def test_edited_results_without_numbers_are_refused(tmp_path, odd):
    """Whole, as its checksum says, and yet no result."""
    write_record(tmp_path / "jobs" / "mt" / "1" / "done.json", {"name": "mt/1", **odd})
    with pytest.raises(UserError, match="is not what a finished job leaves"):
        is_done(tmp_path, "mt/1")


@pytest.mark.parametrize("odd", [{"config": [], "needs": {}}, {"config": {}, "needs": 3}, {}])
def test_edited_inputs_without_groups_are_refused(tmp_path, odd):
    plan = Plan(tiny_vmoe.get_config())
    finish(plan, tmp_path, ["mt/1"])
    write_record(inputs_path(tmp_path, "mt/1"), odd)
    with pytest.raises(UserError, match=r"inputs\.json is damaged; --redo=mt/1 "):
        check_same_config(plan, tmp_path, plan.names)


def test_raised_epochs_go_on_where_they_are_asked_to(tmp_path):
    before, after = Plan(tiny.get_config()), Plan(changed({"recipes.pt.epochs": 6}))
    finish(before, tmp_path, ["pt", "mt/0"])
    with pytest.raises(UserError, match=r"--extend=pt goes on with it to 6 epochs; --redo=pt "):
        check_same_config(after, tmp_path, after.names)
    with pytest.raises(UserError, match="no checkpoint to go on from; --redo=pt"):
        jobs_to_extend(after, tmp_path, ["pt"])
    (tmp_path / "jobs" / "pt" / "checkpoints" / "40").mkdir(parents=True)
    assert jobs_to_extend(after, tmp_path, ["pt"]) == ["pt"]
    # What stands on it stands on another one.
    with pytest.raises(UserError, match=r"mt/0 stands on another pt; --redo=mt/0 "):
        check_same_config(after, tmp_path, after.names, extended=["pt"])
    check_same_config(after, tmp_path, after.names, stale=["mt/0"], extended=["pt"])
    assert jobs_to_run(after, tmp_path, stale=["pt", "mt/0"])[:2] == ["pt", "mt/0"]
    # Once it has begun, the same command goes on with it.
    write_inputs(tmp_path, after.job("pt"))
    assert jobs_to_extend(after, tmp_path, ["pt"]) == []


@pytest.mark.parametrize(
    ("values", "job"),
    [
        ({"recipes.pt.epochs": 3}, "pt"),
        ({"recipes.pt.epochs": 6, "recipes.pt.lr": 0.5}, "pt"),
        ({"recipes.pt.epochs": 6, "seed": 3}, "pt"),
        ({"recipes.pt.epochs": 6}, "mt/0"),  # which stands on another pt then
        ({}, "eval"),
    ],
)
def test_only_raised_epochs_extend_a_job(tmp_path, values, job):
    before, after = Plan(tiny.get_config()), Plan(changed(values))
    finish(before, tmp_path, before.names)
    (tmp_path / "jobs" / job / "checkpoints" / "40").mkdir(parents=True)
    with pytest.raises(UserError, match=f"--extend={job}: (raise|only)") as error:
        jobs_to_extend(after, tmp_path, [job])
    assert "\n" not in str(error.value)


def test_a_finished_job_of_unknown_inputs_is_refused(tmp_path):
    plan = Plan(tiny.get_config())
    finish(plan, tmp_path, ["pt"])
    inputs_path(tmp_path, "pt").unlink()
    with pytest.raises(UserError, match=r"inputs.json is missing.*--redo=pt"):
        check_same_config(plan, tmp_path, plan.names)


def test_a_log_goes_on_after_lines_that_are_none(tmp_path):
    """As a power cut or another program leaves them; records after the checkpoint go."""
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 5, "loss": 1.0}\n'
    path.write_bytes(
        kept + b'{"step": 10, "loss": 1.0}\n\x00\x00\n{"loss": 1}\n[3]\n{"step": 12, \xff'
    )
    log = Log(path, "pt", 20, start=9)
    log({"step": 10})
    log.close()
    assert path.read_bytes() == kept + b'{"step": 10}\n'
