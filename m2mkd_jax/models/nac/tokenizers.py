"""Images to tokens (ConvNeXt) and output states to logits.

Axes: B batch, H height, W width, T token channels, V tokens, U output latents, D state, K classes.

Source: Liu et al. 2022 (ConvNeXt, arXiv 2201.03545) and Weiss et al. 2022 (arXiv 2210.08031);
docs/reference.md#nac-tokenizer, docs/reference.md#nac-output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.models import depthwise, layers
from m2mkd_jax.models.batching import for_each_image
from m2mkd_jax.models.nac.spec import STAGE_STRIDE, STEM_STRIDE, NACSpec

CONVNEXT_EPS = 1e-6
CONVNEXT_LAYER_SCALE = 1e-6
CONVNEXT_KERNEL = 7


class ConvNeXtBlock(nnx.Module):
    """x + gamma * linear(gelu(linear(norm(depthwise x)))): (B, H, W, T) -> same shape.

    Source: docs/reference.md#nac-tokenizer.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        init = {"kernel_init": layers.transformer_init, "rngs": rngs}
        self.depthwise = depthwise.DepthwiseConv(width, CONVNEXT_KERNEL, **init)
        self.norm = layers.layer_norm(width, CONVNEXT_EPS, rngs=rngs)
        self.fc1 = layers.Linear(width, 4 * width, **init)
        self.fc2 = layers.Linear(4 * width, width, **init)
        self.gamma = nnx.Param(jnp.full((width,), CONVNEXT_LAYER_SCALE))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.fc2(layers.gelu(self.fc1(self.norm(self.depthwise(x)))))
        return x + layers.align_rank(self.gamma[...], y) * y


class ConvNeXtStage(nnx.Module):
    """Downsampling and blocks: (B, H, W, C) -> (B, H', W', D).

    The first stage downsamples, then normalises; later stages normalise first.
    """

    def __init__(self, c: int, d: int, depth: int, *, first: bool, rngs: nnx.Rngs):
        self.first = first
        self.norm = layers.layer_norm(d if first else c, CONVNEXT_EPS, rngs=rngs)
        self.downsample = layers.Patches(
            STEM_STRIDE if first else STAGE_STRIDE,
            c,
            d,
            kernel_init=layers.transformer_init,
            bias_init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.blocks = (
            layers.stack(lambda rngs: ConvNeXtBlock(d, rngs=rngs), depth, rngs=rngs)
            if depth
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.downsample(x)) if self.first else self.downsample(self.norm(x))
        if self.blocks is None:
            return x
        apply = lambda block, x, _: (block(x), None)
        return layers.scan_stack(self.blocks, x, None, apply, short=True)[0]


class Tokenizer(nnx.Module):
    """ConvNeXt features concatenated with a learned positional grid: (B, H, W, C) -> (B, V, T).

    Source: docs/reference.md#nac-tokenizer.
    """

    def __init__(self, spec: NACSpec, *, rngs: nnx.Rngs):
        widths = (spec.channels, *spec.tokenizer_widths)
        self.count = len(spec.tokenizer_depths)
        for i, depth in enumerate(spec.tokenizer_depths):
            # Separate attributes: a list would put integers among the names of a checkpoint.
            stage = ConvNeXtStage(widths[i], widths[i + 1], depth, first=i == 0, rngs=rngs)
            setattr(self, f"stage_{i}", stage)
        shape = (spec.grid, spec.grid, spec.position_dim)
        self.grid = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i in range(self.count):
            x = getattr(self, f"stage_{i}")(x)
        grid = for_each_image(self.grid[...].astype(x.dtype), x.shape[0])
        return rearrange(jnp.concatenate([x, grid], -1), "b h w t -> b (h w) t")


class OutputPooling(nnx.Module):
    """Softmax over the output latents' confidences, then a linear layer to the logits.

    The confidence bias cancels in the softmax; with one latent the whole scorer gets no gradient.

    Source: docs/reference.md#nac-output.
    """

    def __init__(self, state_dim: int, classes: int, *, rngs: nnx.Rngs):
        self.confidence = layers.torch_linear(state_dim, 1, rngs=rngs)
        self.to_logits = layers.torch_linear(state_dim, classes, rngs=rngs)

    def __call__(self, states: jax.Array, gumbel: jax.Array | None = None) -> jax.Array:
        """Pools output latents.

        Args:
            states: (B, U, D).
            gumbel: Gumbel noise (B, U); None for a plain softmax.

        Returns:
            Logits (B, K), float32.
        """
        confidence = self.confidence(states)[..., 0].astype(jnp.float32)
        if gumbel is not None:
            confidence = confidence + gumbel
        weights = jax.nn.softmax(confidence).astype(states.dtype)
        return self.to_logits(jnp.einsum("buc,bu->bc", states, weights)).astype(jnp.float32)
