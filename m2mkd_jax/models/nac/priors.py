"""Graph priors: a random graph, and signatures whose kernel reproduces that graph.

Axes: U latents (nodes), C signature. Computed once before training, from a seed.

Source: Weiss et al. 2022 (arXiv 2210.08031); docs/reference.md#nac-priors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.kernels import distance

if TYPE_CHECKING:
    import networkx

SLACK = 0.01  # how far beyond the margin the polishing steps push distances


def _balanced_tree(nx: Any, latents: int, seed: int, r: int, h: int) -> networkx.Graph:
    graph = nx.balanced_tree(r, h)
    last = graph.number_of_nodes() - 1
    if latents == last + 2:
        # A binary tree has 2^n - 1 nodes: as published, one leaf more reaches a power of two.
        graph.add_edge(last, last + 1)
    return graph


def _watts_strogatz(
    nx: Any, latents: int, seed: int, k: int | None = None, p: float = 0.4
) -> networkx.Graph:
    k = round(0.1 * latents) if k is None else k
    return nx.watts_strogatz_graph(latents, k, p, seed=seed)


def _barbell(
    nx: Any, latents: int, seed: int, m1: int | None = None, m2: int = 0
) -> networkx.Graph:
    return nx.barbell_graph((latents - m2) // 2 if m1 is None else m1, m2)


def _hypercube(nx: Any, latents: int, seed: int) -> networkx.Graph:
    # The published code always builds dimension 8, whatever the number of latents.
    return nx.hypercube_graph(max(latents.bit_length() - 1, 0))


def _grid(nx: Any, latents: int, seed: int, dim: Any, periodic: bool = False) -> networkx.Graph:
    return nx.grid_graph(tuple(dim), periodic=periodic)


# Each takes (networkx, latents, seed, **options).
GENERATORS: dict[str, Callable[..., networkx.Graph]] = {
    "barabasi-albert": lambda nx, latents, seed, m: nx.barabasi_albert_graph(latents, m, seed=seed),
    "erdos-renyi": lambda nx, latents, seed, p: nx.erdos_renyi_graph(latents, p, seed=seed),
    "planted-partition": lambda nx, latents, seed, **options: nx.planted_partition_graph(
        **options, seed=seed
    ),
    "ring-of-cliques": lambda nx, latents, seed, num_cliques, clique_size: nx.ring_of_cliques(
        num_cliques, clique_size
    ),
    "watts-strogatz": _watts_strogatz,
    "grid": _grid,
    "balanced-tree": _balanced_tree,
    "barbell": _barbell,
    "hypercube": _hypercube,
    "complete": lambda nx, latents, seed: nx.complete_graph(latents),
    "none": lambda nx, latents, seed: nx.empty_graph(latents),
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _are_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_count, value))


# What the options of the generators must be, by their names.
OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("m", "l", "k", "num_cliques", "clique_size", "r", "h", "m1", "m2"),
        ("a whole number", _is_count),
    ),
    **dict.fromkeys(("p", "p_in", "p_out"), ("from 0 to 1", _is_share)),
    "dim": ("some whole numbers", _are_counts),
    "periodic": ("True or False", lambda value: type(value) is bool),
}


def _check_options(options: dict[str, Any]) -> None:
    """Refuses options of no generator or of another kind. Raises ValueError."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"{name} is no option; there are {', '.join(OPTIONS)}")
        words, allows = OPTIONS[name]
        if not allows(value):
            raise ValueError(f"{name} is {value!r}; it must be {words}")


def build_graph(prior: str, latents: int, options: dict[str, Any], seed: int) -> np.ndarray:
    """Draws a graph.

    Source: docs/reference.md#nac-priors.

    Args:
        prior: a key of GENERATORS.
        latents: U.
        options: of the prior (optional ones in brackets): 'barabasi-albert' m; 'erdos-renyi' p;
            'planted-partition' l clusters of size k, p_in, p_out; 'ring-of-cliques' num_cliques,
            clique_size; 'watts-strogatz' [k = latents / 10, p = 0.4]; 'grid' dim [periodic];
            'balanced-tree' r, h; 'barbell' [m1, m2]; 'hypercube'; 'complete'; 'none', no edges.
        seed: the same seed gives the same graph.

    Returns:
        The adjacency matrix (U, U), float32 of 0 and 1, symmetric with a zero diagonal.

    Raises:
        UserError: an unknown prior, options that it does not take, or a graph without exactly
            `latents` nodes.
    """
    if prior not in GENERATORS:
        raise UserError(f"graph prior {prior!r} is unknown: use one of {', '.join(GENERATORS)}")
    import networkx  # noqa: PLC0415 - slow import

    try:
        _check_options(options)
        graph = GENERATORS[prior](networkx, latents, seed, **options)
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
    """Mean over all (u, v) of max(margin, d) on edges and max(-margin, -d) elsewhere.

    The diagonal counts as non-edges, as published.

    Source: docs/reference.md#nac-priors.

    Args:
        signatures: (U, C).
        adjacency: (U, U).
        margin: of the distance d.

    Returns:
        A scalar.
    """
    return _loss_and_score(signatures, adjacency, margin)[0]


