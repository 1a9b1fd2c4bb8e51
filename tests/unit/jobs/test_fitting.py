"""remat='auto': a step that does not fit into memory recomputes activations, and says so."""

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.jobs import fitting
from m2mkd_jax.jobs.setup import training_step
from tests.e2e import tiny_vmoe
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
