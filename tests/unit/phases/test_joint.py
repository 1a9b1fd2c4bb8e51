"""Chains that are followed together: each common beginning once, equal stages in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.parallel import backend
from m2mkd_jax.phases.joint import follow
from tests.support import assert_trees_close

CHAINS = (("a", "b", "c"), ("x", "b", "c"), ("a", "y", "c"))
FACTORS = {"a": 2.0, "b": -0.5, "c": 1.5, "x": 3.0, "y": 0.25}


def run_recorded(calls, fewer_tokens=()):
    def run(path, x, key):
        calls.append((path[-1], x.shape))
        if path[-1] in fewer_tokens:
            x = x[:, :1]
        noise = 0.0 if key is None else jax.random.uniform(key, x.shape)
        return x * FACTORS[path[-1]] + noise, {"sum": x.sum()[None]}

    return run


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("fewer", [(), ("x",)])
def test_every_chain_gives_what_it_gives_by_itself(fewer, platform):
    def outputs_of(images, chains):
        key = jax.random.key(0)
        keys = {end: jax.random.fold_in(key, i) for i, end in enumerate(CHAINS)}
        return follow(chains, {(): images}, run_recorded([], fewer), keys)

    @jax.jit
    def both(images):
        alone = [outputs_of(images, [chain]) for chain in CHAINS]
        return outputs_of(images, CHAINS), [
            {end: leaf for part in alone for end, leaf in part[kind].items()} for kind in (0, 1)
        ]

    with backend.tracing_for(platform):
        together, alone = both(jnp.ones((2, 3, 4)))
    assert_trees_close(list(together), alone, 1e-6)


def test_a_common_beginning_runs_once_and_equal_stages_in_one_batch():
    calls = []
    with backend.tracing_for("gpu"):
        follow(CHAINS, {(): jnp.ones((2, 3, 4))}, run_recorded(calls))
        assert [name for name, _ in calls] == ["a", "x", "b", "y", "c"]
        calls.clear()
        # One token has no place in a batch of three.
        follow(CHAINS, {(): jnp.ones((2, 3, 4))}, run_recorded(calls, ("x",)))
        assert [name for name, _ in calls] == ["a", "x", "b", "b", "y", "c", "c"]


def test_on_a_cpu_equal_stages_run_one_after_the_other():
    calls = []
    with backend.tracing_for("cpu"):
        follow(CHAINS, {(): jnp.ones((2, 3, 4))}, run_recorded(calls))
    assert calls == [(name, (2, 3, 4)) for name in ("a", "x", "b", "b", "y", "c", "c", "c")]


def test_a_chain_begins_where_its_output_is_known():
    calls, tokens = [], np.ones((2, 3, 4), np.float32)
    known = {("a",): tokens, ("x", "b"): 2 * tokens}
    outputs, _ = follow(CHAINS[:2], known, run_recorded(calls))
    assert [name for name, _ in calls] == ["b", "c", "c"]
    assert set(CHAINS[:2]) < outputs.keys()
