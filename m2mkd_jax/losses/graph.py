"""Regularisers on the graph between latents.

Axes: U latents (receivers), V the same latents as senders, P distinct kernels, M mixture
components. All take distance matrices (1 - cosine, see models/nac/kernels.py) or affinities
(exp of the log kernel, not normalised); the caller weights and adds them.

Source: Weiss et al. 2022 (arXiv 2210.08031); docs/reference.md#nac-regularisers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m2mkd_jax.errors import UserError


class Mixture(NamedTuple):
    """A mixture of M Gaussians in one dimension.

    Attributes:
        weights: (M,), summing to 1.
        means: (M,).
        scales: standard deviations (M,).
    """

    weights: jax.Array
    means: jax.Array
    scales: jax.Array


def _pairs(distances: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of every unordered pair, without the diagonal."""
    return np.tril_indices(distances.shape[-1], k=-1)


def hinge_repulsion(distances: jax.Array, hinge: float, reduction: str = "sum") -> jax.Array:
    """Minus the distances of all pairs closer than `hinge`, which pushes those apart.

    Source: docs/reference.md#nac-hinge.

    Args:
        distances: (U, U), symmetric.
        hinge: distances below it count.
        reduction: 'sum' or 'mean' over the pairs below the hinge, each unordered pair once.

    Returns:
        A scalar <= 0. Without any pair below the hinge it is 0 in both reductions (the published
        mean is NaN there).

    Raises:
        UserError: another reduction.
    """
    rows, columns = _pairs(distances)
    pairs = distances[rows, columns]
    close = pairs < hinge
    total = -jnp.sum(jnp.where(close, pairs, 0.0))
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / jnp.maximum(jnp.sum(close, dtype=total.dtype), 1)
    raise UserError(f"hinge repulsion: reduction {reduction!r} is unknown, use 'sum' or 'mean'")


def block_matrix(latents: int, clusters: int, p_in: float, p_out: float) -> jax.Array:
    """Target link probabilities of a planted partition with consecutive clusters of equal size.

    Source: docs/reference.md#nac-block-model.

    Args:
        latents: U.
        clusters: number of clusters, a divisor of U.
        p_in: probability of a link within a cluster.
        p_out: probability of a link between two clusters.

    Returns:
        (U, U), float32.

    Raises:
        UserError: the latents cannot be split into equal clusters.
    """
    if clusters < 1 or latents % clusters:
        raise UserError(
            f"stochastic block: {latents} latents cannot be split into {clusters} equal clusters"
        )
    cluster = np.arange(latents) // (latents // clusters)
    return jnp.asarray(np.where(cluster[:, None] == cluster, p_in, p_out), jnp.float32)


def match_rows(affinity: jax.Array, target: jax.Array) -> jax.Array:
    """Optimal assignment of the rows of `affinity` to the rows of `target`, without gradient.

    Source: docs/reference.md#nac-block-model.

    Args:
        affinity: (U, V).
        target: (U, V).

    Returns:
        (U,), a permutation: the row of `affinity` for each row of `target`, so that the summed
        squared difference is minimal.
    """
    # |t - a|^2 = |t|^2 + |a|^2 - 2 t.a; the first two sums are equal for every permutation, so only
    # the product matters: one matrix product instead of a (U, U, V) difference.
    affinity, target = jax.lax.stop_gradient((affinity, target))
    cost = -jnp.matmul(target, affinity.T, precision=jax.lax.Precision.HIGHEST)
    rows, chosen = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(chosen).at[rows].set(chosen)


def stochastic_block(
    affinities: jax.Array, target: jax.Array, clip: float | None = None
) -> jax.Array:
    """Mean squared error between kernels and a block matrix, up to the order of the receivers.

    The rows of each kernel (not its columns) are permuted to match the target best; the means over
    the entries are summed over the kernels.

    Source: docs/reference.md#nac-block-model.

    Args:
        affinities: (P, U, U), one per distinct kernel (every propagator, when bandwidths are
            learned).
        target: (U, U), see `block_matrix`.
        clip: entries whose squared error is below it count as `clip` and get no gradient; None or 0
            for no clipping.

    Returns:
        A scalar.
    """

    def one(affinity: jax.Array) -> jax.Array:
        matched = affinity[match_rows(affinity, target)]
        error = jnp.square(matched - target)
        if clip:
            error = jnp.where(error < clip, clip, error)
        return error.mean()

    return jnp.sum(jax.vmap(one)(affinities))


def fit_gaussian_mixture(
    distances: jax.Array | np.ndarray, components: int = 1, seed: int = 0
) -> Mixture:
    """Fits a Gaussian mixture to the distances of all pairs, on the host, once before training.

    Expectation maximisation from a k-means start.

    Source: docs/reference.md#nac-mixture.

    Args:
        distances: (U, U).
        components: M.
        seed: of the k-means start.

    Raises:
        UserError: there are fewer pairs than components.
    """
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415 (slow to import, rarely used)

    distances = np.asarray(distances)
    pairs = distances[_pairs(distances)].reshape(-1, 1)
    if not 1 <= components <= len(pairs):
        raise UserError(
            f"gaussian mixture: {components} components cannot be fitted to {len(pairs)} pairs"
        )
    fit = GaussianMixture(components, covariance_type="spherical", random_state=seed).fit(pairs)
    return Mixture(
        weights=jnp.asarray(fit.weights_, jnp.float32),
        means=jnp.asarray(fit.means_[:, 0], jnp.float32),
        scales=jnp.asarray(np.sqrt(fit.covariances_), jnp.float32),
    )


def gaussian_mixture(distances: jax.Array, mixture: Mixture, reduction: str = "mean") -> jax.Array:
    """Negative log density of the pairs' distances under a mixture, in nats.

    Keeps the distances distributed as they were when the mixture was fitted.

    Source: docs/reference.md#nac-mixture.

    Args:
        distances: (U, U).
        mixture: made by `fit_gaussian_mixture`.
        reduction: 'mean' or 'sum' over unordered pairs.

    Returns:
        A scalar.

    Raises:
        UserError: another reduction.
    """
    rows, columns = _pairs(distances)
    weights, means, scales = (part[None] for part in mixture)
    z = (distances[rows, columns, None] - means) / scales
    log_component = -0.5 * (jnp.square(z) + jnp.log(2 * jnp.pi)) - jnp.log(scales)
    log_density = jax.nn.logsumexp(log_component + jnp.log(weights), axis=-1)
    if reduction == "mean":
        return -log_density.mean()
    if reduction == "sum":
        return -log_density.sum()
    raise UserError(f"gaussian mixture: reduction {reduction!r} is unknown, use 'sum' or 'mean'")
