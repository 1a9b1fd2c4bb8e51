"""Linear layers and feed-forward networks modulated by a latent's code.

Axes: B batch, U latents, C channels in, D channels out, S code.

Source: Weiss et al. 2022 (arXiv 2210.08031);
docs/reference.md#nac-modulated-linear, docs/reference.md#nac-ffn.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import layers
from m2mkd_jax.models.batching import for_each_image
from m2mkd_jax.models.nac.spec import NACSpec

LAYER_NORM_EPS = 1e-5
L2_EPS = 1e-12


def normalise_scale(scale: jax.Array, kind: str) -> jax.Array:
    """Normalises a modulation over its channels.

    Source: docs/reference.md#nac-modulated-linear.

    Args:
        scale: (U, C).
        kind: 'layer_norm', 'l2', 'none', 'sigmoid' or 'tanh'.

    Returns:
        (U, C).
    """
    if kind == "layer_norm":
        centred = scale - scale.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS)
    if kind == "l2":
        return l2_normalise(scale)
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        "none": lambda scale: scale,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
    }
    return functions[kind](scale)


def l2_normalise(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, with a finite gradient at zero."""
    square = jnp.square(x).sum(-1, keepdims=True)
    zero = square <= L2_EPS**2
    return jnp.where(zero, x / L2_EPS, x / jnp.sqrt(jnp.where(zero, 1.0, square)))


class ModulatedLinear(nnx.Module):
    """y = W (x * m) + b with m = g * normalise(S c) [+ 1].

    The code belongs to a latent, so m (U, C) is the same for every image of the batch.

    Source: docs/reference.md#nac-modulated-linear.
    """

    def __init__(self, c: int, d: int, spec: NACSpec, *, bias: bool = True, rngs: nnx.Rngs):
        self.spec = spec
        self.kernel = nnx.Param(layers.torch_init(rngs.params(), (c, d), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((d,))) if bias else None
        self.gain = nnx.Param(jnp.float32(spec.gain))
        self.scale = nnx.Linear(
            spec.code_dim, c, use_bias=False, kernel_init=layers.torch_init, rngs=rngs
        )

    def modulation(self, codes: jax.Array) -> jax.Array:
        """Codes (U, S) -> m (U, C), in the type of the codes: float32."""
        scale = layers.row_product(codes, self.scale.kernel[...].astype(codes.dtype))
        scale = self.gain[...] * normalise_scale(scale, self.spec.modulation)
        return scale + 1.0 if self.spec.add_one else scale

    def __call__(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """x (B, U, C), codes (U, S) or (1, S) -> (B, U, D)."""
        modulation = for_each_image(self.modulation(codes).astype(x.dtype), x.shape[0])
        y = layers.row_product(x * modulation, self.kernel[...])
        return y if self.bias is None else y + layers.align_rank(self.bias[...], y)


class ModulatedFFN(nnx.Module):
    """x + drop_path(gamma * W2(act(W1(norm x)))), both layers modulated; act is GEGLU or GELU.

    Source: docs/reference.md#nac-ffn.
    """

    def __init__(self, spec: NACSpec, layer_scale: float, *, rngs: nnx.Rngs):
        self.geglu = spec.geglu
        d, hidden = spec.state_dim, spec.hidden_dim
        self.norm = layers.layer_norm(d, LAYER_NORM_EPS, rngs=rngs)
        self.fc1 = ModulatedLinear(d, hidden * (2 if spec.geglu else 1), spec, rngs=rngs)
        self.fc2 = ModulatedLinear(hidden, d, spec, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((d,), layer_scale))

    def __call__(
        self,
        states: jax.Array,
        codes: jax.Array,
        rate: jax.Array | float | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """States (B, U, D), codes (U, S) -> (B, U, D); `rate` and `key` are of drop-path."""
        x = self.fc1(self.norm(states), codes)
        if self.geglu:
            x, gate = jnp.split(x, 2, axis=-1)
            x = x * layers.gelu(gate)
        else:
            x = layers.gelu(x)
        y = self.fc2(x, codes)
        return states + layers.drop_path(layers.align_rank(self.gamma[...], y) * y, rate, key)
