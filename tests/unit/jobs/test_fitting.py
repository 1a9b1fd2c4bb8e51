"""remat='auto': a step that does not fit into memory recomputes activations, and says so."""

from concurrent.futures import Future
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.evaluate.flops import flops_of
from m2mkd_jax.jobs import fitting
from m2mkd_jax.jobs.setup import fresh_setup, training_step
from m2mkd_jax.train.step import Programs
from tests.e2e import tiny, tiny_vmoe
from tests.support import assert_close


def training(remat):
    """A training step of a tiny meta model with its state."""
    config = tiny_vmoe.get_config()
    config.teacher.remat, config.recipes.pt.batch = remat, 8
    return training_step(config, "pt")


def stepped(remat):
    """Metrics of one step."""
    setup, state, step = training(remat)
    size = setup.phase.data.image_size
    image = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), np.uint8)
    batch = {"image": image, "label": np.arange(8, dtype=np.int32)}
    return jax.device_get(step(state, setup.frozen, batch)[1])


def test_auto_recomputes_only_what_does_not_fit(monkeypatch, capsys):
    plain = stepped("auto")
    assert "recomputed" not in capsys.readouterr().out
    monkeypatch.setattr(fitting, "device_memory", lambda: 1)
    again = stepped("auto")
    assert "[pt] activations with remat='auto' are recomputed" in capsys.readouterr().out
    for name, value in plain.items():
        assert_close(again[name], value, 1e-5, name)


def products(remat):
    """How many matrix products the program of a step has."""
    setup, state, step = training(remat)
    size = setup.phase.data.image_size
    batch = {
        "image": jnp.zeros((8, size, size, 3), jnp.uint8),
        "label": jnp.zeros(8, jnp.int32),
    }
    return step.lower(state, setup.frozen, batch).as_text().count("dot_general")


def test_recomputing_reaches_the_blocks():
    assert products("always") > products("auto") == products("never")


def nac():
    """A tiny NAC from scratch, whose graph has a regulariser."""
    config = tiny.get_config()
    assert config.regulariser.kind == "hinge"
    config.recipes.e2e.batch = 8
    return config, "e2e_scratch"


def meta_model():
    config = tiny_vmoe.get_config()
    config.recipes.pt.batch = 8
    return config, "pt"


@pytest.mark.parametrize("case", [meta_model, nac])
def test_a_step_that_is_compiled_ahead_is_not_compiled_again(case):
    programs = []

    def count(name, seconds, **labels):
        del seconds
        if name.endswith("backend_compile_duration"):
            programs.append(labels)

    config, job = case()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        setup, state, step = training_step(config, job)
        for program in step._begun.compiled:
            program.result()
        ahead = len(programs)
        size = setup.phase.data.image_size
        batch = {"image": np.zeros((8, size, size, 3), np.uint8), "label": np.zeros(8, np.int32)}
        metrics = jax.device_get(step(state, setup.frozen, batch)[1])
        assert len(programs) == ahead > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    again = fresh_setup(config, job)
    expected = again.make_step()(again.initial_state(), again.frozen, batch)[1]
    for name, value in jax.device_get(expected).items():
        np.testing.assert_array_equal(metrics[name], value, name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_products_of_the_update_are_counted(optimizer):
    config = tiny_vmoe.get_config()
    config.recipes.pt.batch, config.recipes.pt.optimizer = 8, optimizer
    setup = fresh_setup(config, "pt")
    step, state = setup.make_step(), setup.initial_state()
    size = setup.phase.data.image_size
    batch = {"image": np.zeros((8, size, size, 3), np.uint8), "label": np.zeros(8, np.int32)}
    assert step.fits(state, setup.frozen, batch)
    whole = step._step.trace(state, setup.frozen, batch)
    assert type(step._step).__name__ == "StepInTwo"
    assert step.flops == flops_of(whole.jaxpr.jaxpr) > 0


def test_what_fails_in_a_thread_is_raised_by_the_first_call():
    def begin(x):
        failed = Future()
        failed.set_exception(MemoryError("no room for the program"))
        return Programs([jax.jit(jnp.sin).trace(x)], [failed])

    step = fitting.FittingStep("pt", lambda loss: SimpleNamespace(begin=begin), None)
    step.compile_ahead(jnp.zeros(2))
    with pytest.raises(MemoryError, match="no room"):
        step(jnp.zeros(2))


@pytest.mark.parametrize("asked", [False, True])
def test_what_compiling_freed_goes_back_before_the_first_step(monkeypatch, asked):
    events = []
    monkeypatch.setattr(fitting.memory, "give_back", lambda: events.append("given back"))

    class Step:
        def begin(self, x):
            traced = jax.jit(jnp.sin).trace(x)
            done = Future()
            done.set_result(traced.lower().compile())
            events.append("compiled")
            return Programs([traced], [done])

        def __call__(self, x):
            events.append("step")
            return x

    step = fitting.FittingStep("pt", lambda loss: Step(), None)
    if asked:  # as rounds of jobs do
        assert step.fits(jnp.zeros(2))
    for _ in range(2):
        step(jnp.zeros(2))
    assert events == ["compiled", "given back", "step", "step"]
