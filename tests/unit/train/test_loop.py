"""The training loop with a step that only counts: logs, evaluations, saves, stops, resumes."""

import itertools
import math
import signal

import jax
import pytest

from m2mkd_jax.errors import Lost, UserError
from m2mkd_jax.parallel.process import SIGNALS
from m2mkd_jax.train.loop import EvaluationStopped, Loop, Member, NotFinite, Preempted


class Recorder:
    """A loop over the state {"n": steps done} of one job; accuracy is n / 100."""

    def __init__(self, total=10, log_every=4, evaluate_every=0, stop=None, losses=None, **options):
        self.logs, self.saves, self.evaluations, self.ended = [], [], [], []
        self.losses, self.norms = losses or {}, options.pop("norms", {})
        member = Member(
            name="job",
            total_steps=total,
            log=self.logs.append,
            save=lambda step, state, metrics, together: self.saves.append((step, dict(metrics))),
            stop=stop,
            learning_rate=lambda update: 0.5 * update,
            finish=lambda *result: self.ended.append(result),
            allowed=options.pop("allowed", 0),
        )
        self.loop = Loop(
            members=[member],
            step_of=lambda names: self.step,
            log_every=log_every,
            evaluate_every=evaluate_every,
            evaluate=self.evaluate,
            save_seconds=options.pop("save_seconds", 1e9),
            **options,
        )

    def step(self, states, batch):
        state = states["job"]
        assert batch == state["n"], "a batch was skipped or repeated"
        loss = self.losses.get(state["n"], 1.0)
        metrics = {"loss": loss, "gradient_norm": self.norms.get(state["n"], 2.0)}
        return {"job": {"n": state["n"] + 1}}, {"job": metrics}

    def evaluate(self, states):
        self.evaluations.append(states["job"]["n"])
        return {"job": {"eval_accuracy": states["job"]["n"] / 100}}

    def run(self, start=0):
        metrics = self.loop.run({"job": {"n": start}}, itertools.count(start), start)
        ((state, last, steps),) = self.ended
        assert metrics == {"job": last}
        return state, last, steps


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
    recorder.loop.members[0].evaluated = 10
    assert recorder.run(start=10) == ({"n": 10}, {"eval_accuracy": 0.1}, 10)
    assert recorder.logs == [] and recorder.evaluations == [10]


