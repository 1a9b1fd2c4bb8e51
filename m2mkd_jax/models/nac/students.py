"""NAC students for the m2mKD phase, and their assembly into a NAC.

Axes: B batch, H height, W width, N tokens of the meta model, X meta width (stitch), U latents,
D state, S code, R stored states, K classes.

A student replaces one module of the meta model: tokens of width X in, tokens of width X out. Its
code, and in read-in and read-out its initial states, are random, fixed, and saved with it.

Source: arXiv 2402.16918, section 3; docs/reference.md#nac-students.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, layers
from m2mkd_jax.models.nac.attention import LatentLayer
from m2mkd_jax.models.nac.read_in import ReadIn
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.tokenizers import OutputPooling, Tokenizer

READ_IN_FFN_LAYER_SCALE = 1e-6  # the published read-in student ignores the configured layer scale
Params = dict[str, Any]


def _random_states(count: int, latents: int, spec: NACSpec, rngs: nnx.Rngs) -> chain.Fixed:
    return chain.Fixed(jax.random.normal(rngs.params(), (count, latents, spec.state_dim)))


def _tile(states: jax.Array, batch: int) -> jax.Array:
    """States (R, U, D) -> (B, U, D): image b takes state b modulo R."""
    return states[jnp.arange(batch) % states.shape[0]]


class ReadInStudent(chain.Stage):
    """Tokenizer, read-in of one latent, linear to the meta width: (B, H, W, C) -> (B, U, X).

    Source: docs/reference.md#nac-student-read-in.
    """

    def __init__(
        self, spec: NACSpec, stitch_dim: int, states: int, latents: int = 1, *, rngs: nnx.Rngs
    ):
        self.tokenizer = Tokenizer(spec, rngs=rngs)
        self.read_in = ReadIn(spec, READ_IN_FFN_LAYER_SCALE, rngs=rngs)
        self.post_stitch = layers.torch_linear(spec.state_dim, stitch_dim, rngs=rngs)
        self.codes = chain.Fixed(jax.random.normal(rngs.params(), (latents, spec.code_dim)))
        self.states = _random_states(states, latents, spec, rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Images (B, H, W, C) -> tokens (B, U, X)."""
        tokens = self.tokenizer(x)
        states = _tile(self.states[...], x.shape[0]).astype(tokens.dtype)
        return self.post_stitch(self.read_in(states, self.codes[...], tokens))


class MediatorStudent(chain.Stage):
    """Linear, attention of all tokens to all without kernel, FFN, linear: (B, N, X) -> same.

    Source: docs/reference.md#nac-student-mediator.
    """

    depth = 1

    def __init__(self, spec: NACSpec, stitch_dim: int, *, rngs: nnx.Rngs):
        self.pre_stitch = layers.torch_linear(stitch_dim, spec.state_dim, rngs=rngs)
        self.layer = LatentLayer(spec, share_norm=True, residual=True, kernel=False, rngs=rngs)
        self.post_stitch = layers.torch_linear(spec.state_dim, stitch_dim, rngs=rngs)
        self.codes = chain.Fixed(jax.random.normal(rngs.params(), (1, spec.code_dim)))

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Tokens (B, N, X) -> tokens (B, N, X)."""
        x, codes = self.pre_stitch(x), self.codes[...]
        rate = rates[0] if train and key is not None and rates else 0.0
        x = self.layer(x, codes, x, codes, None, rate or None, key if rate else None)
        return self.post_stitch(x)


class ReadOutStudent(chain.Stage):
    """Linear on the senders, one receiver, pooling: (B, N, X) -> logits (B, K).

    Source: docs/reference.md#nac-student-read-out.
    """

    def __init__(
        self, spec: NACSpec, stitch_dim: int, states: int, latents: int = 1, *, rngs: nnx.Rngs
    ):
        self.gumbel = spec.pooling == "gumbel"
        self.pre_stitch = layers.torch_linear(stitch_dim, spec.state_dim, rngs=rngs)
        self.layer = LatentLayer(spec, share_norm=False, residual=False, kernel=False, rngs=rngs)
        self.pooling = OutputPooling(spec.state_dim, spec.classes, rngs=rngs)
        self.codes = chain.Fixed(jax.random.normal(rngs.params(), (latents, spec.code_dim)))
        self.states = _random_states(states, latents, spec, rngs)

    def output_states(self, x: jax.Array) -> jax.Array:
        """Tokens (B, N, X) -> output latent states (B, U, D)."""
        states = _tile(self.states[...], x.shape[0]).astype(x.dtype)
        # All senders share one code, as published.
        return self.layer(states, self.codes[...], self.pre_stitch(x), self.codes[:1])

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Tokens (B, N, X) -> logits (B, K); with a key the pooling is sampled."""
        states = self.output_states(x)
        gumbel: jax.Array | None = None
        if key is not None and self.gumbel:
            gumbel = jax.random.gumbel(key, states.shape[:2])
        return self.pooling(states, gumbel)


