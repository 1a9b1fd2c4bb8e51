"""Whether a NAC's propagators are computed by fused kernels.

Axes: B batch, I input latents, U mediators, V = I + U senders, D state.

`NACSpec.fused` says 'never', 'always' (wherever the kernels are made for) or 'auto': where in
addition they agree with XLA's on the GPU at hand. They are checked there once in a process, because
Triton's compiler and the cards it compiles for differ.

Pallas is imported where it is needed only: jax 0.11 deprecates its Triton compiler, and where jax
has none any more propagators are XLA's.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.attention import has_tensor_cores
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.parallel import backend
from m2mkd_jax.parallel.process import say

# Receivers and senders of a tile of attention, latents of a program, and the widest chunk of
# channels: four numbers of a row for each thread of four warps.
TILE = 64
LATENTS = 2
WIDEST = 512
# Narrowest chunk of channels for which a kernel is worth its launch.
NARROWEST = 32
HEAD_DIMS = (16, 32, 64, 128)
# Of the heads together: with more a program of attention's backward pass runs out of registers.
MOST_HEADS, MOST_CHANNELS = 16, 1024


def chunk(channels: int) -> int:
    """Channels of a chunk: the largest power of two that divides them all, `WIDEST` at most."""
    return min(channels & -channels, WIDEST)


def takes(spec: NACSpec, dtype: Any) -> bool:
    """Whether the kernels are made for the sizes of a NAC and for a type."""
    u = spec.mediator_latents
    return (
        spec.geglu
        and spec.stochastic_kernel
        and spec.persistent_inputs
        and not (spec.share_propagators or spec.share_ffn)
        and dtype in (jnp.bfloat16, jnp.float16)
        and u % TILE == 0
        and spec.input_latents % TILE == 0
        and spec.head_dim in HEAD_DIMS
        and spec.heads <= MOST_HEADS
        and spec.inner_dim <= MOST_CHANNELS
        and all(chunk(n) >= NARROWEST for n in (spec.state_dim, spec.inner_dim, spec.hidden_dim))
    )


def is_fused(spec: NACSpec, batch: int, dtype: Any) -> bool:
    """Whether the propagators of a training step are computed by fused kernels.

    Args:
        spec: of the NAC.
        batch: B, on all devices of the mesh.
        dtype: of the states.

    Raises:
        UserError: 'always', and jax has no Triton.
    """
    if spec.fused == "never" or not has_tensor_cores() or not takes(spec, dtype):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and batch % mesh.size:
        return False
    if spec.fused == "always":
        _require_triton()
        return True
    # Nothing is checked for programs that are counted, or compiled for a GPU that is not there.
    if backend.is_named():
        return True
    # Processes that came to different results would wait for each other for ever.
    return jax.process_count() == 1 and agrees(spec, jnp.dtype(dtype))


def _require_triton() -> None:
    try:
        import_module("jax.experimental.pallas.triton")
    except ImportError as error:
        raise UserError(
            f"config.nac.fused='always': jax {jax.__version__} has no Triton for Pallas ({error}); "
            "use 'auto' or 'never'"
        ) from None


@functools.cache
def agrees(spec: NACSpec, dtype: jnp.dtype) -> bool:
    """Whether the kernels give XLA's results and gradients on this device.

    Says so where they do not.
    """
    # A step is being traced here; in another thread functions run.
    with ThreadPoolExecutor(1) as thread:
        trouble = thread.submit(_trouble, spec, dtype).result()
    if trouble:
        say(
            f"nac: propagators without fused kernels, {trouble}; "
            "config.nac.fused='never' skips the check"
        )
    return not trouble


def _trouble(spec: NACSpec, dtype: jnp.dtype) -> str:
    """What is wrong with the kernels on this device; empty: nothing."""
    try:
        agreement = import_module("m2mkd_jax.models.nac.fused.agreement")
        apart = agreement.distances(spec, dtype)
    except Exception as error:  # of jax, compiler or driver, which have no common type
        lines = str(error).splitlines() or [""]
        return f"which fail on this device: {type(error).__name__}: {lines[0][:200]}"
    wrong = [name for name, distance in apart.items() if not distance.is_rounding]
    return f"which give other numbers on this device: {', '.join(wrong[:4])}" if wrong else ""