class Clock:
    """Moves by what `takes` adds alone: each step 2 s, its batch 1 s."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("m2mkd_jax.train.loop.time.monotonic", lambda: self.now)

    def takes(self, seconds, function):
        def run(*given):
            self.now += seconds
            return function(*given)

        return run


def test_the_seconds_of_a_step_are_those_of_steps_alone(monkeypatch):
    clock = Clock(monkeypatch)
    recorder = Recorder(total=11, log_every=4, evaluate_every=3)
    recorder.step = clock.takes(2.0, recorder.step)
    recorder.loop.evaluate = clock.takes(50.0, recorder.evaluate)
    recorder.loop.members[0].save = clock.takes(7.0, recorder.loop.members[0].save)
    batches = map(clock.takes(1.0, lambda n: n), itertools.count())
    recorder.loop.run({"job": {"n": 0}}, batches)
    logs = [entry for entry in recorder.logs if "lr" in entry]
    assert [entry["step"] for entry in logs] == [4, 8, 11]
    # The first call compiles: of it only the time for the batch counts.
    assert [entry["seconds_per_step"] for entry in logs] == [10 / 4, 3.0, 3.0]
    assert [entry["data_wait"] for entry in logs] == pytest.approx([4 / 10, 1 / 3, 1 / 3])


def test_the_first_line_does_not_count_that_the_schedule_is_compiled(monkeypatch):
    clock = Clock(monkeypatch)
    recorder = Recorder(total=4, log_every=2)
    recorder.step = clock.takes(2.0, recorder.step)
    compiled = []

    def rate(update):
        clock.now += 0.0 if compiled else 30.0
        compiled.append(update)
        return 0.5

    recorder.loop.members[0].learning_rate = rate
    recorder.run()
    seconds = [entry["seconds_per_step"] for entry in recorder.logs if "lr" in entry]
    assert seconds == [2 / 2, 2.0]  # the first call compiles


def test_an_evaluation_that_is_made_up_for_is_no_step(monkeypatch):
    clock = Clock(monkeypatch)
    recorder = Recorder(total=10, log_every=2, evaluate_every=4)
    recorder.step = clock.takes(2.0, recorder.step)
    recorder.loop.evaluate = clock.takes(50.0, recorder.evaluate)
    batches = map(clock.takes(1.0, lambda n: n), itertools.count(4))
    recorder.loop.run({"job": {"n": 4}}, batches, 4)
    seconds = [entry["seconds_per_step"] for entry in recorder.logs if "lr" in entry]
    assert seconds == [4 / 2, 3.0, 3.0]  # the first call compiles


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverging_loss_stops_and_names_the_steps(value):
    recorder = Recorder(losses={5: value})
    with pytest.raises(UserError, match="at step 6;"):
        recorder.run()


def test_a_gradient_that_is_not_finite_stops_too():
    with pytest.raises(NotFinite, match="the gradient is no longer finite at step 3;"):
        Recorder(norms={2: float("inf")}).run()


def test_steps_that_may_be_skipped_are_counted_and_left_out_of_the_means():
    recorder = Recorder(losses={1: float("nan"), 2: float("nan"), 3: 5.0}, allowed=2)
    assert recorder.run()[2] == 10
    first, *others = [r for r in recorder.logs if "lr" in r]
    assert first["loss"] == 3.0 and first["skipped"] == 2
    assert [r["skipped"] for r in others] == [2, 2]
    assert all(math.isfinite(r["loss"]) for r in recorder.logs if "loss" in r)
    recorder = Recorder(losses={1: float("nan"), 2: float("nan"), 7: float("nan")}, allowed=2)
    with pytest.raises(NotFinite, match="at step 8;"):
        recorder.run()


def test_the_gradient_norm_is_that_of_updates():
    recorder = Recorder(total=8, accumulate=2, norms={0: 9.0, 1: 3.0, 2: 9.0, 3: 5.0})
    recorder.run()
    assert [r["gradient_norm"] for r in recorder.logs if "lr" in r] == [4.0, 2.0]


def test_rate_and_gradient_norm_are_those_of_updates_also_after_skipped_steps():
    """A batch of two parts, whose second update's first part is skipped: the next ones move up."""
    norms = dict(enumerate([9.0, 1.0, float("nan"), 9.0, 3.0, 9.0, 5.0, 9.0]))
    recorder = Recorder(total=8, log_every=4, accumulate=2, norms=norms, allowed=1)
    recorder.run()
    logs = [entry for entry in recorder.logs if "lr" in entry]
    # Of 4 and 8 steps 3 and 7 count: 1 and 3 updates, of which the last is number 0 and 2.
    assert [entry["lr"] for entry in logs] == [0.5 * 0, 0.5 * 2]
    assert [entry["gradient_norm"] for entry in logs] == [1.0, 4.0]
    # Another start knows from the state how many were skipped.
    again = Recorder(total=8, log_every=4, accumulate=2, norms=norms, allowed=1)
    again.loop.members[0].skipped = 1
    again.run(start=3)
    logs = [entry for entry in again.logs if "lr" in entry]
    assert [(entry["step"], entry["lr"]) for entry in logs] == [(7, 0.5 * 2), (8, 0.5 * 2)]
    assert logs[0]["gradient_norm"] == 4.0


def test_nothing_is_saved_after_a_step_that_was_one_too_many():
    recorder = Recorder(losses={3: float("nan")}, log_every=50, evaluate_every=5)
    with pytest.raises(NotFinite, match="at step 4;"):
        recorder.run()
    assert recorder.saves == []


def test_an_evaluation_that_is_not_finite_stops_before_it_is_saved():
    recorder = Recorder(evaluate_every=5)
    recorder.evaluate = lambda states: {"job": {"eval_loss": float("nan")}}
    recorder.loop.evaluate = recorder.evaluate
    with pytest.raises(NotFinite, match="the eval_loss is no longer finite at step 5"):
        recorder.run()
    assert recorder.saves == []


