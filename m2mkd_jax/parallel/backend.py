"""Which platform programs are traced for; layers choose the form that is fast there.

It is JAX's default backend, but for programs that are compiled for a device that is not there.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

ANY = "any"  # a platform: see tracing_for
_LEVEL = "xla_backend_optimization_level"
# Fused kernels through MLIR: faster ones, which take a third of the time of compiling.
_EMITTERS = "xla_cpu_use_fusion_emitters"
# The order of a CPU program's kernels: by default the one in which most can run at the same time.
_SCHEDULER = "xla_cpu_scheduler_type"
_LEAST_MEMORY = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
LARGE = 2**27  # bytes of arguments from which on a program takes the order of least memory
# On a GPU XLA would generate norms and softmaxes as single kernels, and matrix products of its own.
_GPU_OPTIONS = {
    "xla_disable_hlo_passes": "triton-softmax-rewriter",
    "xla_gpu_enable_triton_gemm": False,
}
_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar(
    "target", default=None
)


@contextlib.contextmanager
def tracing_for(platform: str, compute_capability: str = "") -> Iterator[None]:
    """Traces what is traced inside for another platform than JAX's default backend.

    What `jax.jit` has traced before with the same shapes is taken from its cache.

    Args:
        platform: 'cpu', 'gpu', 'tpu', or ANY: forms of plain operations alone, which also take a
            batch whose size is not known (jax.export).
        compute_capability: of an NVIDIA GPU, such as '9.0'.
    """
    token = _TARGET.set((platform, compute_capability))
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform() -> str:
    """The platform that programs are traced for: 'cpu', 'gpu', 'tpu' or ANY."""
    target = _TARGET.get()
    return target[0] if target else jax.default_backend()


def is_named() -> bool:
    """Whether the platform is one that `tracing_for` names: programs may never run here."""
    return _TARGET.get() is not None


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Traces what is traced inside for the device at hand, as programs that never run.

    As with `tracing_for`, jax keeps what it has traced: of functions that live longer than this.
    """
    with tracing_for(platform(), compute_capability()):
        yield


def is_one_cpu() -> bool:
    """Whether programs are traced for a CPU that is the only device."""
    return platform() == "cpu" and jax.device_count() == 1


class CompiledFunction:
    """`jax.jit` of a function, with options of the compiler; made by `jit`.

    jax refuses options inside another program: there this is a plain `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any], **arguments: Any):
        self._inside = jax.jit(function, **arguments)
        self._compile = functools.partial(jax.jit, function, **arguments)
        self._options = options
        self._compiled: Any = None
        # Not its attributes: a transformed CompiledFunction has copies of this class's.
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._for(arguments)(*arguments)
        except ValueError:
            # Looked at here only: walking a training state takes half a millisecond.
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
                raise
        return self._inside(*arguments)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """As `jax.jit`'s."""
        return self._for(arguments).trace(*arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s."""
        return self._for(arguments).lower(*arguments)

    def _for(self, arguments: tuple[Any, ...]) -> Any:
        """The program; whether it is large, the first arguments decide."""
        if self._compiled is None:
            options = dict(self._options)
            orders = platform() == "cpu" and not _is_flag(_SCHEDULER)
            large = orders and array_bytes(arguments) >= LARGE
            if large and is_option(_SCHEDULER, _LEAST_MEMORY):
                options[_SCHEDULER] = _LEAST_MEMORY
            self._compiled = self._compile(compiler_options=options)
        return self._compiled


def array_bytes(tree: Any) -> int:
    """Of all arrays in a tree, or that its shapes stand for; a size that is not known counts 1."""
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, kinds)]
    return sum(
        math.prod(n for n in array.shape if isinstance(n, int)) * array.dtype.itemsize
        for array in arrays
    )


def jit(function: Callable[..., Any], *, once: bool = False, **arguments: Any) -> Any:
    """`jax.jit` for a program of this package.

    On a CPU the higher of LLVM's optimisation levels take 20 to 40% longer to compile a training
    step and make it no faster (benchmarks/RESULTS.md): products are a library's, and level 1 also
    vectorises loops. Programs whose arguments have `LARGE` bytes or more run their kernels in the
    order that needs least memory: that saves up to a third of a step's temporary arrays and up to
    10% of its time, as every kernel keeps all cores busy; small ones take up to 12% longer then,
    as fewer run side by side.

    On a GPU a NAC's training step compiles in half the time without XLA's own kernels for norms and
    softmaxes, and moves as many bytes; with XLA's own matrix products besides the library's it took
    minutes to compile.

    What is set in $XLA_FLAGS stays.

    Args:
        function: to compile.
        once: it runs once, and compiling it takes longer than running it.
        arguments: of `jax.jit`.
    """
    options: dict[str, Any] = {}
    if platform() == "gpu":
        options = {
            name: value
            for name, value in _GPU_OPTIONS.items()
            if not _is_flag(name) and is_option(name, value)
        }
    elif platform() != "cpu":
        return jax.jit(function, **arguments)
    elif not _is_flag(_LEVEL):
        options[_LEVEL] = 0 if once else 1
        if once and is_option(_EMITTERS, False):
            options[_EMITTERS] = False
    return CompiledFunction(function, options, **arguments)


def _is_flag(name: str) -> bool:
    """Whether $XLA_FLAGS sets an option; it holds flags, or names a file of them."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):
        with contextlib.suppress(OSError):
            flags = Path(flags).read_text(encoding="utf-8", errors="replace")
    return name in flags


@functools.cache
def is_option(name: str, value: bool | str) -> bool:
    """Whether the compiler that is installed knows an option and its value; it refuses others."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compute_capability() -> str:
    """Compute capability of the GPU that programs are traced for; AMD's starts with letters."""
    target = _TARGET.get()
    return target[1] if target else str(getattr(jax.local_devices()[0], "compute_capability", ""))
