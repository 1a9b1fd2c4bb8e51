"""The results of a run: networks paired by their seeds, and on which images they were measured."""

import pytest

from m2mkd_jax.evaluate.intervals import interval
from m2mkd_jax.jobs.summary import _accuracy_of, results, table
from m2mkd_jax.jobs.units import binary_size, si


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
    assert _accuracy_of(some) == "validation images; of eval, and of meta below: test images"
    every = [*trained, measured(e2e=0.125, e2e_1=0.5, e2e_scratch=0.0)]
    found = results(every, held_out=True)
    assert found["e2e"] == interval([0.125, 0.5]) and found["e2e_scratch"] == interval([0.0])
    assert found["meta"] == 0.5
    words = "validation images; of eval, and of e2e, e2e_scratch below: test images"
    assert _accuracy_of(every) == words
    assert _accuracy_of(trained) == "validation images"


@pytest.mark.parametrize(("name", "words"), [("e2e", "2 seeds"), ("fewshot", "2 episodes")])
def test_what_an_interval_is_over(name, words):
    summary = {"jobs": [], "results": {name: interval([0.5, 0.75])}}
    assert list(table(summary))[-1].endswith(f"(95%, {words})")


def test_numbers_and_sizes_as_people_read_them():
    assert [si(n) for n in (0, 7, 999.4, 999.6, 1234.0, 999_960_000, 2.5e18)] == [
        *("0", "7", "999", "1 k", "1.23 k", "1 G", "2.5 E"),
    ]
    sizes = (0, 1000, 1024, 1536 * 2**20, 20_000 * 2**30)
    assert [binary_size(n) for n in sizes] == ["0 B", "1000 B", "1 KiB", "1.5 GiB", "19.53 TiB"]
