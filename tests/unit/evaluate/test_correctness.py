"""The comparison of fused forms with written-out ones sees what is wrong."""

import jax.numpy as jnp
import pytest

from benchmarks import correctness

ARGUMENTS = (correctness.normal(1, 4, 8), correctness.normal(2, 4, 8))


def written_out(a, b):
    return a * jnp.tanh(b)


@pytest.mark.parametrize(
    ("fused", "good"),
    [
        (written_out, True),
        (lambda a, b: a * jnp.tanh(b) * jnp.asarray(1.05, a.dtype), False),
        (lambda a, b: jnp.where(a == a[0, 0], jnp.nan, a) * jnp.tanh(b), False),
    ],
    ids=["the same", "5% off", "NaN"],
)
def test_wrong_forms_are_found(fused, good):
    result = correctness.compare("form", fused, written_out, ARGUMENTS)
    assert result["good"] == good
    assert len(result["fused"]) == 3


def test_special_kernels_have_what_they_are_named_for():
    logs, links = correctness.log_kernels(2, 64, 80)["a receiver without senders"]
    assert logs.shape == links.shape == (2, 64, 80)
    assert (links.any(-1) == 0).sum() == 2
