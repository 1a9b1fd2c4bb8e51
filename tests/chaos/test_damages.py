"""Every file that a run reads back, damaged in every way: a table of what comes of it.

tests/unit/checkpoint/test_damage.py restores from the damaged checkpoints; here every region of
every file has a flipped bit. `make chaos` shows the table, docs/promises.md keeps it.
"""

import collections
import itertools
import re
import shutil

import numpy as np
import pytest

from m2mkd_jax.checkpoint.checksums import damage
from m2mkd_jax.checkpoint.files import read_record, write_record
from m2mkd_jax.checkpoint.store import RunCheckpoints, load_weights, save_weights
from m2mkd_jax.checkpoint.trees import checksum
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.changes import check_same_config
from m2mkd_jax.jobs.plan import Plan, is_done, write_inputs
from tests.e2e import tiny
from tests.unit.checkpoint.test_damage import COMMITTED, break_file
from tests.unit.checkpoint.test_store import make_state

REGIONS = 8  # of a file, in each of which a bit flips
DAMAGES = ("truncate", "empty", "zeros", "delete", "flip", "swap")
OLDER, NEWEST = 10, 20


class InRegion:
    """A generator for `break_file` that draws from one region of a file."""

    def __init__(self, region):
        self.region, self.draw = region, np.random.default_rng(region)

    def integers(self, end):
        if end == 8:  # a bit of a byte
            return self.draw.integers(8)
        first = self.region * end // REGIONS
        return self.draw.integers(first, max((self.region + 1) * end // REGIONS, first + 1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints of a job, its finished weights and records, and those of another job."""
    root, plan = tmp_path_factory.mktemp("run"), Plan(tiny.get_config())
    checkpoints = RunCheckpoints(root / "jobs" / "pt" / "checkpoints")
    for step in (OLDER, NEWEST):
        checkpoints.save(step, make_state(step, size=16), {"eval_accuracy": step / 100})
    checkpoints.close()
    for job, seed in (("pt", 1), ("mt/0", 2)):
        directory = root / "jobs" / job
        save_weights(directory / "weights", {"m": make_state(seed)["params"]}, {"step": seed})
        write_inputs(root, plan.job(job))
        write_record(directory / "done.json", {"name": job, "metrics": {"eval_accuracy": seed}})
    return root


def outcome(root, file):
    """What a run does with a damaged file of the job pt; raises where it takes it for whole."""
    directory = root / "jobs" / "pt"
    try:
        if "checkpoints" in file.parts:
            reason = damage(directory / "checkpoints" / str(NEWEST) / "state", NEWEST)
            assert reason and "\n" not in reason, file
            return "step before"
        if "weights" in file.parts:
            tree = load_weights(directory / "weights")[0]["m"]
            assert checksum(tree) == checksum(make_state(1)["params"]), file
            return "no effect"
        if file.name == "done.json":
            if not is_done(root, "pt"):
                return "trained on"
            assert read_record(root / file)["metrics"] == {"eval_accuracy": 1}
        else:
            check_same_config(Plan(tiny.get_config()), root, ["pt"])
        return "no effect"
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"


def other_file(root, file):
    """What a file is exchanged for: the one of the step before, or of another job."""
    if "checkpoints" in file.parts:
        return root / str(file).replace(f"/{NEWEST}/", f"/{OLDER}/")
    return root / str(file).replace("jobs/pt/", "jobs/mt/0/")


def kind(file):
    """The name of a file without what is random in it."""
    return re.sub(r"/[0-9a-f]{32}$", "/*", file.as_posix().removeprefix("jobs/pt/"))


def test_no_damage_is_taken_for_whole(run, tmp_path):
    newest = run / "jobs" / "pt" / "checkpoints" / str(NEWEST) / "state"
    files = [*newest.rglob("*"), *(run / "jobs" / "pt" / "weights").rglob("*")]
    files += [run / "jobs" / "pt" / name for name in ("done.json", "inputs.json")]
    files = sorted(p.relative_to(run) for p in files if p.is_file() and p.name != COMMITTED)
    table = collections.defaultdict(lambda: collections.defaultdict(set))
    root = tmp_path / "run"
    shutil.copytree(run, root)
    for file in files:
        whole = (root / file).read_bytes()
        for how in DAMAGES:
            for region in range(REGIONS if how == "flip" else 1):
                if not break_file(root / file, how, other_file(run, file), InRegion(region)):
                    table[kind(file)][how].add("(same)")
                    continue
                table[kind(file)][how].add(outcome(root, file))
                (root / file).write_bytes(whole)
    print(f"\n| file | {' | '.join(DAMAGES)} |\n|{'---|' * (len(DAMAGES) + 1)}")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(", ".join(sorted(row[how])) for how in DAMAGES) + " |")
    found = {name: set().union(*row.values()) - {"(same)"} for name, row in table.items()}
    for name, outcomes in found.items():
        if name.startswith("checkpoints"):
            assert outcomes == {"step before"}, name
        elif name.startswith("weights"):
            assert outcomes <= {"refused", "no effect"}, name
    assert found["weights/description.json"] == {"refused"}
    # Without its done.json a job goes on from its checkpoint, without inputs.json it is refused.
    assert table["done.json"].pop("delete") == {"trained on"}
    # A flipped bit in the name of the checksum leaves the content as it is.
    for name, how in itertools.product(("done.json", "inputs.json"), table["done.json"]):
        assert table[name][how] <= ({"refused", "no effect"} if how == "flip" else {"refused"})
