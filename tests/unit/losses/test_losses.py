"""Losses on numbers worked out by hand, and where the published code gives NaN.

Axes: U latents, P kernels.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.losses.classification import soft_cross_entropy, top_k_correct
from m2mkd_jax.losses.distillation import distill, hard_distillation, soft_distillation
from m2mkd_jax.losses.graph import (
    Mixture,
    block_matrix,
    fit_gaussian_mixture,
    gaussian_mixture,
    hinge_repulsion,
    match_rows,
    stochastic_block,
)


def test_soft_cross_entropy():
    # softmax([0, ln 3]) = (1/4, 3/4); the second row is uniform.
    logits = jnp.asarray([[0.0, np.log(3.0)], [2.0, 2.0]])
    targets = jnp.asarray([[0.0, 1.0], [0.5, 0.5]])
    expected = (-np.log(0.75) - np.log(0.5)) / 2
    np.testing.assert_allclose(soft_cross_entropy(logits, targets), expected, rtol=1e-5)
    assert soft_cross_entropy(logits.astype(jnp.bfloat16), targets).dtype == jnp.float32


def test_top_k_correct():
    logits = jnp.asarray([[0.1, 0.3, 0.2], [0.3, 0.1, 0.2], [1.0, 1.0, 1.0]])
    labels = jnp.asarray([1, 1, 2])
    assert top_k_correct(logits, labels, 1).tolist() == [True, False, False]
    assert top_k_correct(logits, labels, 2).tolist() == [True, False, False]
    assert top_k_correct(logits, labels, 5).tolist() == [True, True, True]


def test_soft_distillation():
    # KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 - ln 3 / 2, over B * K = 2 elements.
    student, teacher = jnp.asarray([[0.0, np.log(3.0)]]), jnp.zeros((1, 2))
    expected = np.log(2) - np.log(3) / 2
    np.testing.assert_allclose(soft_distillation(student, teacher, 1.0), expected / 2, rtol=1e-5)
    np.testing.assert_allclose(
        soft_distillation(2 * student, teacher, 2.0), 4 * expected / 2, rtol=1e-5
    )
    # The mean over twice the same example is the same.
    twice = soft_distillation(jnp.tile(student, (2, 1)), jnp.tile(teacher, (2, 1)), 1.0)
    np.testing.assert_allclose(twice, expected / 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_no_gradient_to_the_teacher(kind):
    student, teacher = jax.random.normal(jax.random.key(0), (2, 3, 5))
    gradient = jax.grad(lambda t: distill(1.0, student, t, kind, 0.5, 2.0))(teacher)
    assert not gradient.any()


def test_distill():
    student, teacher = jnp.asarray([[0.0, np.log(3.0)]]), jnp.asarray([[0.0, 5.0]])
    np.testing.assert_allclose(hard_distillation(student, teacher), -np.log(0.75), rtol=1e-5)
    loss = distill(2.0, student, teacher, "hard", alpha=0.25)
    np.testing.assert_allclose(loss, 0.75 * 2.0 - 0.25 * np.log(0.75), rtol=1e-5)
    assert distill(2.0, student, None, "none", alpha=0.25) == 2.0
    with pytest.raises(UserError, match="'warm' is unknown"):
        distill(2.0, student, teacher, "warm", 0.5)


DISTANCES = jnp.asarray([[0.0, 0.1, 0.9], [0.1, 0.0, 0.3], [0.9, 0.3, 0.0]])


def test_hinge():
    np.testing.assert_allclose(hinge_repulsion(DISTANCES, 0.4), -0.4, rtol=1e-5)
    np.testing.assert_allclose(hinge_repulsion(DISTANCES, 0.4, "mean"), -0.2, rtol=1e-5)
    with pytest.raises(UserError, match="'max' is unknown"):
        hinge_repulsion(DISTANCES, 0.4, "max")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_hinge_without_a_close_pair(reduction):
    value, gradient = jax.value_and_grad(hinge_repulsion)(DISTANCES, 0.05, reduction)
    assert value == 0
    assert not gradient.any()


def test_block_matrix():
    expected = [[0.9, 0.9, 0.2, 0.2]] * 2 + [[0.2, 0.2, 0.9, 0.9]] * 2
    np.testing.assert_allclose(block_matrix(4, 2, 0.9, 0.2), expected, rtol=1e-6)
    with pytest.raises(UserError, match="5 latents cannot be split into 2 equal clusters"):
        block_matrix(5, 2, 0.9, 0.2)


@pytest.mark.parametrize("seed", range(3))
def test_matching_is_the_best_of_all(seed):
    affinity, target = jax.random.uniform(jax.random.key(seed), (2, 5, 5))
    costs = {
        p: float(jnp.square(affinity[jnp.asarray(p)] - target).sum())
        for p in itertools.permutations(range(5))
    }
    assert tuple(jax.jit(match_rows)(affinity, target).tolist()) == min(costs, key=costs.get)


def test_stochastic_block():
    target = block_matrix(6, 2, 0.9, 0.2)
    shuffled = target[jnp.asarray([3, 0, 5, 1, 4, 2])]
    # Shuffled rows match perfectly; a constant error of 0.1 costs 0.01; kernels add up.
    assert stochastic_block(shuffled[None], target) == 0
    both = jnp.stack([shuffled, shuffled - 0.1])
    np.testing.assert_allclose(stochastic_block(both, target), 0.01, rtol=1e-4)
    # Below the clip every entry counts as the clip and has no gradient.
    value, gradient = jax.value_and_grad(stochastic_block)(both, target, 0.05)
    np.testing.assert_allclose(value, 2 * 0.05, rtol=1e-5)
    assert not gradient.any()
    assert jax.grad(stochastic_block)(both, target)[1].all()


def symmetric(pairs, latents):
    distances = np.zeros((latents, latents))
    distances[np.tril_indices(latents, k=-1)] = pairs
    return jnp.asarray(distances + distances.T, jnp.float32)


def test_gaussian_mixture_density():
    mixture = Mixture(jnp.asarray([0.3, 0.7]), jnp.asarray([0.2, 1.0]), jnp.asarray([0.1, 0.2]))
    x = np.array([0.1, 0.9, 0.3])
    w, m, s = (np.asarray(part, np.float64) for part in mixture)
    density = (w * np.exp(-(((x[:, None] - m) / s) ** 2) / 2) / (s * np.sqrt(2 * np.pi))).sum(-1)
    np.testing.assert_allclose(
        gaussian_mixture(symmetric(x, 3), mixture), -np.log(density).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        gaussian_mixture(symmetric(x, 3), mixture, "sum"), -np.log(density).sum(), rtol=1e-5
    )
    with pytest.raises(UserError, match="'none' is unknown"):
        gaussian_mixture(symmetric(x, 3), mixture, "none")


def test_gaussian_mixture_fit():
    random = np.random.default_rng(0)
    x = np.where(random.random(780) < 0.25, random.normal(0.2, 0.02, 780), 0)
    x = np.where(x == 0, random.normal(1.0, 0.1, 780), x)
    distances = symmetric(x, 40)
    mixture = fit_gaussian_mixture(distances, 2, seed=0)
    order = np.argsort(mixture.means)
    # Of 780 draws, some 195 are of the narrow part: their own mean, spread and share vary so much.
    np.testing.assert_allclose(mixture.means[order], [0.2, 1.0], rtol=0.05)
    np.testing.assert_allclose(mixture.scales[order], [0.02, 0.1], rtol=0.15)
    np.testing.assert_allclose(mixture.weights[order], [0.25, 0.75], rtol=0.2)
    # Where it was fitted, moving the distances costs.
    assert gaussian_mixture(distances, mixture) < gaussian_mixture(distances + 0.05, mixture)
    with pytest.raises(UserError, match="9 components cannot be fitted to 3 pairs"):
        fit_gaussian_mixture(DISTANCES, 9)
