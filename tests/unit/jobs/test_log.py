"""A job's log: what is kept, what is said when, what trackers get; how fast."""

import json
import subprocess
import sys
from typing import ClassVar

import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m2mkd_jax.config.defaults import base
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import progress, trackers
from m2mkd_jax.jobs.log import Log, clock, shown
from m2mkd_jax.jobs.progress import pace


def entry(step, **numbers):
    return {"step": step, "loss": 1 / step, "router/load": [[0.25, 0.75], [0.5, 0.5]], **numbers}


def log(tmp_path, start=0, names=("tensorboard",), **options):
    config = base()
    config.trackers = names
    return Log(
        tmp_path / "metrics.jsonl",
        "e2e",
        30,
        start,
        trackers=trackers.make_trackers(config, tmp_path, "e2e"),
        **options,
    )


def kept(tmp_path):
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def in_event_files(tmp_path):
    """{name: [(step, value)]} of the scalars, as tensorboard reads them."""
    # Read as they are: by default tensorboard hides what a restart has doubled.
    found = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False
    )
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }, found.Tags()


def expected(tmp_path):
    found = {}
    for line in kept(tmp_path):
        for name, value in trackers.scalars(line).items():
            found.setdefault(name, []).append((line["step"], pytest.approx(value)))
    return found


def test_event_files_are_metrics_jsonl_also_after_a_resume(tmp_path):
    first = log(tmp_path)
    for step in (5, 10, 15, 20):
        first(entry(step))
    first({"step": 20, "eval_loss": 0.5, "eval_accuracy": 0.9})
    first.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1000000000.before"))  # not of this second
    # Killed; the newest checkpoint is of step 10.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')
    second = log(tmp_path, start=10)
    for step in (15, 20, 25, 30):
        second(entry(step))
    second.close()
    found, tags = in_event_files(tmp_path)
    assert [step for step, _ in found["loss"]] == [5, 10, 15, 20, 25, 30]
    assert found == expected(tmp_path)
    assert found["router/load/0/1"][0] == (5, pytest.approx(0.75))
    assert tags["histograms"] == ["router/load/0", "router/load/1"]


def test_the_writer_needs_no_tensorflow():
    code = "import sys, tensorboardX; print([m for m in sys.modules if m == 'tensorflow'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


class Service:
    """Stands for a tracking service that cannot forget."""

    got: ClassVar[list] = []
    opened: ClassVar[list] = []
    id = "run-1"

    @classmethod
    def init(cls, **options):
        cls.opened.append(options)
        return cls()

    def log(self, values, step):
        self.got.append((step, values["loss"]))

    def finish(self):
        self.opened.append("finished")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_every_step_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Service, "got", [])
    monkeypatch.setattr(Service, "opened", [])
    monkeypatch.setitem(sys.modules, name, Service)
    first = log(tmp_path, names=(name,))
    for step in (5, 10, 15):
        first(entry(step))
    first.close()
    Service.opened.remove("finished")
    second = log(tmp_path, start=5, names=(name,))
    for step in (10, 15, 20):
        second(entry(step))
    second.close()
    assert Service.got == [(step, 1 / step) for step in (5, 10, 15, 20)]
    names = [own["name"] for own in Service.opened[:2]]
    assert names[0] == names[1] and names[0].startswith("e2e")
    if name == "wandb":
        assert names[0] == "e2e"
        assert [own["id"] for own in Service.opened[:2]] == [None, "run-1"]
    assert Service.opened[2] == "finished"
    third = log(tmp_path, names=(name,))  # no checkpoint was saved: from the first step on
    for step in (5, 25):
        third(entry(step))
    third.close()
    assert Service.got[4:] == [(25, 1 / 25)]


def test_an_evaluation_that_a_kill_kept_from_a_service_is_sent_at_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Service, "got", [])
    monkeypatch.setitem(sys.modules, "wandb", Service)
    evaluation = {"step": 5, "loss": 0.5, "eval_accuracy": 0.9}
    for entries in ([entry(5)], [entry(5), evaluation], [entry(5), evaluation]):
        again = log(tmp_path, names=("wandb",))
        for own in entries:
            again(own)
        again.close()
    assert Service.got == [(5, 1 / 5), (5, 0.5)]


class Own(trackers.Tracker):
    """A tracker of one's own."""

    def __init__(self, directory, job, config):
        self.got = []

    def log(self, entry):
        self.got.append(entry["step"])


def test_a_tracker_of_ones_own(tmp_path):
    own = log(tmp_path, names=(f"{__name__}:Own",))
    own(entry(5))
    own.close()
    assert own.trackers[0].got == [5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", 'did you mean "tensorboard"'),
        ("wandb", "pip install 'm2mkd_jax[wandb]'"),
        ("m2mkd_jax.errors:UserError", "not derived from"),
    ],
)
def test_what_is_no_tracker_is_refused(name, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.trackers") as error:
        trackers.tracker_class(name)
    assert words in str(error.value)


def test_lines_come_at_intervals_and_with_every_evaluation(tmp_path, capsys):
    quiet = log(tmp_path, names=(), every=3600, place="job 3 of 16")
    for step in (5, 10, 15):
        quiet(entry(step))
    quiet({"step": 15, "eval_accuracy": 0.75, "eval_loss": 1.0})
    quiet(entry(30))
    quiet.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["5/30", "15/30", "30/30"]
    assert "job 3 of 16" in said[0] and "eval_accuracy 0.7500" in said[1]
    assert len(kept(tmp_path)) == 5


def test_pace_and_what_is_said_of_it(monkeypatch):
    monkeypatch.setattr(progress, "matrix_rate", lambda dtype: 4e9)
    monkeypatch.setattr(progress.jax, "device_count", lambda: 2)
    found = pace({"step": 20, "seconds_per_step": 0.5}, 50, 140, int(1e9), jnp.float32)
    assert found["images_per_second"] == 100
    assert found["seconds_left"] == 60
    assert found["matrix_share"] == 0.25  # 1e9 / 0.5 of 2 * 4e9
    assert found["memory"] > 0
    text = shown(found | {"run_seconds_left": 3725, "data_wait": 0.25})
    assert text.startswith("left 1:00, run 1:02:05  100 images/s  25% of the matrix rate  ")
    assert text.endswith("25% waiting for data")
    assert clock(59.6) == "1:00"
