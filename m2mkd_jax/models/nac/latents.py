"""Latents (signatures, codes, initial states), the seeder of their states, and their noise.

Axes: B batch, U latents, D state, S code, C signature, I iterations.

Source: Weiss et al. 2022 (arXiv 2210.08031);
docs/reference.md#nac, docs/reference.md#nac-seeder, docs/reference.md#nac-code-noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.models.batching import for_each_image
from m2mkd_jax.models.nac.modulation import LAYER_NORM_EPS
from m2mkd_jax.models.nac.spec import NACSpec

SEEDER_LOG_VARIANCE = -5.0


class Latents(nnx.Module):
    """One group of latents: signatures (U, C), codes (U, S) or (I, U, S), states (U, D) if any."""

    def __init__(self, count: int, spec: NACSpec, *, per_iteration: bool = False, rngs: nnx.Rngs):
        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        self.signatures = normal(count, spec.signature_dim)
        shape = (count, spec.code_dim)
        self.codes = normal(*((spec.iterations, *shape) if per_iteration else shape))
        self.states = None if spec.seeder else normal(count, spec.state_dim)

    def initial_states(self, batch: int) -> jax.Array:
        """The learned initial states of every image: (B, U, D)."""
        assert self.states is not None, "these states come from a seeder"
        return for_each_image(self.states[...], batch)


class Seeder(nnx.Module):
    """Codes to initial states: mu(norm c) + exp(0.5 logvar(norm c)) * noise, per image.

    Source: docs/reference.md#nac-seeder.
    """

    def __init__(self, spec: NACSpec, *, rngs: nnx.Rngs):
        self.norm = layers.layer_norm(spec.code_dim, LAYER_NORM_EPS, rngs=rngs)
        self.mu = layers.torch_linear(spec.code_dim, spec.state_dim, rngs=rngs)
        self.logvar = layers.torch_linear(spec.code_dim, spec.state_dim, rngs=rngs)
        self.logvar.bias[...] = jnp.full((spec.state_dim,), SEEDER_LOG_VARIANCE)

    def __call__(self, codes: jax.Array, batch: int, noise: jax.Array | None = None) -> jax.Array:
        """Draws initial states.

        Args:
            codes: (U, S).
            batch: B.
            noise: standard normal noise (B, U, D); None for the mean.

        Returns:
            States (B, U, D).
        """
        codes = self.norm(codes.astype(self.mu.kernel[...].dtype))
        mean = self.mu(codes)
        if noise is None:
            return for_each_image(mean, batch)
        deviation = jnp.exp(0.5 * self.logvar(codes))
        mean, deviation = (for_each_image(x, batch) for x in (mean, deviation))
        return mean + noise.astype(mean.dtype) * deviation


def jitter(codes: jax.Array, scale: float, key: jax.Array | None) -> jax.Array:
    """Codes plus uniform noise within +-scale * |code|; the noise carries no gradient.

    Source: docs/reference.md#nac-code-noise.

    Args:
        codes: any shape.
        scale: relative to the codes; 0 for no noise.
        key: of the noise; None for no noise.

    Returns:
        The same shape.
    """
    if key is None or not scale:
        return codes
    bound = scale * jnp.abs(jax.lax.stop_gradient(codes))
    return codes + bound * jax.random.uniform(key, codes.shape, minval=-1.0, maxval=1.0)
