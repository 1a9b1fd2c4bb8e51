"""The step from which jobs of one program go on, after a kill at each moment of their saves."""

import itertools

import pytest

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.checkpoint.steps import common_steps, saved_steps

ALL = ("a", "b", "c")


def write(tmp_path, jobs):
    """Checkpoints by job: {step: jobs that it was saved with; None: an earlier version's}."""
    for job, steps in jobs.items():
        for step, together in steps.items():
            content = {} if together is None else {"together": list(together)}
            write_record(tmp_path / job / str(step) / "state" / "checksums.json", content)
    return {job: tmp_path / job for job in jobs}


CASES = {
    "all at one step": ({j: {10: ALL, 20: ALL} for j in ALL}, (20, 20, 20)),
    "one lacks the newest": (
        {"a": {10: ALL, 20: ALL}, "b": {10: ALL, 20: ALL}, "c": {5: ALL, 10: ALL}},
        (10, 10, 10),
    ),
    "two lack the first": ({"a": {10: ALL}, "b": {}, "c": {}}, (0, 0, 0)),
    "one lacks the second": ({"a": {10: ALL, 20: ALL}, "b": {10: ALL}, "c": {10: ALL}}, (10,) * 3),
    "an older one is the best one": (
        {"a": {3: ALL, 10: ALL, 20: ALL}, "b": {3: ALL, 5: ALL, 10: ALL}, "c": {5: ALL, 10: ALL}},
        (10, 10, 10),
    ),
    "one went on by itself": (
        {"a": {10: ALL, 50: ("a",)}, "b": {10: ALL, 20: ALL}, "c": {10: ALL, 20: ALL}},
        (50, 20, 20),
    ),
    "one starts over": ({"a": {10: ALL, 20: ALL}, "b": {}, "c": {10: ALL, 20: ALL}}, (20, 0, 20)),
    "one starts over and one lacks the newest": (
        {"a": {10: ALL, 20: ALL}, "b": {}, "c": {5: ALL, 10: ALL}},
        (10, 0, 10),
    ),
    "one had ended": (
        {"a": {10: ALL, 20: ("a", "b")}, "b": {5: ALL, 10: ALL}, "c": {}},
        (10, 10, 0),
    ),
    "an earlier version's": ({"a": {10: None, 20: None}, "b": {10: None}}, (20, 10)),
    "nothing in common": ({"a": {30: ALL, 40: ALL}, "b": {10: ALL, 20: ALL}}, (40, 20)),
    "each by itself": ({"a": {10: ("a",)}, "b": {}}, (10, 0)),
}


@pytest.mark.parametrize(("jobs", "expected"), CASES.values(), ids=CASES.keys())
def test_the_newest_step_that_all_jobs_of_a_program_have(tmp_path, jobs, expected):
    for order in itertools.permutations(jobs):
        directories = write(tmp_path, {job: jobs[job] for job in order})
        assert common_steps(directories) == dict(zip(jobs, expected, strict=True))


def test_a_job_that_is_not_asked_for_holds_none_back(tmp_path):
    directories = write(tmp_path, {"a": {10: ALL, 20: ALL}, "b": {10: ALL}, "c": {10: ALL}})
    assert common_steps({"a": directories["a"]}) == {"a": 20}


def test_steps_come_in_order_without_what_is_no_checkpoint(tmp_path):
    for name in ("10", "9", "8.damaged", "7.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [9, 10] and saved_steps(tmp_path / "none") == []
