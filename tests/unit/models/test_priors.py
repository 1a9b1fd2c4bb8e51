"""Graph priors: every generator, its mistakes, and signatures that give the graph back."""

import jax
import networkx
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.priors import (
    GENERATORS,
    build_graph,
    fit_signatures,
    prior_signatures,
    score,
)

# prior, latents, options, edges (None: drawn)
GRAPHS = [
    ("barabasi-albert", 24, {"m": 2}, 2 * 22),
    ("erdos-renyi", 24, {"p": 0.3}, None),
    ("planted-partition", 24, {"l": 3, "k": 8, "p_in": 0.9, "p_out": 0.1}, None),
    ("ring-of-cliques", 24, {"num_cliques": 4, "clique_size": 6}, 4 * 15 + 4),
    ("watts-strogatz", 24, {"k": 4, "p": 0.2}, 48),
    ("watts-strogatz", 40, {}, 80),
    ("grid", 24, {"dim": [4, 6]}, 3 * 6 + 4 * 5),
    ("balanced-tree", 15, {"r": 2, "h": 3}, 14),
    ("balanced-tree", 16, {"r": 2, "h": 3}, 15),
    ("barbell", 24, {}, 2 * 66 + 1),
    ("hypercube", 16, {}, 32),
    ("complete", 24, {}, 24 * 23 // 2),
    ("none", 24, {}, 0),
]


def test_every_prior_is_listed():
    assert {prior for prior, *_ in GRAPHS} == set(GENERATORS)


@pytest.mark.parametrize("prior, latents, options, edges", GRAPHS)
def test_graph(prior, latents, options, edges):
    adjacency = build_graph(prior, latents, options, seed=0)
    assert adjacency.shape == (latents, latents) and adjacency.dtype == np.float32
    assert set(np.unique(adjacency)) <= {0.0, 1.0}
    assert (adjacency == adjacency.T).all() and not adjacency.diagonal().any()
    if edges is not None:
        assert adjacency.sum() / 2 == edges
    np.testing.assert_array_equal(adjacency, build_graph(prior, latents, options, seed=0))


@pytest.mark.parametrize(
    "prior", ["barabasi-albert", "erdos-renyi", "planted-partition", "watts-strogatz"]
)
def test_seed_changes_the_drawn_graphs(prior):
    _, latents, options, _ = next(g for g in GRAPHS if g[0] == prior)
    one, two = (build_graph(prior, latents, options, seed) for seed in (0, 1))
    assert (one != two).any()


def test_planted_partition_has_its_clusters_in_order():
    options = {"l": 4, "k": 16, "p_in": 0.9, "p_out": 0.1}
    adjacency = build_graph("planted-partition", 64, options, seed=3)
    cluster = np.arange(64) // 16
    same = cluster[:, None] == cluster
    assert adjacency[same].mean() > 0.7
    assert adjacency[~same].mean() < 0.2


@pytest.mark.parametrize(
    "prior, latents, options, says",
    [
        ("small-world", 24, {}, "'small-world' is unknown"),
        ("ring-of-cliques", 24, {"num_cliques": 4, "clique_size": 8}, "has 32 nodes.* 24 latents"),
        (
            "planted-partition",
            24,
            {"l": 2, "k": 8, "p_in": 1.0, "p_out": 0.0},
            "has 16 nodes.* 24 latents",
        ),
        ("grid", 24, {"dim": [5, 5]}, "has 25 nodes.* 24 latents"),
        ("hypercube", 24, {}, "has 16 nodes.* 24 latents"),
        ("balanced-tree", 24, {"r": 2, "h": 3}, "has 15 nodes.* 24 latents"),
        ("barabasi-albert", 24, {}, "missing 1 required positional argument: 'm'"),
        ("barabasi-albert", 24, {"m": 30}, "m = 30"),
        ("erdos-renyi", 24, {"p": 0.1, "q": 1}, "q is no option; there are m, l, k"),
        ("erdos-renyi", 24, {"p": 0.1, "m": 1}, "unexpected keyword argument 'm'"),
        ("planted-partition", 24, {"backend": "cugraph"}, "backend is no option"),
        # Some of these are drawn without a word, or as something else.
        ("barabasi-albert", 24, {"m": 2.5}, "m is 2.5; it must be a whole number"),
        ("barabasi-albert", 24, {"m": True}, "m is True; it must be a whole number"),
        ("watts-strogatz", 24, {"k": -4}, "k is -4; it must be a whole number"),
        ("ring-of-cliques", 24, {"num_cliques": "4", "clique_size": 6}, "num_cliques is '4'"),
        ("erdos-renyi", 24, {"p": float("nan")}, "p is nan; it must be from 0 to 1"),
        ("erdos-renyi", 24, {"p": 30}, "p is 30; it must be from 0 to 1"),
        ("watts-strogatz", 24, {"k": 4, "p": "0.2"}, "p is '0.2'; it must be from 0 to 1"),
        ("grid", 24, {"dim": 24}, "dim is 24; it must be some whole numbers"),
        ("grid", 24, {"dim": [4, 6], "periodic": "no"}, "periodic is 'no'; it must be True or"),
        ("balanced-tree", 15, {"r": 2, "h": [3]}, r"h is \[3\]; it must be a whole number"),
    ],
)
def test_mistakes(prior, latents, options, says):
    with pytest.raises(UserError, match=says) as error:
        build_graph(prior, latents, options, seed=0)
    assert "\n" not in str(error.value)
    assert prior in str(error.value)


def test_fit_gives_the_graph_back():
    adjacency = build_graph("barabasi-albert", 24, {"m": 2}, seed=0)
    signatures, wrong = fit_signatures(adjacency, 16, seed=0)
    assert wrong == 0
    # The score in other words: exactly the neighbours are closer than 0.8.
    unit = np.asarray(signatures) / np.linalg.norm(signatures, axis=1, keepdims=True)
    close = 1 - unit @ unit.T < 0.8
    np.testing.assert_array_equal(close & ~np.eye(24, dtype=bool), adjacency == 1)
    again, _ = fit_signatures(adjacency, 16, seed=0)
    np.testing.assert_array_equal(signatures, again)
    other, _ = fit_signatures(adjacency, 16, seed=1)
    assert not np.allclose(signatures, other)


def test_polishing_only_improves():
    adjacency = networkx.to_numpy_array(networkx.gnp_random_graph(24, 0.5, seed=0))
    (plain, before), (polished, after) = (
        fit_signatures(adjacency, 4, seed=0, polish=polish) for polish in (0, 1000)
    )
    assert 0 < after < before
    assert before == float(score(plain, adjacency))
    assert after == float(score(polished, adjacency))


def test_priors_without_a_fit():
    complete = np.asarray(prior_signatures("complete", 6, 4, {}, seed=0))
    np.testing.assert_array_equal(complete, np.eye(4, dtype=np.float32)[[0] * 6])
    normal = prior_signatures("none", 500, 64, {}, seed=0)
    assert normal.shape == (500, 64)
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03


def test_prior_signatures():
    options = {"num_cliques": 4, "clique_size": 6}
    signatures = prior_signatures("ring-of-cliques", 24, 16, options, seed=0)
    assert isinstance(signatures, jax.Array) and signatures.shape == (24, 16)
    assert score(signatures, build_graph("ring-of-cliques", 24, options, seed=0)) == 0