def test_a_signal_in_an_evaluation_saves_and_a_resumed_run_makes_up_for_it():
    recorder = Recorder(evaluate_every=5)

    def stopped(states):
        raise EvaluationStopped

    recorder.loop.evaluate = stopped
    with pytest.raises(Preempted, match="step 5"):
        recorder.run()
    assert recorder.saves == [(5, {})]
    again = Recorder(evaluate_every=5)
    again.run(start=5)
    assert [r["step"] for r in again.logs if "eval_accuracy" in r] == [5, 10]
    known = Recorder(evaluate_every=5)
    known.loop.members[0].evaluated = 5
    known.run(start=5)
    assert [r["step"] for r in known.logs if "eval_accuracy" in r] == [10]


# Under nohup SIGHUP is ignored, and is none of them.
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGUSR1])
def test_a_signal_saves_and_raises(number):
    recorder = Recorder()
    step = recorder.step

    def interrupted(states, batch):
        if states["job"]["n"] == 2:
            signal.raise_signal(number)
            if number == signal.SIGUSR1:  # SLURM's announcement, and later its order
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGTERM)
            if number == signal.SIGHUP:  # the terminal's, and the shell's
                signal.raise_signal(number)
        return step(states, batch)

    recorder.step = interrupted
    with pytest.raises(Preempted, match="step 3"):
        recorder.run()
    assert recorder.saves == [(3, {})]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("start", [0, 10])
def test_a_signal_while_a_job_ends_stops_after_it(start):
    """Also in a run that finds the job at its last step."""
    recorder = Recorder()
    end = recorder.loop.members[0].finish

    def interrupted(*result):
        signal.raise_signal(signal.SIGTERM)
        end(*result)

    recorder.loop.members[0].finish = interrupted
    with pytest.raises(Preempted, match="after job had ended"):
        recorder.run(start)
    assert [steps for _, _, steps in recorder.ended] == [10]


@pytest.mark.parametrize("told", [False, True], ids=["by itself", "with all processes"])
def test_what_has_been_done_is_saved_when_who_makes_the_batches_has_ended(told):
    recorder = Recorder()

    def batches():
        yield from range(3)
        if told:
            signal.raise_signal(signal.SIGTERM)
        raise Lost("a worker process was ended")

    with pytest.raises(Preempted if told else Lost):
        recorder.loop.run({"job": {"n": 0}}, batches())
    assert recorder.saves == [(3, {})]


class Jobs:
    """A loop over several jobs, {"n": steps done} each; the loss of a job is its own constant."""

    def __init__(self, totals, stops=None, losses=None, log_every=4, evaluate_every=0):
        self.events = {name: [] for name in totals}
        self.programs, self.losses = [], losses or {}
        self.loop = Loop(
            members=[self.member(name, total, stops or {}) for name, total in totals.items()],
            step_of=self.step_of,
            log_every=log_every,
            evaluate_every=evaluate_every,
            evaluate=lambda states: {
                name: {"eval_accuracy": state["n"] / 100} for name, state in states.items()
            },
            save_seconds=1e9,
        )

    def member(self, name, total, stops):
        note = self.events[name].append
        return Member(
            name=name,
            total_steps=total,
            log=lambda entry: note(("log", entry["step"])),
            save=lambda step, state, metrics, together: note(("save", step)),
            stop=stops.get(name),
            learning_rate=lambda update: 0.0,
            finish=lambda state, metrics, steps: note(("end", steps, state["n"])),
        )

    def step_of(self, names):
        self.programs.append(names)

        def step(states, batch):
            assert tuple(states) == names
            assert all(state["n"] == batch for state in states.values())
            losses = {name: {"loss": self.losses.get(name, 1.0)} for name in names}
            return {name: {"n": state["n"] + 1} for name, state in states.items()}, losses

        return step

    def run(self, start=0):
        states = {name: {"n": start} for name in self.events}
        return self.loop.run(states, itertools.count(start), start)


