"""NAC students for the m2mKD phase, and their assembly into a NAC (reference section 4).

Axes: B batch, H height, W width, N tokens of the meta model, X meta width (stitch), U latents,
D state, S code, R stored states, K classes.

A student replaces one module of the meta model: tokens of width X in, tokens of width X out. Its
code (and the initial state of read-in and read-out) is random, fixed, and saved with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, layers
from m2mkd_jax.models.nac.attention import LatentLayer
from m2mkd_jax.models.nac.read_in import ReadIn
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.tokenizers import OutputPooling, Tokenizer

READ_IN_FFN_LAYER_SCALE = 1e-6  # the published read-in student does not pass the configured one on


def _random_states(count: int, latents: int, spec: NACSpec, rngs: nnx.Rngs) -> chain.Fixed:
    return chain.Fixed(jax.random.normal(rngs.params(), (count, latents, spec.state_dim)))


def _tile(states: jax.Array, batch: int) -> jax.Array:
    """States (R, U, D) for a batch: row b takes state b modulo R."""
    return states[jnp.arange(batch) % states.shape[0]]


class ReadInStudent(chain.Stage):
    """Tokenizer, read-in of one latent, linear to the meta width: (B, H, W, 3) -> (B, U, X)."""

    def __init__(self, spec: NACSpec, stitch_dim: int, states: int, latents=1, *, rngs: nnx.Rngs):
        self.tokenizer = Tokenizer(spec, rngs=rngs)
        self.read_in = ReadIn(spec, READ_IN_FFN_LAYER_SCALE, rngs=rngs)
        self.post_stitch = layers.torch_linear(spec.state_dim, stitch_dim, rngs=rngs)
        self.codes = chain.Fixed(jax.random.normal(rngs.params(), (latents, spec.code_dim)))
        self.states = _random_states(states, latents, spec, rngs)

    def __call__(self, x, *, rates=None, key=None, train=False):
        tokens = self.tokenizer(x)
        states = _tile(self.states[...], x.shape[0]).astype(tokens.dtype)
        return self.post_stitch(self.read_in(states, self.codes[...], tokens))


class MediatorStudent(chain.Stage):
    """Linear, attention of all tokens to all without kernel, FFN, linear: (B, N, X) -> same."""

    depth = 1

    def __init__(self, spec: NACSpec, stitch_dim: int, *, rngs: nnx.Rngs):
        self.pre_stitch = layers.torch_linear(stitch_dim, spec.state_dim, rngs=rngs)
        self.layer = LatentLayer(spec, share_norm=True, residual=True, kernel=False, rngs=rngs)
        self.post_stitch = layers.torch_linear(spec.state_dim, stitch_dim, rngs=rngs)
        self.codes = chain.Fixed(jax.random.normal(rngs.params(), (1, spec.code_dim)))

    def __call__(self, x, *, rates=None, key=None, train=False):
        x, codes = self.pre_stitch(x), self.codes[...]
        noisy = train and key is not None and rates is not None and any(rates)
        x = self.layer(
            x, codes, x, codes, None, rates[0] if noisy else None, key if noisy else None
        )
        return self.post_stitch(x)


class ReadOutStudent(chain.Stage):
    """Linear on the senders, one receiver, pooling: (B, N, X) -> logits (B, K)."""

    def __init__(self, spec: NACSpec, stitch_dim: int, states: int, latents=1, *, rngs: nnx.Rngs):
        self.gumbel = spec.pooling == "gumbel"
        self.pre_stitch = layers.torch_linear(stitch_dim, spec.state_dim, rngs=rngs)
        self.layer = LatentLayer(spec, share_norm=False, residual=False, kernel=False, rngs=rngs)
        self.pooling = OutputPooling(spec.state_dim, spec.classes, rngs=rngs)
        self.codes = chain.Fixed(jax.random.normal(rngs.params(), (latents, spec.code_dim)))
        self.states = _random_states(states, latents, spec, rngs)

    def output_states(self, x: jax.Array) -> jax.Array:
        """Tokens (B, N, X) -> output latent states (B, U, D)."""
        states = _tile(self.states[...], x.shape[0]).astype(x.dtype)
        # One broadcast code serves the senders, as published.
        return self.layer(states, self.codes[...], self.pre_stitch(x), self.codes[:1])

    def __call__(self, x, *, rates=None, key=None, train=False):
        states, gumbel = self.output_states(x), None
        if key is not None and self.gumbel:
            gumbel = jax.random.gumbel(key, states.shape[:2])
        return self.pooling(states, gumbel)


def build_student(
    spec: NACSpec, index: int, modules: int, stitch_dim: int, states: int, *, rngs: nnx.Rngs
) -> chain.Stage:
    """Student `index` of `modules`: 0 reads in, the last one reads out, the rest are mediators.

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
    nac: dict,
    students: list[dict],
    *,
    carry_grid: bool | None = None,
    carry_pooling: bool | None = None,
) -> tuple[dict, dict[str, str]]:
    """Puts the students' weights into a NAC's parameters.

    Tokenizer and read-in come from the first student, propagator i from mediator i, the read-out
    from the last. The positional grid and the output pooling come along where their shapes fit
    (`None`), always (True: a misfit is an error) or never (False). Codes, signatures, seeder and
    bandwidths keep their own values; stitches are left out.

    Args:
        nac: parameters of a freshly initialised NAC.
        students: parameters of the students, in order.

    Returns:
        The new parameters, and for every top-level part of the NAC where it came from
        ("m2mkd/0", ..., or "fresh").

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

    def take(target: dict, source: dict, where: str) -> dict:
        for name, value in source.items():
            if isinstance(value, dict):
                take(target[name], value, f"{where}/{name}")
            elif target[name].shape != value.shape:
                raise UserError(
                    f"assemble: {where}/{name} has shape {value.shape} in the student and "
                    f"{target[name].shape} in the NAC"
                )
            else:
                target[name] = value
        return target

    def wanted(choice, target, source):
        return (
            jax.tree.map(jnp.shape, target) == jax.tree.map(jnp.shape, source)
            if choice is None
            else choice
        )

    tokenizer = dict(first["tokenizer"])
    grid = tokenizer.pop("grid")
    take(result["tokenizer"], tokenizer, "tokenizer")
    if wanted(carry_grid, nac["tokenizer"]["grid"], grid):
        take(result["tokenizer"], {"grid": grid}, "tokenizer")
        origin["tokenizer"] = "m2mkd/0"
    else:
        origin["tokenizer"] = "m2mkd/0, positional grid fresh"
    take(result["read_in"], first["read_in"], "read_in")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[m["layer"] for m in mediators])
    take(result["propagators"], stacked, "propagators")
    take(result["read_out"], last["layer"], "read_out")
    origin |= {"read_in": "m2mkd/0", "read_out": f"m2mkd/{count + 1}"}
    origin["propagators"] = f"m2mkd/1..{count}, bandwidths fresh"
    if wanted(carry_pooling, nac.get("pooling"), last["pooling"]):
        take(result["pooling"], last["pooling"], "pooling")
        origin["pooling"] = f"m2mkd/{count + 1}"
    return result, origin
