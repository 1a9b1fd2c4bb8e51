"""Three AdamW steps against the original (fixture j_steps): losses, gradients, parameters.

Adam divides a gradient by its size, so that rounding noise makes steps as large as any other:

- Where a gradient is zero by theory, the entries are left out of `after`, by name
  (ZERO_BY_THEORY), and their gradient is checked to be noise instead.
- The NAC here has gradients of norm 981, beside which many entries of a tensor are noise in
  float32. Its steps are therefore compared in float64 for all entries (the fixture's float32 steps
  are within 2.2e-6 of its own float64 ones), and in float32 for those entries whose gradient is
  above ABOVE_NOISE of their tensor's largest in every step.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2mkd_jax.conversion.names import vit_stage_names
from m2mkd_jax.conversion.names_nac import nac_names
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.phases.nac_family import graph_regulariser
from m2mkd_jax.phases.program import Program
from m2mkd_jax.train.optimizer import make_optimizer
from tests.support import (
    GRADIENT_TOLERANCE,
    NAC_SPEC,
    OUTPUT_TOLERANCE,
    arrays,
    assert_close,
    facts,
    nhwc,
)
from tests.torch_arrays import arrays_from_torch, arrays_to_torch

STEPS = 3
VIT_SPEC = vit.ViTSpec(64, 16, 24, 3, 10, qkv_bias=True, eps=1e-6)
VIT_DEPTH = 2
VIT_TABLE = vit_stage_names(VIT_DEPTH, first=True, last=True, qkv_bias=True)
NAC_TABLE = nac_names(NAC_SPEC)


def vit_stage(rngs):
    return vit.ViTStage(VIT_SPEC, VIT_DEPTH, first=True, last=True, rngs=rngs)


def nac_stage(rngs):
    return NAC(NAC_SPEC, rngs=rngs)


# fixture: build, table, decay rule
CASES = {
    "vit": (vit_stage, VIT_TABLE, "published"),
    "vit_clip1": (vit_stage, VIT_TABLE, "published"),
    "nac": (nac_stage, NAC_TABLE, "all"),
}
KEY_BIAS = slice(VIT_SPEC.width, 2 * VIT_SPEC.width)
# name: the entries whose gradient is zero by theory
ZERO_BY_THEORY = {
    # A bias on the keys shifts all scores of a query alike: it drops out of the softmax.
    **{f"blocks.{i}.attn.qkv.bias": KEY_BIAS for i in range(VIT_DEPTH)},
    # One number added to every latent's confidence: it drops out of the softmax.
    "output_tokenizer.confidence_scorer.bias": slice(0, 1),
}
# Of the largest entry of the whole gradient; float32 rounding leaves less than this.
ZERO = 1e-6
ABOVE_NOISE = 1e-3
# A scalar gradient that is a sum of cancelling terms: the fixture's float32 value itself is 7.6e-5
# of it away from the one in float64. Compared relative to the bandwidths' largest gradient instead.
READ_OUT_BANDWIDTH = "latent_graphs.0.read_out.latent_attention.kernel.bandwidth"


def meta(name: str) -> dict:
    return facts("j_steps/meta_nac.json") if name == "nac" else facts("j_steps/meta_vit.json")[name]


def run(name: str, dtype=jnp.float32):
    """`STEPS` steps: the fixture, losses, gradient norms, gradients of every step, parameters.

    Gradients and parameters by torch name.
    """
    build, table, rule = CASES[name]
    fixture, about = arrays(f"j_steps/{name}.npz"), meta(name)
    parts = chain.abstract(build)
    assert not parts.fixed
    before = arrays_from_torch(table, part(fixture, "before."))
    params = {"net": jax.tree.map(lambda a: jnp.asarray(a, dtype), before)}
    assert jax.tree.map(jnp.shape, params["net"]) == jax.tree.map(jnp.shape, parts.params)
    regulariser = None
    if name == "nac":
        options = SimpleNamespace(weight=about["hinge_weight"], hinge=about["hinge"])
        hinge = graph_regulariser("hinge", options)
        regulariser = lambda stages: hinge(stages["net"])
    program = Program(
        {"net": parts.graph}, ("net",), ("net",), regulariser=regulariser, dtype=dtype
    )
    recipe = SimpleNamespace(
        optimizer="adamw",
        weight_decay=about["weight_decay"],
        decay_rule=rule,
        clip=about.get("clip") or 0.0,
        accumulate=1,
        schedule="clean",
        lr=about["lr"],
        min_lr=about["lr"],
        warmup_lr=0.0,
        epochs=STEPS,
        warmup_epochs=0,
    )
    optimizer = make_optimizer(recipe, 1, params)
    frozen = {"net": {"fixed": {}}}
    # Sums are less exact without LLVM's optimisation, but it is half of the compilation's time.
    options = {"xla_backend_optimization_level": 0} if dtype == jnp.float64 else None

    @functools.partial(jax.jit, compiler_options=options)
    def step(params, state, batch):
        grad = jax.value_and_grad(program.loss, has_aux=True)
        (loss, _), grads = grad(params, frozen, batch, None)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads), grads

    def by_name(tree):
        return arrays_to_torch(table, tree["net"], VIT_SPEC.patch)

    state, values, norms, gradients = jax.jit(optimizer.init)(params), [], [], []
    for i in range(STEPS):
        batch = {
            "image": nhwc(fixture[f"image_{i}"]).astype(dtype),
            "target": jnp.asarray(fixture[f"labels_{i}"], dtype),
        }
        params, state, loss, norm, grads = step(params, state, batch)
        values.append(loss)
        norms.append(norm)
        gradients.append(by_name(grads))
    return fixture, np.array(values), np.array(norms), gradients, by_name(params)


@pytest.fixture(scope="module", params=CASES)
def steps(request):
    return (request.param, *run(request.param))


def part(fixture: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in fixture.items() if k.startswith(prefix)}


def test_losses_and_gradient_norms(steps):
    name, fixture, values, norms, _, _ = steps
    about = meta(name)
    assert_close(values[0], about["losses_f64"][0], OUTPUT_TOLERANCE)
    assert_close(values, about["losses_f64"], GRADIENT_TOLERANCE)
    assert_close(values, fixture["losses"], GRADIENT_TOLERANCE)
    assert_close(norms, about["grad_norms"], GRADIENT_TOLERANCE)


def test_first_gradients(steps):
    name, fixture, _, norms, gradients, _ = steps
    first, recorded = gradients[0], part(fixture, "grad1.")
    assert set(first) == set(recorded)
    clip = meta(name).get("clip")
    if clip:
        assert norms[0] > 2 * clip  # the fixture has the clipped gradient
        first = {key: value * clip / norms[0] for key, value in first.items()}
    scale = max(np.abs(value).max() for value in first.values())
    for key, value in first.items():
        expected = recorded[key]
        if key in ZERO_BY_THEORY:
            where = ZERO_BY_THEORY[key]
            assert np.abs(value[where]).max() <= ZERO * scale, key
            value, expected = np.delete(value, where), np.delete(expected, where)
        if key == READ_OUT_BANDWIDTH:
            largest = max(abs(v) for k, v in recorded.items() if k.endswith("bandwidth"))
            assert abs(value - expected) <= GRADIENT_TOLERANCE * largest
            continue
        assert_close(value, expected, GRADIENT_TOLERANCE, key)


def assert_after_close(fixture: dict, after: dict, selected=None) -> int:
    """Compares the parameters after all steps; returns how many numbers were compared."""
    recorded, exact = part(fixture, "after."), part(fixture, "f64.after.")
    assert set(after) == set(recorded)
    # What the fixture recorded in float64 is what float32 cannot tell, and nothing else.
    assert set(exact) == set(ZERO_BY_THEORY) & set(after)
    compared = 0
    for key, value in after.items():
        expected = exact.get(key, recorded[key])
        keep = np.ones(value.shape, bool) if selected is None else selected[key].copy()
        if key in ZERO_BY_THEORY:
            keep[ZERO_BY_THEORY[key]] = False
        assert_close(np.where(keep, value, expected), expected, GRADIENT_TOLERANCE, key)
        compared += keep.sum()
    return compared


def test_parameters_after_all_steps(steps):
    name, fixture, _, _, gradients, after = steps
    if name != "nac":
        assert_after_close(fixture, after)
        return
    above = {
        key: np.all([abs(g[key]) >= ABOVE_NOISE * abs(g[key]).max() for g in gradients], axis=0)
        for key in after
    }
    total = sum(value.size for value in after.values())
    assert assert_after_close(fixture, after, above) > 0.8 * total


def test_parameters_of_the_nac_after_all_steps_in_float64():
    # The network's own float32 parts (scores, losses) meet float64 here, nowhere else.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        fixture, values, norms, _, after = run("nac", jnp.float64)
    about = meta("nac")
    assert_close(values, about["losses_f64"], OUTPUT_TOLERANCE)
    assert_close(norms, about["grad_norms"], OUTPUT_TOLERANCE)
    assert after["output_tokenizer.to_logits.weight"].dtype == np.float64
    assert_after_close(fixture, after)
