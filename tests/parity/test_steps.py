"""Three AdamW steps against the original (fixture j_steps): losses, gradients, parameters.

Where a parameter's gradient is zero by theory, Adam turns rounding noise into steps of the size of
the learning rate. Such entries are left out of `after`, by name (ZERO_BY_THEORY), and their
gradient is checked to be noise instead.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2mkd_jax import losses
from m2mkd_jax.checkpoint import torch_names
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.nac.circuit import NAC
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

STEPS = 3
VIT_SPEC = vit.ViTSpec(64, 16, 24, 3, 10, qkv_bias=True, eps=1e-6)
VIT_DEPTH = 2
VIT_TABLE = torch_names.vit_stage(VIT_DEPTH, first=True, last=True, qkv_bias=True)
NAC_TABLE = torch_names.nac(NAC_SPEC)


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


def meta(name: str) -> dict:
    return facts("j_steps/meta_nac.json") if name == "nac" else facts("j_steps/meta_vit.json")[name]


def run(name: str):
    """Losses, gradient norms, first gradients and final parameters (by torch name) of `STEPS`."""
    build, table, rule = CASES[name]
    fixture, about = arrays(f"j_steps/{name}.npz"), meta(name)
    before = {key.removeprefix("before."): fixture[key] for key in fixture if key[:2] == "be"}
    parts = chain.abstract(build)
    assert not parts.fixed
    params = {"net": jax.tree.map(jnp.asarray, torch_names.from_torch(table, before))}
    assert jax.tree.map(jnp.shape, params["net"]) == jax.tree.map(jnp.shape, parts.params)
    regulariser = None
    if name == "nac":
        options = SimpleNamespace(weight=about["hinge_weight"], hinge=about["hinge"])
        graph = losses.graph_regulariser("hinge", options)
        regulariser = lambda stages: graph(stages["net"])  # noqa: E731
    program = losses.Program({"net": parts.graph}, ("net",), ("net",), regulariser=regulariser)
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

    @jax.jit
    def step(params, state, batch):
        grad = jax.value_and_grad(program.loss, has_aux=True)
        (loss, _), grads = grad(params, frozen, batch, None)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    state, values, norms, first = optimizer.init(params), [], [], None
    for i in range(STEPS):
        images = nhwc(fixture[f"image_{i}"])
        batch = {"image": images, "target": jnp.asarray(fixture[f"labels_{i}"])}
        params, state, loss, grads = step(params, state, batch)
        values.append(loss)
        norms.append(optax.global_norm(grads))
        first = grads["net"] if first is None else first
    to_torch = lambda tree: torch_names.to_torch(table, tree, VIT_SPEC.patch)  # noqa: E731
    return fixture, np.array(values), np.array(norms), to_torch(first), to_torch(params["net"])


@pytest.fixture(scope="module", params=CASES)
def steps(request):
    return (request.param, *run(request.param))


def test_losses_and_gradient_norms(steps):
    name, fixture, values, norms, _, _ = steps
    about = meta(name)
    assert_close(values[0], about["losses_f64"][0], OUTPUT_TOLERANCE)
    assert_close(values, about["losses_f64"], GRADIENT_TOLERANCE)
    assert_close(values, fixture["losses"], GRADIENT_TOLERANCE)
    assert_close(norms, about["grad_norms"], GRADIENT_TOLERANCE)


def test_first_gradients(steps):
    _, fixture, _, _, first, _ = steps
    assert set(first) == {key.removeprefix("grad1.") for key in fixture if key[:2] == "gr"} - {
        "_norms", "grad_norms", "grad_norms_before_clip",
    }  # fmt: skip
    scale = max(np.abs(value).max() for value in first.values())
    for key, value in first.items():
        expected = fixture[f"grad1.{key}"]
        if key in ZERO_BY_THEORY:
            where = ZERO_BY_THEORY[key]
            assert np.abs(value[where]).max() <= ZERO * scale, key
            value, expected = np.delete(value, where), np.delete(expected, where)
        assert_close(value, expected, GRADIENT_TOLERANCE, key)


def test_parameters_after_all_steps(steps):
    _, fixture, _, _, _, after = steps
    assert set(after) == {key.removeprefix("after.") for key in fixture if key[:2] == "af"}
    left_out = set()
    for key, value in after.items():
        expected = fixture.get(f"f64.after.{key}", fixture[f"after.{key}"])
        if key in ZERO_BY_THEORY:
            left_out.add(key)
            where = ZERO_BY_THEORY[key]
            value, expected = np.delete(value, where), np.delete(expected, where)
        # Steps are far smaller than parameters: compare what the steps changed, too.
        assert_close(value, expected, GRADIENT_TOLERANCE, key)
    # What the fixture recorded in float64 is what cannot be compared in float32.
    assert left_out == {key.removeprefix("f64.after.") for key in fixture if key[:2] == "f6"}