def build_student(
    spec: NACSpec, index: int, modules: int, stitch_dim: int, states: int, *, rngs: nnx.Rngs
) -> chain.Stage:
    """Student `index`: the first is a read-in, the last a read-out, all others are mediators.

    Source: docs/reference.md#nac-students.

    Args:
        spec: hyperparameters of the NAC.
        index: number of the student.
        modules: number of students.
        stitch_dim: width of the meta model.
        states: number of stored initial states R of read-in and read-out.
        rngs: source of the initial values.

    Raises:
        UserError: the index is out of range.
    """
    if not 0 <= index < modules:
        raise UserError(f"m2mkd/{index}: there are {modules} modules, 0 to {modules - 1}")
    if index == 0:
        return ReadInStudent(spec, stitch_dim, states, rngs=rngs)
    if index == modules - 1:
        return ReadOutStudent(spec, stitch_dim, states, rngs=rngs)
    return MediatorStudent(spec, stitch_dim, rngs=rngs)


def assemble(
    nac: Params,
    students: list[Params],
    *,
    carry_grid: bool | None = None,
    carry_pooling: bool | None = None,
) -> tuple[Params, dict[str, str]]:
    """Puts the students' weights into a NAC's parameters.

    Tokenizer and read-in come from the first student, propagator i from mediator i, the read-out
    from the last. Codes, signatures, seeder and bandwidths keep their own values; stitches are
    dropped.

    Source: docs/reference.md#nac-assembly.

    Args:
        nac: parameters of a freshly initialised NAC.
        students: parameters of the students, in order.
        carry_grid: carry the positional grid over; None means where its shape fits.
        carry_pooling: carry the output pooling over; None means where its shapes fit.

    Returns:
        The new parameters, and the origin of every top-level entry of the NAC ("m2mkd/0", ..., or
        "fresh").

    Raises:
        UserError: the number of students or a shape does not fit.
    """
    first, *mediators, last = students
    count = jax.tree.leaves(nac["propagators"])[0].shape[0]
    if len(mediators) != count:
        raise UserError(
            f"assemble: {len(mediators)} mediator students for {count} propagators; "
            "config.nac.iterations must be the number of modules minus 2"
        )
    result = jax.tree.map(lambda a: a, nac)
    origin = dict.fromkeys(nac, "fresh")
    tokenizer = dict(first["tokenizer"])
    grid = tokenizer.pop("grid")
    _copy(result["tokenizer"], tokenizer, "tokenizer")
    if _same_shapes(nac["tokenizer"]["grid"], grid) if carry_grid is None else carry_grid:
        _copy(result["tokenizer"], {"grid": grid}, "tokenizer")
        origin["tokenizer"] = "m2mkd/0"
    else:
        origin["tokenizer"] = "m2mkd/0, positional grid fresh"
    _copy(result["read_in"], first["read_in"], "read_in")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[m["layer"] for m in mediators])
    _copy(result["propagators"], stacked, "propagators")
    _copy(result["read_out"], last["layer"], "read_out")
    origin |= {"read_in": "m2mkd/0", "read_out": f"m2mkd/{count + 1}"}
    origin["propagators"] = f"m2mkd/1..{count}, bandwidths fresh"
    pooling = last["pooling"]
    if _same_shapes(nac.get("pooling"), pooling) if carry_pooling is None else carry_pooling:
        _copy(result["pooling"], pooling, "pooling")
        origin["pooling"] = f"m2mkd/{count + 1}"
    return result, origin


def _copy(target: Params, source: Params, where: str) -> None:
    """Overwrites entries of `target` with those of `source`.

    Raises:
        UserError: an array has another shape.
    """
    for name, value in source.items():
        if isinstance(value, dict):
            _copy(target[name], value, f"{where}/{name}")
        elif target[name].shape != value.shape:
            raise UserError(
                f"assemble: {where}/{name} has shape {value.shape} in the student and "
                f"{target[name].shape} in the NAC"
            )
        else:
            target[name] = value


def _same_shapes(a: Any, b: Any) -> bool:
    return jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
