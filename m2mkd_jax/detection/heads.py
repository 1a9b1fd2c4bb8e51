"""Box head, box predictor and mask head.

Axes: R regions, P pooled side, C channels, F width, K classes, M side of a mask.

Source: He et al. 2017 (arXiv 1703.06870), section 3; Li et al. 2022 (arXiv 2203.16527), appendix;
docs/detection.md#roi-heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.detection.convolution import Conv, ConvNorm, Upsample, kaiming_fan_out

BOX_BINS, MASK_BINS, MASK_SIDE = 7, 14, 28
CONVOLUTIONS = 4

# Kaiming uniform with a = 1: uniform within sqrt(3 / fan_in).
_fc_init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")


class Convolutions(nnx.Module):
    """Four 3x3 convolutions C -> C, each with LayerNorm and ReLU."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        for i in range(CONVOLUTIONS):
            conv = ConvNorm(channels, channels, 3, kernel_init=kaiming_fan_out, rngs=rngs)
            setattr(self, f"conv{i + 1}", conv)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(CONVOLUTIONS):
            x = jax.nn.relu(getattr(self, f"conv{i + 1}")(x))
        return x


class BoxHead(Convolutions):
    """Pooled regions (R, 7, 7, C) -> (R, F)."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        super().__init__(channels, rngs=rngs)
        self.fc1 = nnx.Linear(BOX_BINS**2 * channels, width, kernel_init=_fc_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.fc1(super().__call__(x).reshape(len(x), -1)))


class BoxPredictor(nnx.Module):
    """(R, F) -> logits (R, K + 1), the background last, and deltas (R, K, 4), float32."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        self.classes = classes
        init = nnx.initializers.normal
        self.cls_score = nnx.Linear(width, classes + 1, kernel_init=init(0.01), rngs=rngs)
        self.bbox_pred = nnx.Linear(width, 4 * classes, kernel_init=init(0.001), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        deltas = self.bbox_pred(x).reshape(len(x), self.classes, 4)
        return self.cls_score(x).astype(jnp.float32), deltas.astype(jnp.float32)


class MaskHead(Convolutions):
    """Pooled regions (R, 14, 14, C) -> logits (R, 28, 28, K), float32."""

    def __init__(self, channels: int, classes: int, *, rngs: nnx.Rngs):
        super().__init__(channels, rngs=rngs)
        self.deconv = Upsample(channels, channels, kernel_init=_upsample_init, rngs=rngs)
        init = nnx.initializers.normal(0.001)
        self.predictor = Conv(channels, classes, 1, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.deconv(super().__call__(x)))
        return self.predictor(x).astype(jnp.float32)


def _upsample_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Kaiming normal by fan-out of a transposed convolution, which PyTorch takes to be 4 C."""
    deviation = (2 / (4 * shape[0])) ** 0.5
    return deviation * jax.random.normal(key, shape, dtype)