def score(signatures: jax.Array, adjacency: jax.Array, margin: float = 0.8) -> jax.Array:
    """Share of the (U, U) entries where the links d < margin differ from the graph's edges.

    Self-links on the diagonal are not counted. 0 is a perfect fit.

    Args:
        signatures, adjacency, margin: as for `hinge_loss`.

    Returns:
        A scalar.
    """
    return _loss_and_score(signatures, adjacency, margin)[1]


def _loss_and_score(
    signatures: jax.Array,
    adjacency: jax.Array,
    margin: float,
    slack: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`hinge_loss`, with the margin widened by `slack` on both sides, and `score`."""
    d = distance(signatures, signatures)
    edges, others = jnp.maximum(margin - slack, d), jnp.maximum(-margin - slack, -d)
    loss = jnp.where(adjacency == 1, edges, others).mean()
    links = (d < margin).astype(jnp.float32)
    return loss, jnp.abs(links - jnp.eye(len(adjacency)) - adjacency).mean()


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
    """Fits signatures so that the neighbours of each latent are those closer than `margin`.

    As published: `steps` steps of Adam on `hinge_loss` from a random orthogonal matrix. That loss
    is minimal at the margin itself, where Adam's steps move links back and forth across it. So a
    fit with wrong links continues for at most `polish` steps with a decaying learning rate and a
    margin widened by SLACK on both sides, until no link is wrong.

    Source: docs/reference.md#nac-priors.

    Args:
        adjacency: (U, U) of 0 and 1.
        dim: C.
        seed: of the start.
        steps: published number of steps.
        learning_rate: of Adam.
        margin: of the distance.
        polish: largest number of further steps; 0 for the published steps only.
        init: the start (U, C), in place of a random one.

    Returns:
        Signatures (U, C), float32: the last ones with the best `score`; and that score.
    """
    adjacency = jnp.asarray(adjacency, jnp.float32)
    if init is None:
        shape = (len(adjacency), dim)
        init = jax.nn.initializers.orthogonal()(jax.random.key(seed), shape, jnp.float32)
    # Many distances end within 1e-3 of the margin: TF32 or bfloat16 products are too coarse.
    with jax.default_matmul_precision("highest"):
        fitted, best = _fit(jnp.asarray(init), adjacency, steps, polish, learning_rate, margin)
    return fitted, float(best)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _fit(
    init: jax.Array,
    adjacency: jax.Array,
    steps: int,
    polish: int,
    learning_rate: float,
    margin: float,
) -> tuple[jax.Array, jax.Array]:
    """The loop of `fit_signatures`."""
    decaying = optax.cosine_decay_schedule(learning_rate, max(polish, 1))
    rate = optax.join_schedules([optax.constant_schedule(learning_rate), decaying], [steps])
    adam = optax.adam(rate)
    gradient_of = jax.grad(_loss_and_score, has_aux=True)

    def is_unfinished(carry: tuple[Any, ...]) -> jax.Array:
        i, _, _, _, best_score = carry
        return (i < steps) | ((i < steps + polish) & (best_score > 0))

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, signatures, state, best, best_score = carry
        slack = jnp.where(i < steps, 0.0, SLACK)
        gradient, now = gradient_of(signatures, adjacency, margin, slack)
        best = jnp.where(now <= best_score, signatures, best)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = adam.update(gradient, state)
        signatures = optax.apply_updates(signatures, updates)
        return i + 1, signatures, state, best, jnp.minimum(now, best_score)

    start = (0, init, adam.init(init), init, jnp.inf)
    _, signatures, _, best, best_score = jax.lax.while_loop(is_unfinished, step, start)
    last = score(signatures, adjacency, margin)
    return jnp.where(last <= best_score, signatures, best), jnp.minimum(last, best_score)


def prior_signatures(
    prior: str, latents: int, dim: int, options: dict[str, Any], seed: int
) -> jax.Array:
    """Initial signatures under a graph prior.

    'none' gives standard normal numbers, 'complete' the same unit vector for all latents, as
    published; any other prior `build_graph` and `fit_signatures`.

    Source: docs/reference.md#nac-priors.

    Args:
        prior, latents, options, seed: as for `build_graph`.
        dim: C.

    Returns:
        (U, C), float32.

    Raises:
        UserError: as for `build_graph`.
    """
    adjacency = build_graph(prior, latents, options, seed)
    if prior == "none":
        return jax.random.normal(jax.random.key(seed), (latents, dim))
    if prior == "complete":
        return jnp.zeros((latents, dim)).at[:, 0].set(1.0)
    return fit_signatures(adjacency, dim, seed)[0]
