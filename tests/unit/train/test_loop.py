"""The training loop with a step that only counts: logs, evaluations, saves, stops, resumes."""

import itertools
import signal

import jax
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.train.loop import Loop, Preempted


class Recorder:
    """A loop over the state {"n": steps done}; accuracy is n / 100."""

    def __init__(self, total=10, log_every=4, evaluate_every=0, stop=None, losses=None, **options):
        self.logs, self.saves, self.evaluations = [], [], []
        self.losses = losses or {}
        self.loop = Loop(
            name="job",
            step=self.step,
            frozen={},
            total_steps=total,
            log_every=log_every,
            evaluate_every=evaluate_every,
            evaluate=self.evaluate,
            log=self.logs.append,
            save=lambda step, state, metrics: self.saves.append((step, dict(metrics))),
            save_seconds=options.pop("save_seconds", 1e9),
            stop=stop,
            learning_rate=lambda update: 0.5 * update,
            **options,
        )

    def step(self, state, frozen, batch):
        assert batch == state["n"], "a batch was skipped or repeated"
        return {"n": state["n"] + 1}, {"loss": self.losses.get(state["n"], 1.0)}

    def evaluate(self, state):
        self.evaluations.append(state["n"])
        return {"eval_accuracy": state["n"] / 100}

    def run(self, start=0):
        return self.loop.run({"n": start}, itertools.count(start), start)


def test_logs_evaluations_and_saves():
    recorder = Recorder(evaluate_every=5)
    state, metrics, steps = recorder.run()
    assert (state, metrics, steps) == ({"n": 10}, {"eval_accuracy": 0.1}, 10)
    assert [r["step"] for r in recorder.logs] == [4, 5, 8, 10, 10]
    assert [r["lr"] for r in recorder.logs if "lr" in r] == [1.5, 3.5, 4.5]
    assert recorder.evaluations == [5, 10]
    assert recorder.saves == [(5, {"eval_accuracy": 0.05}), (10, {"eval_accuracy": 0.1})]


def test_learning_rate_counts_updates():
    recorder = Recorder(total=8, accumulate=2)
    recorder.run()
    assert [r["lr"] for r in recorder.logs if "lr" in r] == [0.5, 1.5]


def test_the_host_waits_at_logging_steps_only(monkeypatch):
    waits = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: waits.append(1) or real(x))
    Recorder(total=100, log_every=25).run()
    assert len(waits) == 4


def test_a_checkpoint_is_never_overdue():
    recorder = Recorder(total=6, save_seconds=-1.0)
    recorder.run()
    assert [step for step, _ in recorder.saves] == [1, 2, 3, 4, 5, 6]


def near(metrics):
    return metrics["eval_accuracy"] >= 0.04


def test_early_stop_and_resume_after_it():
    recorder = Recorder(evaluate_every=2, stop=near)
    assert recorder.run()[2] == 4
    # Killed after the stop was decided and saved: the next run does not train on.
    again = Recorder(evaluate_every=2, stop=near)
    assert again.run(start=4) == ({"n": 4}, {"eval_accuracy": 0.04}, 4)
    # Before it, the run goes on to the same end.
    assert Recorder(evaluate_every=2, stop=near).run(start=2)[2] == 4


def test_resume_after_the_last_step_only_evaluates():
    recorder = Recorder()
    assert recorder.run(start=10) == ({"n": 10}, {"eval_accuracy": 0.1}, 10)
    assert recorder.logs == [] and recorder.evaluations == [10]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverging_loss_stops_and_names_the_steps(value):
    recorder = Recorder(losses={5: value})
    with pytest.raises(UserError, match="between steps 5 and 8"):
        recorder.run()


def test_a_signal_saves_and_raises():
    recorder = Recorder()
    step = recorder.loop.step

    def interrupted(state, frozen, batch):
        if state["n"] == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(state, frozen, batch)

    recorder.loop.step = interrupted
    with pytest.raises(Preempted, match="step 3"):
        recorder.run()
    assert recorder.saves == [(3, {})]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
