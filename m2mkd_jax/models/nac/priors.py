"""Graph priors: a random graph, and signatures whose kernel gives that graph (reference section 3).

Axes: U latents (nodes), C signature. Done once before training, on the host's seed alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import optax

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.kernels import distance

SLACK = 0.01  # how far the polishing steps push distances past the margin


def _balanced_tree(latents: int, seed: int, r: int, h: int) -> networkx.Graph:
    graph = networkx.balanced_tree(r, h)
    last = graph.number_of_nodes() - 1
    if latents == last + 2:
        # A binary tree has 2^n - 1 nodes: as published, one leaf more reaches a power of two.
        graph.add_edge(last, last + 1)
    return graph


def _watts_strogatz(
    latents: int, seed: int, k: int | None = None, p: float = 0.4
) -> networkx.Graph:
    k = round(0.1 * latents) if k is None else k
    return networkx.watts_strogatz_graph(latents, k, p, seed=seed)


def _barbell(latents: int, seed: int, m1: int | None = None, m2: int = 0) -> networkx.Graph:
    return networkx.barbell_graph((latents - m2) // 2 if m1 is None else m1, m2)


def _hypercube(latents: int, seed: int) -> networkx.Graph:
    # The published code always builds the one of dimension 8, whatever the number of latents.
    return networkx.hypercube_graph(max(latents.bit_length() - 1, 0))


def _grid(latents: int, seed: int, dim: Any, periodic: bool = False) -> networkx.Graph:
    return networkx.grid_graph(tuple(dim), periodic=periodic)


# Each takes (latents, seed, **options).
GENERATORS: dict[str, Callable[..., networkx.Graph]] = {
    "barabasi-albert": lambda latents, seed, m: networkx.barabasi_albert_graph(
        latents, m, seed=seed
    ),
    "erdos-renyi": lambda latents, seed, p: networkx.erdos_renyi_graph(latents, p, seed=seed),
    "planted-partition": lambda latents, seed, l, k, p_in, p_out: (  # noqa: E741 (published name)
        networkx.planted_partition_graph(l, k, p_in, p_out, seed=seed)
    ),
    "ring-of-cliques": lambda latents, seed, num_cliques, clique_size: networkx.ring_of_cliques(
        num_cliques, clique_size
    ),
    "watts-strogatz": _watts_strogatz,
    "grid": _grid,
    "balanced-tree": _balanced_tree,
    "barbell": _barbell,
    "hypercube": _hypercube,
    "complete": lambda latents, seed: networkx.complete_graph(latents),
    "none": lambda latents, seed: networkx.empty_graph(latents),
}


def build_graph(prior: str, latents: int, options: dict[str, Any], seed: int) -> np.ndarray:
    """The adjacency matrix (U, U) float32 of 0 and 1, symmetric with a zero diagonal.

    prior and its options: 'barabasi-albert' m; 'erdos-renyi' p; 'planted-partition' l, k (clusters,
    their size), p_in, p_out; 'ring-of-cliques' num_cliques, clique_size; 'watts-strogatz' [k =
    latents / 10, p = 0.4]; 'grid' dim [periodic]; 'balanced-tree' r, h; 'barbell' [m1, m2];
    'hypercube'; 'complete'; 'none' (no edge). The same seed gives the same graph. Raises UserError
    on an unknown prior, on options it does not take, and when it does not have `latents` nodes.
    """
    if prior not in GENERATORS:
        raise UserError(f"graph prior {prior!r} is unknown: use one of {', '.join(GENERATORS)}")
    try:
        graph = GENERATORS[prior](latents, seed, **options)
    except (TypeError, ValueError, networkx.NetworkXException) as error:
        reason = str(error).replace("<lambda>()", prior).replace("\n", " ")
        raise UserError(f"graph prior {prior}: options {dict(options)}: {reason}") from error
    nodes = graph.number_of_nodes()
    if nodes != latents:
        raise UserError(
            f"graph prior {prior} with options {dict(options)} has {nodes} nodes, "
            f"but there are {latents} latents"
        )
    return networkx.to_numpy_array(graph, dtype=np.float32, weight=None)


def hinge_loss(signatures: jax.Array, adjacency: jax.Array, margin: float = 0.8) -> jax.Array:
    """Mean over all (u, v) of max(margin, d) on edges, max(-margin, -d) elsewhere; scalar.

    signatures: (U, C); adjacency: (U, U). The diagonal counts as non-edges, as published.
    """
    return _loss_and_score(signatures, adjacency, margin)[0]


def score(signatures: jax.Array, adjacency: jax.Array, margin: float = 0.8) -> jax.Array:
    """Share of the (U, U) entries where d < margin, the diagonal apart, is not the graph; scalar.

    0 is a perfect fit.
    """
    return _loss_and_score(signatures, adjacency, margin)[1]


def _loss_and_score(signatures, adjacency, margin, slack=0.0):
    d = distance(signatures, signatures)
    edges, others = jnp.maximum(margin - slack, d), jnp.maximum(-margin - slack, -d)
    loss = jnp.where(adjacency == 1, edges, others).mean()
    return loss, jnp.abs((d < margin) - jnp.eye(len(adjacency)) - adjacency).mean()


def fit_signatures(
    adjacency: jax.Array | np.ndarray,
    dim: int,
    seed: int,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    margin: float = 0.8,
    polish: int = 3000,
    init: jax.Array | None = None,
) -> tuple[jax.Array, float]:
    """Signatures (U, C = dim) float32 whose neighbours are exactly those closer than `margin`.

    adjacency: (U, U) of 0 and 1. As published: `steps` of Adam on `hinge_loss` from a random
    orthogonal matrix drawn by `seed`, or from `init` (U, C). That loss is content at the margin
    itself, where Adam's steps carry links to and fro across it; so a fit with wrong links goes on
    for at most `polish` steps with a falling rate and a margin widened by SLACK on both sides, and
    ends when no link is wrong. polish = 0 does the published steps only. Returns the last of the
    signatures with the best `score` on the way, and that score.
    """
    adjacency = jnp.asarray(adjacency, jnp.float32)
    if init is None:
        shape = (len(adjacency), dim)
        init = jax.nn.initializers.orthogonal()(jax.random.key(seed), shape, jnp.float32)
    # Many distances end within 1e-3 of the margin: TF32 or bfloat16 products would blur the fit.
    with jax.default_matmul_precision("highest"):
        fitted, best = _fit(jnp.asarray(init), adjacency, steps, polish, learning_rate, margin)
    return fitted, float(best)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _fit(init, adjacency, steps: int, polish: int, learning_rate: float, margin: float):
    falling = optax.cosine_decay_schedule(learning_rate, max(polish, 1))
    rate = optax.join_schedules([optax.constant_schedule(learning_rate), falling], [steps])
    adam = optax.adam(rate)
    gradient_of = jax.grad(_loss_and_score, has_aux=True)

    def goes_on(carry):
        i, _, _, _, best_score = carry
        return (i < steps) | ((i < steps + polish) & (best_score > 0))

    def step(carry):
        i, signatures, state, best, best_score = carry
        slack = jnp.where(i < steps, 0.0, SLACK)
        gradient, now = gradient_of(signatures, adjacency, margin, slack)
        best = jnp.where(now <= best_score, signatures, best)
        updates, state = adam.update(gradient, state)
        signatures = optax.apply_updates(signatures, updates)
        return i + 1, signatures, state, best, jnp.minimum(now, best_score)

    start = (0, init, adam.init(init), init, jnp.inf)
    _, signatures, _, best, best_score = jax.lax.while_loop(goes_on, step, start)
    last = score(signatures, adjacency, margin)
    return jnp.where(last <= best_score, signatures, best), jnp.minimum(last, best_score)


def prior_signatures(
    prior: str, latents: int, dim: int, options: dict[str, Any], seed: int
) -> jax.Array:
    """The signatures (U, C = dim) float32 that latents start from under a graph prior.

    'none': standard normal numbers. 'complete': all the same unit vector, as published. Otherwise
    `build_graph` and `fit_signatures`. Raises UserError as `build_graph` does.
    """
    adjacency = build_graph(prior, latents, options, seed)
    if prior == "none":
        return jax.random.normal(jax.random.key(seed), (latents, dim))
    if prior == "complete":
        return jnp.zeros((latents, dim)).at[:, 0].set(1.0)
    return fit_signatures(adjacency, dim, seed)[0]
