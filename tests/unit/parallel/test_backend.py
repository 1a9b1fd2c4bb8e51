"""Programs are traced for the platform that is named, whatever device is there."""

import jax
import jax.numpy as jnp
import pytest

from m2mkd_jax.models import layers
from m2mkd_jax.parallel import backend


def test_the_default_is_the_device():
    assert backend.platform() == jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    ("platform", "capability", "fits"),
    [("gpu", "9.0", True), ("gpu", "7.5", False), ("gpu", "gfx942", False), ("tpu", "", False)],
)
def test_layers_take_the_named_platform(platform, capability, fits):
    half = jnp.zeros((1, 64, 1, 8), jnp.bfloat16)
    with backend.tracing_for(platform, capability):
        assert backend.platform() == platform
        assert layers.fits_cudnn(half, half) == fits
    assert not layers.fits_cudnn(half, half)
    assert backend.platform() == "cpu"
