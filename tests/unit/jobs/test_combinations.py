"""Every combination of options is refused at once, in one line that names a key, or it runs.

`python -m tests.unit.jobs.test_combinations FIRST LAST DIRECTORY` tries more of them by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.phases.build import build_phase
from tests.unit.jobs import combinations
from tests.unit.jobs.combinations import FAMILIES, Memory, apply, draw, install

SEEDS = range(16)


def given(memory: Memory, family: str, workdir: Path) -> dict[str, str]:
    """Directories with weights of every job: of the tiny config, and of wider networks."""
    places = {"given": FAMILIES[family](), "other": FAMILIES[family]()}
    wider = places["other"]
    wider.teacher.width = 32
    own = {"nac": "nac.state_dim", "vmoe": "vmoe.width", "dense": "dense.width"}[family]
    apply(wider, {own: 32}, {})
    for name, config in places.items():
        for job in Plan(config).names:
            if job != "eval":
                memory.finish(workdir / name, build_phase(config, job))
    return {name: str(workdir / name) for name in places}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_combination_is_refused_at_once_or_runs(family, tmp_path, monkeypatch):
    memory = install(monkeypatch)
    places = given(memory, family, tmp_path)
    outcomes = [_outcome(memory, family, seed, tmp_path, places) for seed in SEEDS]
    assert {"runs", "refused"} == set(outcomes)


def _outcome(memory: Memory, family: str, seed: int, workdir: Path, places: dict[str, str]) -> str:
    """'runs' or 'refused'; raises AssertionError where a config is refused too late or unclearly.

    Whatever else it raises would have ended a run in the middle.
    """
    config, changes = draw(family, seed)
    apply(config, changes, places)
    try:
        memory.run(config, workdir / str(seed))
    except UserError as error:
        message = str(error)
        assert "\n" not in message and "config." in message, (changes, message)
        return "refused"
    except Exception as error:
        raise AssertionError(f"{family}, seed {seed}: {changes}") from error
    return "runs"


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        # Each was accepted and would have ended a run in the middle.
        ("nac", {"phases": ("pt", "mt", "ft", "e2e_upcycled")}, "e2e_upcycled turns"),
        ("nac", {"phases": ("e2e", "fewshot"), "few_shot.network": "e2e/x"}, "is no job"),
        ("nac", {"phases": ("pt", "e2e_kd", "fewshot"), "nac.iterations": 2}, "needs 4"),
        ("nac", {"phases": ("e2e",), "teaching_data.name": "digits"}, "config.teaching_data needs"),
        ("dense", {"phases": combinations.ALL, "few_shot.shots": 30}, "config.few_shot: few-shot"),
        (
            "dense",
            {"phases": combinations.ALL, "few_shot.data.repeated_augmentation": 3},
            "config.recipes.fewshot.batch",
        ),
        ("dense", {"regulariser.kind": "hinge"}, "has no graph"),
        ("vmoe", {"phases": ("pt", "ft")}, r'\("mt" in config.phases\)'),
        ("vmoe", {"teacher.heads": 3}, "config.teacher: vit"),
        ("vmoe", {"data.augment.crop": "shrug"}, "config.data.augment.crop"),
        ("vmoe", {"init.teacher": "{other}"}, "config.init.teacher: .* has shape"),
        ("nac", {"phases": ("eval",), "init.network": "{other}"}, "config.init.network: .* shape"),
        (
            "dense",
            {"phases": ("fewshot",), "init.network": "{other}"},
            "config.init.network: ",
        ),
    ],
)
def test_what_was_seen_to_leak_is_refused_at_once(family, changes, says, tmp_path, monkeypatch):
    memory = install(monkeypatch)
    places = given(memory, family, tmp_path) if "{other}" in changes.values() else {}
    config = FAMILIES[family]()
    combinations.few_shot(config)
    apply(config, changes, places)
    with pytest.raises(UserError, match=says) as error:
        memory.run(config, tmp_path / "run")
    assert "\n" not in str(error.value) and "config." in str(error.value)


def main(first: int, last: int) -> None:
    """Tries seeds FIRST to LAST of every family and prints what is not as it should be."""
    with pytest.MonkeyPatch.context() as patch:
        memory, workdir = install(patch), Path(sys.argv[3])
        for family in FAMILIES:
            places = given(memory, family, workdir / family)
            counts = {"runs": 0, "refused": 0}
            for seed in range(first, last):
                try:
                    counts[_outcome(memory, family, seed, workdir / family, places)] += 1
                except AssertionError as error:
                    print(error, "::", repr(error.__cause__), flush=True)
            print(family, counts, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
