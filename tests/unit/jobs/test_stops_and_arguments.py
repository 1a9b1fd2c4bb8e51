"""A signal ends the evaluation of a few-shot episode; `run` from Python says what it takes."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from m2mkd_jax.data.array_source import ArrayImageSource
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import evaluation, few_shot, pipeline
from m2mkd_jax.parallel.mesh import make_mesh
from m2mkd_jax.train.loop import EvaluationStopped, Preempted


def test_a_signal_ends_the_evaluation_of_an_episode(monkeypatch):
    episode = object.__new__(few_shot.Episode)
    episode._config = ConfigDict({"evaluation": {"batch": 2}, "seed": 0})
    episode._data = ConfigDict({"image_size": 4, "channels": 3, "workers": 0, "damaged_share": 0.0})
    episode._mesh, episode._frozen, counted = make_mesh(), {}, []
    episode._count = lambda *arguments: counted.append(arguments) or np.zeros(1)
    query = ArrayImageSource(np.zeros((9, 4, 4, 3), np.uint8), np.zeros(9, np.int32), ("a",))
    asked = iter([False, False, True])
    monkeypatch.setattr(evaluation, "interrupted", lambda: next(asked))
    with pytest.raises(EvaluationStopped):
        episode._evaluate({"params": {}, "fixed": {}}, query)
    assert len(counted) == 2


def test_a_signal_in_an_episode_does_not_say_that_it_is_saved(monkeypatch):
    def stopped(*_):
        raise Preempted("fewshot: stopped by a signal at step 2, state saved")

    monkeypatch.setattr(few_shot.Loop, "run", stopped)
    monkeypatch.setattr(few_shot, "train_batches", lambda *_, **__: (b for b in ()))
    episode = object.__new__(few_shot.Episode)
    episode._config = ConfigDict({"log_every": 1})
    recipe = ConfigDict({"accumulate": 1})
    episode._phase = SimpleNamespace(job="fewshot", recipe=recipe)
    episode._setup = SimpleNamespace(rate=None)
    episode._stage, episode._frozen, episode.steps = "head", {"head": {"fixed": {}}}, 3
    episode._data = episode._micro = episode._mesh = None
    episode._begin = lambda key, fixed: {}
    with pytest.raises(Preempted, match=r"episode of seed 7: stopped by a signal; finished ones"):
        episode.run(7, None, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((ConfigDict(), "x", ["pt"]), r"run: only is \['pt'\]; give names with commas"),
        ((ConfigDict(), "x", "", None), "run: redo is None; give names with commas"),
        ((ConfigDict(), None), "run: workdir is None; give the path of a directory"),
        ((ConfigDict(), b"x"), "run: workdir is b'x'; give the path"),
        (({}, "x"), "run: config is a dict, no ConfigDict"),
    ],
)
def test_arguments_of_another_type_are_one_line(arguments, says):
    with pytest.raises(UserError, match=says):
        pipeline.run(*arguments)
