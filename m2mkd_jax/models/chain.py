"""A network is a chain of stages; each phase of m2mKD trains some of them and freezes the others.

Axes: B batch, H height, W width, N tokens, D channels, K classes.

A stage maps activations to activations: the first takes images (B, H, W, C), the middle ones
tokens (B, N, D), the last gives logits (B, K). Flax NNX modules describe stages. Training works on
plain nested dicts of arrays (`split` and `merge`): jax.jit dispatches these at a tenth of the
Python cost of nnx.jit.

Source: arXiv 2402.16918, section 3; docs/reference.md#vit-stages, docs/reference.md#teaching.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2mkd_jax.parallel import backend

# Parameters whose values are small sums or differences of near-equal numbers: always float32.
FLOAT32_NAMES = ("signatures", "codes", "bandwidth", "gain")
# Modules that stay in float32 as a whole: a router compares near-equal numbers.
FLOAT32_MODULES = ("router",)

Rates = Sequence[float] | None


class Fixed(nnx.Variable):
    """Random numbers that are drawn once, never trained, and saved with the parameters."""


class Stage(nnx.Module):
    """One stage of a chain. Subclasses define `__call__`.

    Attributes:
        depth: number of blocks, which is the number of drop-path rates that the stage takes.
    """

    depth: int = 0

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Computes the stage's output.

        Args:
            x: images (B, H, W, C) or tokens (B, N, D).
            rates: one drop-path rate per block; None for no drop-path.
            key: source of all randomness; None means deterministic.
            train: turns training-time noise on (drop-path, code noise, sampled kernels). With a key
                but without `train`, only the noise of the published evaluation is drawn.

        Returns:
            Tokens (B, N, D) or logits (B, K).
        """
        raise NotImplementedError

    def with_aux(
        self,
        x: jax.Array,
        *,
        rates: Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the stage's output and also returns auxiliary outputs.

        Args:
            x, rates, key, train: as for `__call__`.

        Returns:
            The output, and arrays by name that are logged or added to the loss.
        """
        return self(x, rates=rates, key=key, train=train), {}

    def join(self, after: Stage) -> Stage | None:
        """Joins this stage and the one after it into a single stage that computes the same.

        Args:
            after: the next stage of the chain.

        Returns:
            The joined stage, or None where the two cannot be joined.
        """
        return None


@dataclass(frozen=True)
class SplitStage:
    """A stage split into its structure and its arrays.

    Attributes:
        graph: structure of the module.
        params: trainable arrays (or their shapes) in nested dicts.
        fixed: arrays of type `Fixed` in nested dicts.
    """

    graph: nnx.GraphDef
    params: dict[str, Any]
    fixed: dict[str, Any]


def split(stage: nnx.Module) -> SplitStage:
    """Splits a stage into structure, trainable parameters and fixed arrays."""
    graph, params, fixed = nnx.split(stage, nnx.Param, Fixed)
    return SplitStage(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(fixed))


def merge(graph: nnx.GraphDef, params: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """Rebuilds a stage; the dicts must have exactly the structure that `split` gave."""
    return nnx.merge(graph, nnx.State(params), nnx.State(fixed))


@functools.lru_cache(maxsize=256)
def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> SplitStage:
    """A stage's structure and the shapes of its arrays, without computing anything.

    Cached per `build`: tracing a large stage takes as long as many steps of a small one.
    """
    stage = split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    # Constants are weakly typed, and the arrays of `initialise` are not: a program that is compiled
    # for the one would be compiled once more for the other.
    def strong(tree: dict[str, Any]) -> dict[str, Any]:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    return dataclasses.replace(stage, params=strong(stage.params), fixed=strong(stage.fixed))


class _Stream(nnx.RngStream):
    """A stream whose keys are computed many at a time: one by one they take longer to compile.

    Traced in one program; the keys are those of `nnx.RngStream`.
    """

    def __init__(self, key: jax.Array, *, tag: str):
        super().__init__(key, tag=tag)
        self._drawn = _Drawn()

    def __call__(self) -> jax.Array:
        return self._drawn.next(self.key[...])


class _Drawn:
    """How many keys have been drawn from each key: one of the stream, others inside of vmap."""

    AT_ONCE = 64

    def __init__(self) -> None:
        self._states: dict[int, tuple[jax.Array, int, jax.Array]] = {}

    def next(self, key: jax.Array) -> jax.Array:
        _, count, block = self._states.get(id(key), (key, 0, key))
        place = count % self.AT_ONCE
        if not place:
            counts = jnp.arange(count, count + self.AT_ONCE, dtype=jnp.uint32)
            block = jax.vmap(jax.random.fold_in, (None, 0))(key, counts)
        self._states[id(key)] = (key, count + 1, block)  # with the key, or another gets its id
        return jax.lax.index_in_dim(block, place, keepdims=False)


def initialise(
    build: Callable[[nnx.Rngs], nnx.Module],
    key: jax.Array,
    shardings: Callable[[dict[str, Any]], Any] | None = None,
) -> SplitStage:
    """A stage with fresh arrays, drawn in one compiled program: op by op takes ten times longer.

    Args:
        build: makes the stage from random number generators.
        key: seeds these generators.
        shardings: maps a tree of shapes to a tree of shardings, so that each device draws its own
            part of the same numbers; None puts all arrays on the first device.
    """

    def arrays(key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        rngs = nnx.Rngs(key)
        rngs.default = _Stream(key, tag="default")
        parts = split(build(rngs))

        # Constants are weakly typed and optimizers return strong types: without this the step of a
        # fresh network would be compiled twice more.
        def strong(x: jax.Array) -> jax.Array:
            return jax.lax.convert_element_type(x, x.dtype)

        return jax.tree.map(strong, (parts.params, parts.fixed))

    shapes = abstract(build)
    places = None if shardings is None else (shardings(shapes.params), shardings(shapes.fixed))
    draw = backend.jit(arrays, once=True, out_shardings=places)
    return SplitStage(shapes.graph, *draw(key))


def run(
    stages: Sequence[Stage],
    x: jax.Array,
    *,
    rates: Sequence[Rates] | None = None,
    key: jax.Array | None = None,
    train: bool = False,
) -> jax.Array:
    """Runs a chain.

    Args:
        stages: the chain, in order.
        x: images (B, H, W, C), or tokens (B, N, D) when the chain starts in the middle.
        rates: drop-path rates of every stage's blocks; None for no drop-path.
        key, train: as for `Stage.__call__`; each stage gets a key of its own.

    Returns:
        The last stage's output.
    """
    return run_with_aux(stages, x, rates=rates, key=key, train=train)[0]


def run_with_aux(
    stages: Sequence[Stage],
    x: jax.Array,
    *,
    rates: Sequence[Rates] | None = None,
    key: jax.Array | None = None,
    train: bool = False,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """Runs a chain and also returns each stage's auxiliary outputs (`Stage.with_aux`).

    Args:
        stages, x, rates, key, train: as for `run`.
    """
    outputs, auxiliary = run_with_outputs(stages, x, rates=rates, key=key, train=train)
    return (outputs[-1] if outputs else x), auxiliary


def run_with_outputs(
    stages: Sequence[Stage],
    x: jax.Array,
    *,
    rates: Sequence[Rates] | None = None,
    key: jax.Array | None = None,
    train: bool = False,
) -> tuple[list[jax.Array], list[dict[str, jax.Array]]]:
    """Runs a chain and returns each stage's output and auxiliary outputs (`Stage.with_aux`).

    Args:
        stages, x, rates, key, train: as for `run`.
    """
    outputs, auxiliary = [], []
    for i, stage in enumerate(stages):
        x, aux = stage.with_aux(
            x,
            rates=None if rates is None else rates[i],
            key=None if key is None else jax.random.fold_in(key, i),
            train=train,
        )
        outputs.append(x)
        auxiliary.append(aux)
    return outputs, auxiliary


def join(
    stages: Sequence[Stage], rates: Sequence[Rates] | None
) -> tuple[list[Stage], list[Rates] | None]:
    """The same chain in fewer stages: neighbours are joined wherever `Stage.join` can.

    Ten stages of equal blocks compile as ten loops, and as one loop when joined. The stages must be
    either all trainable or all frozen, since a joined stage is differentiated as a whole.

    Args:
        stages: the chain, in order.
        rates: drop-path rates of every stage's blocks; None for no drop-path.

    Returns:
        The stages and their rates.
    """
    joined: list[Stage] = []
    joined_rates: list[Rates] = []
    for i, stage in enumerate(stages):
        own = rates[i] if rates is not None else None
        both = joined[-1].join(stage) if joined else None
        if both is None:
            joined.append(stage)
            joined_rates.append(own)
            continue
        before = joined_rates[-1]
        if own is not None or before is not None:
            joined_rates[-1] = (
                *(before or (0.0,) * joined[-1].depth),
                *(own or (0.0,) * stage.depth),
            )
        joined[-1] = both
    return joined, None if rates is None else joined_rates


def linear_rates(depths: Sequence[int], rate: float) -> list[tuple[float, ...]]:
    """Drop-path rates that grow linearly from 0 to `rate` over all blocks, split by stage.

    Source: Huang et al. 2016 (arXiv 1603.09382), section 3; docs/reference.md#vit-drop-path.

    Args:
        depths: number of blocks of every stage.
        rate: the last block's rate.
    """
    total = sum(depths)
    ramp = np.linspace(0.0, rate, total) if total else np.zeros(0)
    ends = np.cumsum(depths)
    return [
        tuple(float(r) for r in ramp[end - depth : end])
        for depth, end in zip(depths, ends, strict=True)
    ]


def cast_compute(params: dict[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """Casts parameters to the compute dtype; FLOAT32_NAMES and FLOAT32_MODULES stay in float32."""
    if dtype == jnp.float32:
        return params

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        keep = names[-1] in FLOAT32_NAMES or any(name in FLOAT32_MODULES for name in names)
        return leaf if keep else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def subtree(params: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The entry at `path` of nested dicts, still nested under its path; all for an empty path."""
    return {path[0]: subtree(params[path[0]], path[1:])} if path else params


def deep_update(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with the leaves of `changes` in place of their own."""
    new = dict(params)
    for name, value in changes.items():
        nested = isinstance(value, dict) and name in params
        new[name] = deep_update(params[name], value) if nested else value
    return new


def count_parameters(params: Any) -> int:
    """Parameter count of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