def test_each_job_ends_by_itself_and_the_rest_go_on():
    """What a job logs and ends with is what it would by itself; all save where one ends."""
    totals, stops = {"a": 10, "b": 5, "c": 9}, {"c": near}
    together = Jobs(totals, stops, evaluate_every=2)
    metrics = together.run()
    assert together.programs == [("a", "b", "c"), ("a", "b"), ("a",)]
    for name, total in totals.items():
        alone = Jobs({name: total}, stops, evaluate_every=2)
        assert alone.run() == {name: metrics[name]}
        saved, events = (own.events[name] for own in (alone, together))
        assert [e for e in events if e not in saved] == ([("save", 5)] if name == "a" else [])
        assert [e for e in events if e in saved] == saved
    assert [event for event in together.events["c"] if event[0] == "end"] == [("end", 4, 4)]


def test_what_is_measured_anew_is_measured_with_the_others_as_without_the_stop():
    """After a kill between the last save of b and its result."""
    jobs, measured = Jobs({"a": 10, "b": 5, "c": 10}, evaluate_every=5), []
    evaluate = jobs.loop.evaluate
    jobs.loop.evaluate = lambda states: measured.append(tuple(states)) or evaluate(states)
    for member in jobs.loop.members:
        member.evaluated = 5
    jobs.run(start=5)
    assert measured == [("a", "b", "c"), ("a", "c")]
    assert jobs.events["b"] == [("end", 5, 5)]


def test_all_jobs_have_a_step_before_one_saves_the_next_or_is_done():
    jobs, order = Jobs({"a": 6, "b": 4}, evaluate_every=2), []
    for member in jobs.loop.members:
        member.save = lambda step, state, metrics, together, name=member.name: order.append(
            (name, step, together)
        )
        member.finish = lambda *_, name=member.name: order.append((name, "end"))
    jobs.loop.wait = lambda: order.append("wait")
    jobs.run()
    both = ("a", "b")
    assert order == [
        "wait",
        ("a", 2, both),
        ("b", 2, both),
        "wait",
        ("a", 4, both),
        ("b", 4, both),
        "wait",
        ("b", "end"),
        "wait",
        ("a", 6, ("a",)),
        "wait",
        ("a", "end"),
    ]


def test_beside_a_job_that_fails_the_others_are_saved_to_go_on_without_it():
    jobs, saves = Jobs({"a": 8, "b": 8, "c": 8}, losses={"b": math.nan}), []
    for member in jobs.loop.members:
        member.save = lambda step, state, metrics, together: saves.append((step, together))
    with pytest.raises(NotFinite, match="b: the loss is no longer finite at step 1"):
        jobs.run()
    assert saves == [(4, ("a",)), (4, ("c",))]


def test_jobs_that_had_ended_before_a_kill_do_not_train_on():
    jobs = Jobs({"a": 10, "b": 4, "c": 9}, {"c": near}, evaluate_every=2)
    for member in jobs.loop.members:
        member.evaluated = 4
    jobs.run(start=4)
    assert jobs.programs == [("a",)]
    assert jobs.events["b"] == jobs.events["c"] == [("end", 4, 4)]


def test_where_one_job_diverges_the_others_are_saved():
    jobs = Jobs({"a": 10, "b": 10}, losses={"b": float("nan")})
    with pytest.raises(UserError, match="b: the loss is no longer finite at step 1;"):
        jobs.run()
    assert ("save", 4) in jobs.events["a"] and ("save", 4) not in jobs.events["b"]


def test_where_two_jobs_diverge_at_once_neither_is_saved():
    jobs = Jobs({"a": 10, "b": 10, "c": 10}, losses={"a": math.nan, "b": math.nan})
    with pytest.raises(NotFinite, match="a: the loss is no longer finite at step 1"):
        jobs.run()
    saved = {name: [e for e in events if e[0] == "save"] for name, events in jobs.events.items()}
    assert saved == {"a": [], "b": [], "c": [("save", 4)]}


def test_beside_weights_that_are_not_finite_all_others_are_saved():
    jobs = Jobs({"a": 8, "b": 8, "c": 8}, evaluate_every=4)

    def refused(step, *_):
        raise NotFinite("b", step, "weight", False)

    jobs.loop.members[1].save = refused
    with pytest.raises(NotFinite, match="b: the weight is no longer finite at step 4"):
        jobs.run()
    assert ("save", 4) in jobs.events["a"] and ("save", 4) in jobs.events["c"]
