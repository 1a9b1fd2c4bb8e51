"""A network is a chain of stages; a phase trains some of them while the others stand still.

Axes: B batch, H height, W width, N tokens, D channels, K classes.

A stage maps activations to activations: the first takes images (B, H, W, 3), the middle ones
tokens (B, N, D), the last gives logits (B, K). Flax NNX modules describe stages; training works on
plain nested dicts of arrays (`split` / `merge`), which jax.jit handles at a tenth of the Python
cost of nnx.jit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Parameters whose values are small sums or differences of near-equal numbers: always float32.
FLOAT32_NAMES = ("signatures", "codes", "bandwidth", "gain")
# Modules that stay in float32 as a whole: a router compares near-equal numbers.
FLOAT32_MODULES = ("router",)


class Fixed(nnx.Variable):
    """Random numbers drawn once, never trained, saved with the parameters."""


class Stage(nnx.Module):
    """One link of a chain.

    Subclasses define `depth` (how many drop-path rates they take) and
    `__call__(x, *, rates, key, train)`:
        rates: one drop-path rate per block, or None for no drop-path.
        key: source of all randomness; None means deterministic.
        train: whether training-time noise (drop-path, code noise, sampled kernels) is on. With a
            key but without `train`, only the noise that the published evaluation draws is drawn.
    """

    depth: int = 0

    def observed(self, x, *, rates=None, key=None, train=False) -> tuple[jax.Array, dict]:
        """Like calling the stage, and arrays to watch or to put into a loss, by name."""
        return self(x, rates=rates, key=key, train=train), {}

    def join(self, after: Stage) -> Stage | None:
        """One stage that does what this one and then `after` do, or None if there is none."""
        return None


@dataclass(frozen=True)
class SplitStage:
    """A stage taken apart: structure, and plain nested dicts of trainable and fixed arrays."""

    graph: nnx.GraphDef
    params: dict
    fixed: dict


def split(stage: nnx.Module) -> SplitStage:
    """Takes a stage apart into structure, trainable parameters and fixed arrays."""
    graph, params, fixed = nnx.split(stage, nnx.Param, Fixed)
    return SplitStage(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(fixed))


@functools.lru_cache(maxsize=256)
def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> SplitStage:
    """A stage's structure and the shapes of its arrays, without computing anything.

    Remembered per `build`: tracing a large stage takes as long as many steps of a small one.
    """
    return split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


def initialise(
    build: Callable[[nnx.Rngs], nnx.Module],
    key: jax.Array,
    shardings: Callable[[dict], dict] | None = None,
) -> SplitStage:
    """A stage with fresh arrays, drawn in one compiled program: op by op takes ten times longer.

    shardings: a tree of shapes -> where its arrays are wanted. Each device then draws its part of
    the same numbers; None: all of them on the first device.
    """

    def arrays(key):
        parts = split(build(nnx.Rngs(key)))
        # Constants come weakly typed, optimizers give back strong types: the step of a fresh
        # network would be compiled twice more.
        strong = lambda x: jax.lax.convert_element_type(x, x.dtype)  # noqa: E731
        return jax.tree.map(strong, (parts.params, parts.fixed))

    # It runs once: optimising it takes the CPU compiler six times as long as not to.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shapes = abstract(build)
    where = None if shardings is None else (shardings(shapes.params), shardings(shapes.fixed))
    draw = jax.jit(arrays, compiler_options=options, out_shardings=where)
    return SplitStage(shapes.graph, *draw(key))


def merge(graph: nnx.GraphDef, params: dict, fixed: dict) -> nnx.Module:
    """Puts a stage together again; the dicts must have exactly the structure of `split`'s."""
    return nnx.merge(graph, nnx.State(params), nnx.State(fixed))


def run(
    stages: Sequence[Stage],
    x: jax.Array,
    *,
    rates: Sequence[Sequence[float] | None] | None = None,
    key: jax.Array | None = None,
    train: bool = False,
) -> jax.Array:
    """Runs a chain. `rates[i]` are the drop-path rates of stage i's blocks (None: none)."""
    return run_observed(stages, x, rates=rates, key=key, train=train)[0]


def run_observed(
    stages: Sequence[Stage],
    x: jax.Array,
    *,
    rates: Sequence[Sequence[float] | None] | None = None,
    key: jax.Array | None = None,
    train: bool = False,
) -> tuple[jax.Array, list[dict]]:
    """`run`, and what each stage lets see of itself (`Stage.observed`)."""
    seen = []
    for i, stage in enumerate(stages):
        x, observed = stage.observed(
            x,
            rates=None if rates is None else rates[i],
            key=None if key is None else jax.random.fold_in(key, i),
            train=train,
        )
        seen.append(observed)
    return x, seen


def join(stages: Sequence[Stage], rates: Sequence | None) -> tuple[list[Stage], list | None]:
    """The same chain in fewer stages, where neighbours can be joined.

    Ten stages of equal blocks are ten loops to compile, and one when joined.
    """
    joined: list[Stage] = []
    ramps: list = []
    for i, stage in enumerate(stages):
        ramp = rates[i] if rates is not None else None
        both = joined[-1].join(stage) if joined else None
        if both is None:
            joined.append(stage)
            ramps.append(ramp)
            continue
        if ramp is not None or ramps[-1] is not None:
            ramps[-1] = (ramps[-1] or (0.0,) * joined[-1].depth) + (ramp or (0.0,) * stage.depth)
        joined[-1] = both
    return joined, None if rates is None else ramps


def linear_rates(depths: Sequence[int], rate: float) -> list[tuple[float, ...]]:
    """Drop-path rates that grow linearly from 0 to `rate` over ALL blocks, cut by stage."""
    total = sum(depths)
    ramp = np.linspace(0.0, rate, total) if total else np.zeros(0)
    ends = np.cumsum(depths)
    return [
        tuple(float(r) for r in ramp[end - depth : end])
        for depth, end in zip(depths, ends, strict=True)
    ]


def cast_compute(params: dict, dtype: jnp.dtype) -> dict:
    """Parameters in the compute type; FLOAT32_NAMES and FLOAT32_MODULES stay in float32."""
    if dtype == jnp.float32:
        return params

    def cast(path, leaf):
        names = [entry.key for entry in path]
        kept = names[-1] in FLOAT32_NAMES or any(name in FLOAT32_MODULES for name in names)
        return leaf if kept else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def part(params: dict, path: Sequence[str]) -> dict:
    """Only what lies at `path` in nested dicts, nested as it was; all of it for an empty path."""
    return {path[0]: part(params[path[0]], path[1:])} if path else params


def overlaid(params: dict, changed: dict) -> dict:
    """Nested dicts with what `changed` has, a part of them or all, in its place."""
    new = dict(params)
    for name, value in changed.items():
        nested = isinstance(value, dict) and name in params
        new[name] = overlaid(params[name], value) if nested else value
    return new


def count(params: dict) -> int:
    """Number of numbers in a tree of arrays (or of shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
