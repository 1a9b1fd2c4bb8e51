"""Losses and graph regularisers against the published code's numbers (h_regularisers, g_m2mkd).

Axes: U latents, C signature, P propagators.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.losses.classification import soft_cross_entropy
from m2mkd_jax.losses.distillation import distill
from m2mkd_jax.losses.graph import block_matrix, hinge_repulsion, stochastic_block
from m2mkd_jax.models.nac.kernels import affinity, distance

FIXTURES = Path(__file__).parents[1] / "fixtures"
IO = np.load(FIXTURES / "h_regularisers/io.npz")
GROUPS = ("input", "mediator", "output")
TRUNCATION = 0.9


def signatures():
    return {group: jnp.asarray(IO[f"signatures.{group}"]) for group in GROUPS}


def check(name, loss, groups_used):
    """Value to 1e-5 and gradients with respect to signatures and bandwidths to 1e-4."""

    def of(tree):
        return loss(jnp.concatenate([tree[g] for g in groups_used]), tree["bandwidths"])

    tree = {**signatures(), "bandwidths": jnp.asarray(IO["bandwidths"])}
    value, gradient = jax.jit(jax.value_and_grad(of))(tree)
    np.testing.assert_allclose(value, IO[f"{name}.loss"], rtol=1e-5)
    for key, ours in gradient.items():
        theirs = IO[f"{name}.grad.{key}"]
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * scale, err_msg=key)


def test_distances():
    together = jnp.concatenate(list(signatures().values()))
    np.testing.assert_allclose(
        distance(together, together), IO["distance_all"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "name, hinge, reduction",
    [
        ("hinge_0.4_sum", 0.4, "sum"),
        ("hinge_0.9_sum", 0.9, "sum"),
        ("hinge_0.4_mean", 0.4, "mean"),
    ],
)
def test_hinge(name, hinge, reduction):
    check(name, lambda s, _: hinge_repulsion(distance(s, s), hinge, reduction), GROUPS)


@pytest.mark.parametrize(
    "name, clusters, p_out, clip, groups",
    [
        ("sbm_mediators", 4, 0.2, None, ("mediator",)),
        ("sbm_all", 9, 0.05, None, GROUPS),
        ("sbm_clip", 4, 0.2, 0.05, ("mediator",)),
    ],
)
def test_stochastic_block(name, clusters, p_out, clip, groups):
    latents = len(IO[f"{name}.graphon"])
    target = block_matrix(latents, clusters, 0.9, p_out)
    np.testing.assert_array_equal(target, IO[f"{name}.graphon"])

    def loss(s, bandwidths):
        kernels = jax.vmap(lambda b: affinity(distance(s, s), b, TRUNCATION))(bandwidths)
        return stochastic_block(kernels, target, clip)

    check(name, loss, groups)


def test_weighted_sum():
    together = jnp.concatenate(list(signatures().values()))
    classification = soft_cross_entropy(jnp.asarray(IO["logits"]), jnp.asarray(IO["target"]))
    sparsity = hinge_repulsion(distance(together, together), 0.4)
    np.testing.assert_allclose(classification, IO["weighted.classification"], rtol=1e-5)
    np.testing.assert_allclose(sparsity, IO["weighted.graph_sparsity"], rtol=1e-5)
    np.testing.assert_allclose(classification + 0.1 * sparsity, IO["weighted.loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "pair", ["nac_readin", "nac_mediator", "nac_readout", "vmoe_0", "vmoe_1", "vmoe_last"]
)
@pytest.mark.parametrize("kind, temperature", [("soft", 1), ("soft", 2), ("hard", 1), ("none", 1)])
def test_distillation(pair, kind, temperature):
    io = np.load(FIXTURES / f"g_m2mkd/{pair}.npz")
    student, teacher, labels = (
        jnp.asarray(io[k]) for k in ("student_outputs", "teacher_outputs", "labels")
    )
    base = soft_cross_entropy(student, labels)
    np.testing.assert_allclose(base, io["base_loss"], rtol=1e-5)
    loss = distill(base, student, teacher, kind, alpha=0.5, temperature=temperature)
    np.testing.assert_allclose(loss, io[f"{kind}_tau{temperature}.loss"], rtol=1e-5)
