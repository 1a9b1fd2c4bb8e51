"""Which modules train in one program: the same batches, room in memory, no other process at it.

And the room on the disk that their kept targets take.
"""

import errno
import fcntl
import functools
import os
import threading
from types import SimpleNamespace

import pytest

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import joint, kept_targets, locks, rounds
from m2mkd_jax.jobs.pipeline import _phases
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.run import Run
from m2mkd_jax.jobs.setup import abstract_stages
from m2mkd_jax.parallel.mesh import make_mesh
from tests.e2e import tiny


def modules(phase, tmp_path, **values):
    """The run and the three jobs of a phase of the tiny config."""
    config = tiny.get_config()
    config.recipes.m2mkd.modules = {}
    config.update_from_flattened_dict(values)
    plan = Plan(config)
    return Run(config, tmp_path, make_mesh()), [plan.job(f"{phase}/{i}") for i in range(3)]


pairs = functools.partial(modules, "m2mkd")


def names(jobs):
    return [job.name for job in jobs]


ALL = ["m2mkd/0", "m2mkd/1", "m2mkd/2"]
CASES = [
    ({}, ALL),
    ({"recipes.m2mkd.modules": {"1": {"epochs": 2, "lr": 0.1, "clip": 1.0, "ema": 0.5}}}, ALL),
    ({"recipes.m2mkd.modules": {"1": {"batch": 32}}}, ["m2mkd/0", "m2mkd/2"]),
    ({"recipes.m2mkd.modules": {"2": {"smoothing": 0.0}}}, ["m2mkd/0", "m2mkd/1"]),
    ({"recipes.m2mkd.modules": {"0": {"mixup": 0.5}}}, ["m2mkd/0"]),
    ({"distillation.joint": False}, ["m2mkd/0"]),
    ({"distillation.kind": "none"}, ["m2mkd/0"]),
    ({"evaluation.sampled": True}, ["m2mkd/0"]),
]


@pytest.mark.parametrize(("values", "expected"), CASES, ids=lambda v: str(v)[:40])
def test_pairs_that_see_the_same_batches_train_together(tmp_path, values, expected):
    assert names(joint.alike(*pairs(tmp_path, **values))) == expected


MODULES = [
    ({}, ["mt/0", "mt/1", "mt/2"]),
    ({"distillation.kind": "none"}, ["mt/0", "mt/1", "mt/2"]),
    ({"recipes.mt.modules": {"1": {"drop_path": 0.1}}}, ["mt/0", "mt/2"]),
    ({"recipes.mt.drop_path": 0.1}, ["mt/0"]),
    ({"distillation.joint": False}, ["mt/0"]),
]


@pytest.mark.parametrize(("values", "expected"), MODULES, ids=lambda v: str(v)[:40])
def test_modules_of_the_teacher_train_together_without_drop_path(tmp_path, values, expected):
    assert names(joint.alike(*modules("mt", tmp_path, **values))) == expected


def test_pairs_at_other_steps_train_in_another_round(tmp_path):
    run, jobs = pairs(tmp_path)
    for job, step in (("m2mkd/0", 8), ("m2mkd/2", 8)):
        (tmp_path / "jobs" / job / "checkpoints" / str(step)).mkdir(parents=True)
    assert names(joint.alike(run, jobs)) == ["m2mkd/0", "m2mkd/2"]
    assert names(joint.alike(run, jobs[1:])) == ["m2mkd/1"]


def test_jobs_come_by_phases():
    plan = Plan(tiny.get_config())
    assert ["m2mkd/0", "m2mkd/1", "m2mkd/2"] in _phases(plan.names)
    assert _phases(["mt/1", "ft", "m2mkd/0", "e2e", "e2e/1"]) == [
        ["mt/1"],
        ["ft"],
        ["m2mkd/0"],
        ["e2e"],
        ["e2e/1"],
    ]


class Step:
    """A step of so many jobs, and what the compiler plans for them: 1 GiB each."""

    needed = 3 << 30

    def __init__(self, setup, most):
        self.count, self.most = len(setup.setups), most

    def fits(self, *arguments):
        return self.count <= self.most


@pytest.mark.parametrize("most", [1, 2, 3])
def test_as_many_pairs_as_fit_and_the_others_after_them(tmp_path, monkeypatch, capsys, most):
    monkeypatch.setattr(joint.JointSetup, "make_step", lambda setup: Step(setup, most))
    monkeypatch.setattr(joint.JointSetup, "abstract_states", None)
    monkeypatch.setattr(joint.JointSetup, "abstract_frozen", None)
    chosen, step = joint.fitting_jobs(*pairs(tmp_path), 10)
    assert names(chosen) == ALL[:most] and step.count == most
    said = capsys.readouterr().out
    assert said.count("\n") == (most < 3)
    assert most == 3 or f"[m2mkd/0] {most} of 3 modules train at once" in said


