"""What the fused GPU kernels of this package have in common.

Axes: B batch, U latents, D channels, G groups of images.

The kernels are written in Pallas and compiled by Triton. A program of a kernel takes a few latents
and walks through the images of one group, so that what belongs to a latent (its modulation) is read
once, and the sum over images that is its gradient stays in registers. Every group writes its own
part of such a sum; XLA adds the parts, so that results do not depend on the order of programs.

Triton's blocks have powers of two as sizes. Channels are therefore taken in chunks, of the largest
power of two that divides their number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from m2mkd_jax.models.nac.fused.choice import LATENTS, chunk
from m2mkd_jax.parallel import backend

# Programs that fill a large GPU: 8 for each of 132 multiprocessors.
PROGRAMS = 1056

Chunks = list[jax.Array]


def once(function: Callable[..., Any], *, static: Sequence[str] = ()) -> Callable[..., Any]:
    """Traces a function once for shapes and device, however many propagators call it.

    Args:
        function: of arrays, and of keywords that are static.
        static: names of those.
    """

    @functools.partial(jax.jit, static_argnames=("device", *static))
    def traced(*arguments: Any, device: tuple[str, str], **options: Any) -> Any:
        del device  # tells apart what is traced for different ones
        return function(*arguments, **options)

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        device = backend.platform(), backend.compute_capability()
        return traced(*arguments, device=device, **options)

    return called


def call(
    kernel: Callable[..., None],
    name: str,
    grid: Sequence[int],
    results: Any,
    *arguments: jax.Array,
    warps: int = 4,
    stages: int = 2,
) -> Any:
    """Runs a kernel on whole arrays.

    Where programs are traced for another platform than a GPU, it is interpreted.

    Args:
        kernel: of references to the arguments and to the results.
        name: in profiles.
        grid: numbers of programs; neighbours on the first axis run together.
        results: shapes and types.
        arguments: arrays.
        warps: of a program.
        stages: of its loops.
    """
    return pl.pallas_call(
        kernel,
        grid=tuple(grid),
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=backend.platform() != "gpu",
        name=name,
    )(*arguments)


def grid(batch: int, latents: int) -> tuple[int, int]:
    """Blocks of latents, and groups of images G: the divisor of B with which they fill a GPU."""
    blocks = latents // LATENTS
    wanted = max(1, PROGRAMS // blocks)
    return blocks, max(g for g in range(1, batch + 1) if batch % g == 0 and g <= wanted)


class Norm(NamedTuple):
    """Scale and bias (D,) of a LayerNorm."""

    scale: jax.Array
    bias: jax.Array


class Rows:
    """Where a program reads and writes: latents from `first` on, in chunks of channels."""

    def __init__(self, channels: int, first: Any, latents: int = LATENTS):
        self.channels, self.first, self.latents = channels, first, latents
        self.width = chunk(channels)
        self.chunks = range(channels // self.width)

    def index(self, *lead: Any, part: int, offset: int = 0) -> tuple[Any, ...]:
        """Index of a chunk: leading indices, latents, channels from `offset` on."""
        start = offset + part * self.width
        return (*lead, pl.ds(self.first, self.latents), pl.ds(start, self.width))

    def read(self, ref: Any, *lead: Any, offset: int = 0, mask: Any = None) -> Chunks:
        """Chunks (latents, width) of an array, in float32; zero where the mask is not."""
        return [
            _load(ref, self.index(*lead, part=part, offset=offset), mask) for part in self.chunks
        ]

    def write(
        self,
        ref: Any,
        values: Sequence[jax.Array],
        *lead: Any,
        offset: int = 0,
        mask: Any = None,
    ) -> None:
        """Writes chunks in the type of the array; nowhere where the mask is not."""
        for part, value in zip(self.chunks, values, strict=True):
            at = ref.at[self.index(*lead, part=part, offset=offset)]
            triton.store(at, value.astype(ref.dtype), mask=_spread(mask, value.shape))

    def shared(self, ref: Any) -> Chunks:
        """Chunks (1, width) of an array (D,), in float32."""
        return [
            ref[pl.ds(part * self.width, self.width)].astype(jnp.float32)[None]
            for part in self.chunks
        ]

    def zeros(self) -> Chunks:
        """Chunks of zeros."""
        return [jnp.zeros((self.latents, self.width), jnp.float32) for _ in self.chunks]


def _load(ref: Any, index: tuple[Any, ...], mask: Any) -> jax.Array:
    if mask is None:
        return ref[index].astype(jnp.float32)
    shape = (index[-2].size, index[-1].size)
    value = triton.load(ref.at[index], mask=_spread(mask, shape), other=0.0)
    return value.astype(jnp.float32)


def _spread(mask: Any, shape: tuple[int, ...]) -> Any:
    return None if mask is None else jnp.broadcast_to(mask, shape)


def normalise(x: Chunks, epsilon: float) -> tuple[Chunks, jax.Array]:
    """Chunks of a row -> (x - mean) / deviation, and 1 / deviation (latents, 1)."""
    channels = sum(part.shape[-1] for part in x)
    mean = _total(x) / channels
    centred = [part - mean for part in x]
    variance = _total([part * part for part in centred]) / channels
    inverse = jax.lax.rsqrt(variance + epsilon)
    return [part * inverse for part in centred], inverse


def normalise_backward(grad: Chunks, normalised: Chunks, inverse: jax.Array) -> Chunks:
    """Gradient of `normalise` by x."""
    channels = sum(part.shape[-1] for part in grad)
    mean = _total(grad) / channels
    along = _total([g * n for g, n in zip(grad, normalised, strict=True)]) / channels
    return [(g - mean - n * along) * inverse for g, n in zip(grad, normalised, strict=True)]


def _total(x: Chunks) -> jax.Array:
    """Sum over all channels: (latents, 1)."""
    return functools.reduce(jnp.add, [part.sum(-1, keepdims=True) for part in x])


def mul(a: Chunks, b: Chunks) -> Chunks:
    return [x * y for x, y in zip(a, b, strict=True)]


def add(a: Chunks, b: Chunks) -> Chunks:
    return [x + y for x, y in zip(a, b, strict=True)]


def walk(images: int, body: Callable[[Any, Any], Any], sums: Any) -> Any:
    """Carries sums through the images of the program's group."""
    first = pl.program_id(1) * images
    return jax.lax.fori_loop(0, images, lambda i, sums: body(first + i, sums), sums)


def write_channels(ref: Any, rows: Rows, sums: Chunks) -> None:
    """Writes sums over the latents of a program to its row of an array (blocks, G, D)."""
    sums = [part.sum(0, keepdims=True) for part in sums]
    Rows(rows.channels, pl.program_id(1), 1).write(ref, sums, pl.program_id(0))


def like(x: jax.Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape or x.shape, x.dtype)


def sums_like(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
