"""What --only, --redo and --extend ask for, of a run and of a dry run alike."""

import fcntl
import shutil

import pytest

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import dry_run, pipeline
from m2mkd_jax.jobs.choice import choose
from m2mkd_jax.jobs.data_checks import check_same_images, measured_images
from m2mkd_jax.jobs.plan import Plan, is_current, standing_on, write_inputs
from tests.e2e import tiny_vmoe
from tests.unit.jobs.test_standing_on import finish, made

ASKS = {"run": pipeline.run, "dry run": dry_run.dry_run}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"only": "e2e,ft", "redo": "ft"}, "--redo=ft drops m2mkd/0, m2mkd/1, "),
        ({"only": "mt/0", "redo": "eval"}, "--redo=eval drops eval too, which --only=mt/0 leaves"),
        ({"only": "mt/0", "extend": "pt"}, "--extend=pt: --only=mt/0 leaves it out; name it there"),
        ({"redo": "e2e"}, "e2e: another process is running it in"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, ask, flags, says):
    config = tiny_vmoe.get_config()
    finish(Plan(config), tmp_path, Plan(config).names)
    if "extend" in flags:
        config.recipes.pt.epochs += 1
        (tmp_path / "jobs/pt/checkpoints/20").mkdir(parents=True)
        for name in Plan(config).names[1:]:  # which would stand on another pt
            shutil.rmtree(tmp_path / "jobs" / name)
    before = sorted(tmp_path.rglob("*"))
    with (tmp_path / "jobs" / "pt" / "held").open("w") as nothing:
        path = tmp_path / "jobs" / "e2e" / "lock"
        with path.open("w") if "another" in says else nothing as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError) as error:
                ASKS[ask](config, tmp_path, **flags)
    assert says in str(error.value) and "\n" not in str(error.value)
    left = sorted(p for p in tmp_path.rglob("*") if p.name not in ("held", "lock"))
    assert left == before


def test_jobs_of_phases_that_are_gone_go_with_what_they_stand_on(tmp_path):
    config = tiny_vmoe.get_config()
    finish(Plan(config), tmp_path, Plan(config).names)
    config.phases = ("pt", "mt", "ft")
    chosen = choose(Plan(config), tmp_path, "", "ft", "")
    assert {"ft", "m2mkd/0", "e2e"} <= {*chosen.stale} and chosen.todo == ["ft"]


def measured(tmp_path, **values):
    """A finished run of two jobs, of which the second has measured the first on test images."""
    config = made(tiny_vmoe.get_config(), phases=("e2e_scratch", "eval"))
    config.evaluation.update(values)
    plan = Plan(config)
    finish(plan, tmp_path, plan.names)
    job = plan.job("eval")
    facts = measured_images(job.phases)
    assert list(facts) == ["data"] and facts["data"].startswith("100 test images (labels ")
    return config, plan, facts


def keep(plan, workdir, images):
    job = plan.job("eval")
    write_inputs(workdir, job, weights=standing_on(plan.config, workdir, job), images=images)


def test_other_test_images_are_measured_again(tmp_path, capsys):
    _, plan, facts = measured(tmp_path)
    keep(plan, tmp_path, facts)
    assert choose(plan, tmp_path, "", "", "").todo == []
    keep(plan, tmp_path, {"data": "90 test images (labels 0)"})
    check_same_images(plan, tmp_path, ["eval"])
    capsys.readouterr()
    choice = choose(plan, tmp_path, "", "", "")
    assert choice.todo == choice.stale == ["eval"]
    assert capsys.readouterr().out.startswith("[eval] the images are not those that were measured")
    assert choose(plan, tmp_path, "e2e_scratch", "", "").todo == []


def test_what_was_measured_stays_done_where_its_images_are_gone(tmp_path):
    config, plan, _ = measured(tmp_path)
    keep(plan, tmp_path, {"data": "90 test images (labels 0)"})
    config.data.name, config.data.root = "cifar10", str(tmp_path / "nowhere")
    assert choose(plan, tmp_path, "", "", "").stale == []
    _, plan, _ = measured(tmp_path)
    keep(plan, tmp_path, {})  # of an earlier version
    assert choose(plan, tmp_path, "", "", "").stale == []


@pytest.mark.parametrize(("key", "counts"), [("sampled", True), ("reductions", True), ("", False)])
def test_what_is_drawn_batch_by_batch_depends_on_the_batch(tmp_path, key, counts):
    config, plan, _ = measured(tmp_path, **({key: True} if key else {}))
    assert is_current(plan, tmp_path, "eval")
    config.evaluation.batch += 1
    assert is_current(Plan(config), tmp_path, "eval") != counts


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_seed_of_another_process_is_left_to_it(tmp_path, monkeypatch, capsys, seeds):
    """The others of the phase do not stand on it."""
    config = made(tiny_vmoe.get_config(), phases=("e2e_scratch", "eval"), e2e_seeds=seeds)
    config.vmoe.keep_stitches = False
    plan, trained = Plan(config), []

    def train(run, jobs, *_):
        trained.extend(job.name for job in jobs)
        for job in jobs:
            write_record(run.directory(job.name) / "done.json", {"name": job.name, "metrics": {}})
        return []

    monkeypatch.setattr("m2mkd_jax.jobs.rounds._train_round", train)
    (tmp_path / "jobs" / "e2e_scratch").mkdir(parents=True)
    with (tmp_path / "jobs" / "e2e_scratch" / "lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        if seeds == 1:
            with pytest.raises(UserError, match="e2e_scratch: another process is running it in"):
                pipeline.run(config, tmp_path, only="e2e_scratch")
        else:
            summary = pipeline.run(config, tmp_path, only="e2e_scratch")
            status = {job["name"]: job.get("status") for job in summary["jobs"]}
            assert status["e2e_scratch"] == "running"
            assert "[e2e_scratch] another process is running it; left" in capsys.readouterr().out
    assert trained == plan.names[1:seeds]
