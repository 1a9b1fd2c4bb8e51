"""The results of a run: networks paired by their seeds, and on which images they were measured."""

import pytest

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.evaluate.intervals import interval
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.summary import _accuracy_of, _validates, results, summarise, table
from m2mkd_jax.jobs.units import binary_size, si
from tests.e2e import tiny


def job(name, accuracy=None, **more):
    metrics = {} if accuracy is None else {"eval_accuracy": accuracy}
    status = "pending" if accuracy is None else "done"
    base = {"name": name, "status": status, "steps": 1, "seconds": 1.0, "metrics": metrics}
    return base | more


def measured(**networks):
    found = {name.replace("_1", "/1"): value for name, value in networks.items()}
    return job(
        "eval",
        next(iter(found.values())),
        networks={name: {"eval_accuracy": value} for name, value in found.items()},
        splits=dict.fromkeys(found, "test"),
    )


def test_the_gap_to_scratch_is_between_networks_of_one_seed():
    """Of e2e the first seed is not done, or was deleted: the second is no partner of scratch 0."""
    jobs = [job("e2e"), job("e2e/1", 0.75), job("e2e_scratch", 0.25), job("e2e_scratch/1", 0.5)]
    assert results(jobs)["e2e_minus_scratch"] == interval([0.75 - 0.5])
    assert "e2e_minus_scratch" not in results([job("e2e/1", 0.75), job("e2e_scratch", 0.25)])


def test_networks_that_are_compared_are_measured_on_the_same_images():
    trained = [job("pt", 0.5), job("e2e", 0.75), job("e2e/1", 0.25), job("e2e_scratch", 0.375)]
    some = [*trained, measured(e2e=0.125, pt=0.0)]
    found = results(some, held_out=True)
    assert found["e2e"] == interval([0.75, 0.25]) and found["e2e_scratch"] == interval([0.375])
    assert found["meta"] == 0.0
    held_out = {own["name"] for own in trained}
    assert (
        _accuracy_of(some, held_out) == "validation images; of eval, and of meta below: test images"
    )
    every = [*trained, measured(e2e=0.125, e2e_1=0.5, e2e_scratch=0.0)]
    found = results(every, held_out=True)
    assert found["e2e"] == interval([0.125, 0.5]) and found["e2e_scratch"] == interval([0.0])
    assert found["meta"] == 0.5
    words = "validation images; of eval, and of e2e, e2e_scratch below: test images"
    assert _accuracy_of(every, held_out) == words
    assert _accuracy_of(trained, held_out) == "validation images"


def test_which_images_where_some_data_holds_out_and_some_does_not():
    """The teacher's data holds out validation images, that of the networks does not."""
    jobs = [job("pt", 0.5), job("ft", 0.5), job("e2e", 0.75), job("e2e/1", 0.5)]
    teachers = {"pt", "ft"}
    assert _accuracy_of(jobs, teachers) == "validation images; of e2e: test images"
    few = [*jobs, job("fewshot", 0.5, episodes=[0.5])]
    words = "validation images; of e2e: test images; of fewshot: the queries of its episodes"
    assert _accuracy_of(few, teachers) == words
    both = [*jobs, measured(e2e=0.125, e2e_1=0.5, pt=0.25)]
    words = "validation images; of e2e: test images; of eval, and of meta below: test images"
    assert _accuracy_of(both, teachers) == words
    both[-1]["splits"]["pt"] = "validation"
    words = "validation images; of e2e: test images; of eval's e2e: test images"
    assert _accuracy_of(both, teachers) == words
    both[-1]["splits"] = dict.fromkeys(both[-1]["splits"], "validation")
    words = "validation images, eval's too: there are no test images"
    assert _accuracy_of(both, {"pt", "ft", "e2e", "e2e/1"}) == words


@pytest.mark.parametrize(("name", "words"), [("e2e", "2 seeds"), ("fewshot", "2 episodes")])
def test_what_an_interval_is_over(name, words):
    summary = {"jobs": [], "results": {name: interval([0.5, 0.75])}}
    assert list(table(summary))[-1].endswith(f"(95%, {words})")


def test_numbers_and_sizes_as_people_read_them():
    assert [si(n) for n in (0, 7, 999.4, 999.6, 1234.0, 999_960_000, 2.5e18)] == [
        *("0", "7", "999", "1 k", "1.23 k", "1 G", "2.5 E"),
    ]
    sizes = (0, 1000, 1024, 2**20 - 1, 1536 * 2**20, 20_000 * 2**30)
    shown = ["0 B", "1000 B", "1 KiB", "1 MiB", "1.5 GiB", "19.53 TiB"]
    assert [binary_size(n) for n in sizes] == shown


def test_an_interrupted_job_has_taken_the_seconds_of_its_checkpoint(tmp_path):
    saved = tmp_path / "jobs" / "pt" / "checkpoints" / "20" / "state"
    saved.mkdir(parents=True)
    write_record(saved / "checksums.json", {"metrics": {"eval_loss": 1.0, "seconds": 12.345}})
    config = tiny.get_config()
    config.teaching_data.name, config.teaching_data.validation = "digits", 0.1
    summary = summarise(Plan(config), tmp_path)
    jobs = {own["name"]: own for own in summary["jobs"]}
    assert (jobs["pt"]["status"], jobs["pt"]["steps"]) == ("interrupted", 20)
    assert jobs["pt"]["seconds"] == 12.35
    assert jobs["e2e"]["seconds"] == 0
    assert {n for n in jobs if _validates(Plan(config).job(n))} == {
        name for name in jobs if name.partition("/")[0] in ("pt", "mt", "ft", "m2mkd")
    }
