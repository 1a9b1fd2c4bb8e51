"""The smallest NAC with every part, compiled without optimisation, for tests of its options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.spec import NACSpec
from tests.random_params import random_params

BATCH = 3
SPEC = NACSpec(
    image_size=16,
    classes=5,
    state_dim=8,
    code_dim=6,
    heads=2,
    head_dim=3,
    signature_dim=4,
    input_latents=3,
    mediator_latents=5,
    output_latents=2,
    iterations=2,
    tokenizer_depths=(1, 1),
    position_dim=3,
)
RATES = (0.3, 0.6)
# Tiny arrays: all the time is compilation, half of it LLVM's optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def spec_with(**options) -> NACSpec:
    return dataclasses.replace(SPEC, **options)


@functools.cache
def parts(spec: NACSpec) -> chain.SplitStage:
    return chain.abstract(lambda rngs: NAC(spec, rngs=rngs))


@functools.cache
def params_of(spec: NACSpec) -> dict:
    return random_params(parts(spec).params, seed=7)


def network(spec: NACSpec, params=None) -> NAC:
    return chain.merge(parts(spec).graph, params_of(spec) if params is None else params, {})


def images(seed: int = 0) -> jax.Array:
    shape = (BATCH, SPEC.image_size, SPEC.image_size, 3)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def compiled(spec: NACSpec, rates=None, train: bool = False):
    """(params, images, key) -> logits."""
    return jit(lambda p, x, key: network(spec, p)(x, rates=rates, key=key, train=train))


def evaluate(spec: NACSpec, params=None, x=None, key=None) -> jax.Array:
    params = params_of(spec) if params is None else params
    return compiled(spec)(params, images() if x is None else x, key)


def propagated(spec: NACSpec, params=None, *, inputs=None, **options) -> jax.Array:
    """Mediator states after all iterations from given states; options of `propagate`."""
    rng = np.random.default_rng(1)
    read_in, mediators = (
        jnp.asarray(rng.normal(size=(BATCH, count, spec.state_dim)), jnp.float32)
        for count in (spec.input_latents, spec.mediator_latents)
    )
    read_in = read_in if inputs is None else inputs
    run = lambda p, a, b: network(spec, p).propagate(a, b, **options)
    return jit(run)(params_of(spec) if params is None else params, read_in, mediators)


def with_leaf(params: dict, path: str, value) -> dict:
    head, *rest = path.split("/", 1)
    return {**params, head: with_leaf(params[head], rest[0], value) if rest else value}


def differ(a, b) -> bool:
    return float(jnp.abs(a - b).max()) > 1e-3 * float(jnp.abs(b).max())


def leaf_at(params: dict, path: str):
    for name in path.split("/"):
        params = params[name]
    return params