def test_a_pair_of_another_process_is_left_to_it(tmp_path, capsys):
    run, (job, *_) = pairs(tmp_path)
    run.directory(job.name).mkdir(parents=True)
    with (run.directory(job.name) / "lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        locks: dict = {}
        assert not rounds._lock(run, job, locks, several=True) and not locks
        assert f"[{job.name}] another process is running it" in capsys.readouterr().out
        with pytest.raises(UserError, match="another process is running it"):
            rounds._lock(run, job, locks, several=False)
    assert rounds._lock(run, job, locks, several=True)
    locks[job.name].close()
    # Another process had it done when the lock was free.
    (run.directory(job.name) / "done.json").write_text('{"metrics": {}}')
    assert not rounds._lock(run, job, locks, several=True)
    locks[job.name].close()


def test_who_only_looks_at_a_lock_does_not_have_it(tmp_path):
    (tmp_path / "lock").touch()
    look = (tmp_path / "lock").open()
    fcntl.flock(look, fcntl.LOCK_SH)  # as `is_held` does for a moment
    timer = threading.Timer(locks.LOOK_SECONDS / 4, look.close)
    timer.start()
    lock = locks.acquire(tmp_path)
    timer.join()
    assert lock is not None and locks.is_held(tmp_path)
    lock.close()
    assert not locks.is_held(tmp_path)


def test_kept_targets_that_the_disk_has_no_room_for_are_refused(tmp_path, monkeypatch):
    values = {"distillation.views": 2, "recipes.m2mkd.drop_path": 0.0}
    run, jobs = pairs(tmp_path, **values)
    others = 4 * 10 + 4 + 3 * 4  # logits, label, checksums of three arrays
    rows = {"m2mkd/0": 3 * 16**2, "m2mkd/1": 4 * 5 * 16, "m2mkd/2": 4 * 5 * 16}
    needed = 2 * 160 * sum(row + others for row in rows.values())
    free = SimpleNamespace(free=needed)
    monkeypatch.setattr(kept_targets.shutil, "disk_usage", lambda path: free)
    kept_targets.check_disk(run, jobs)
    free.free -= 1
    with pytest.raises(UserError, match=r"config.distillation.views: the targets of all views"):
        kept_targets.check_disk(run, jobs)
    kept_targets.check_disk(*pairs(tmp_path, **values, **{"distillation.keep_targets": False}))


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    def refuse(code):
        def flock(*_):
            raise OSError(code, os.strerror(code))

        return flock

    for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "flock", refuse(code))
        lock = locks.acquire(tmp_path)
        assert lock is not None and "has no locks" in capsys.readouterr().err
        lock.close()
        assert not locks.is_held(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EAGAIN))
    assert locks.acquire(tmp_path) is None and locks.is_held(tmp_path)


def test_the_accuracy_of_another_meta_model_than_the_given_one_is_no_reference(tmp_path):
    run, jobs = modules("mt", tmp_path)
    phases = {job.name: job.phase for job in jobs}
    unknown = {name: {} for name in phases}
    assert rounds._references(run, phases, {}) == unknown
    metrics = {"eval_accuracy": 0.75}
    (tmp_path / "jobs" / "pt").mkdir(parents=True)
    write_record(tmp_path / "jobs" / "pt" / "done.json", {"name": "pt", "metrics": metrics})
    expected = {name: {"meta_accuracy": 0.75} for name in phases}
    assert rounds._references(run, phases, {}) == expected
    run.config.init.meta = "given"
    assert rounds._references(run, phases, {}) == unknown


def test_a_module_goes_on_in_the_program_that_others_have_ended_in(tmp_path):
    """Joined as it was: a program of its own would round otherwise."""
    run, jobs = modules("mt", tmp_path)
    stages: dict = {}
    for job in jobs:
        stages |= abstract_stages(job.phase)
    options = {"mesh": run.mesh, "updates_per_epoch": 10}
    phases = {job.name: job.phase for job in jobs}
    whole = joint.joint_setup(run.config, phases, stages, **options).only(["mt/0"])

    def program(setup):
        shapes = (setup.abstract_states, setup.abstract_frozen, setup.abstract_batch)
        return setup.make_step().lower(*shapes).as_text()

    state = tmp_path / "jobs/mt/0/checkpoints/8/state"
    write_record(state / "checksums.json", {"program": list(phases), "together": ["mt/0"]})
    steps = joint.steps_before(run, jobs[:1])
    beside = joint.ended_beside(run, jobs[:1], steps)
    assert steps == {"mt/0": 8} and [phase.job for phase in beside] == ["mt/1", "mt/2"]
    own = {"mt/0": jobs[0].phase}
    resumed = joint.joint_setup(run.config, own, stages, beside=beside, **options)
    assert resumed.abstract_frozen.keys() == whole.abstract_frozen.keys()
    assert program(resumed) == program(whole)
    alone = joint.joint_setup(run.config, own, stages, **options)
    assert alone.abstract_frozen.keys() != whole.abstract_frozen.keys()
    assert joint.ended_beside(run, jobs[1:], {"mt/1": 0, "mt/2": 0}) == []
