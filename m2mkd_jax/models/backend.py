"""Which platform programs are traced for; layers choose the form that is fast there.

It is JAX's default backend, but for programs that are compiled for a device that is not there.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar(
    "target", default=None
)


@contextlib.contextmanager
def tracing_for(platform: str, compute_capability: str = "") -> Iterator[None]:
    """Traces what is traced inside for another platform than JAX's default backend.

    What `jax.jit` has traced before with the same shapes is taken from its cache.

    Args:
        platform: 'cpu', 'gpu' or 'tpu'.
        compute_capability: of an NVIDIA GPU, such as '9.0'.
    """
    token = _TARGET.set((platform, compute_capability))
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform() -> str:
    """The platform that programs are traced for: 'cpu', 'gpu' or 'tpu'."""
    target = _TARGET.get()
    return target[0] if target else jax.default_backend()


def compute_capability() -> str:
    """Compute capability of the GPU that programs are traced for; AMD's starts with letters."""
    target = _TARGET.get()
    return target[1] if target else str(getattr(jax.local_devices()[0], "compute_capability", ""))
