"""Graph priors against the published code's numbers (k_graphs)."""

import json
from pathlib import Path

import numpy as np
import pytest

from m2mkd_jax.models.nac.priors import build_graph, fit_signatures, hinge_loss, score

FOLDER = Path(__file__).parents[1] / "fixtures/k_graphs"
IO = np.load(FOLDER / "io.npz")
META = json.loads((FOLDER / "meta.json").read_text())

# The published fits that end away from a perfect one: after 100-300 Adam steps over the hinge's
# kinks float32 and float64 runs of the ORIGINAL already differ (final losses by 1.2e-4 and 2.7e-4,
# scores 146/144 and 6/14 entries), so no second run can land on the same loss. Ours must be lower.
CHAOTIC = ("barabasi-albert-m6.dim8", "watts-strogatz.dim8")
# Fits that satisfy every link long before the last step: the signatures themselves can be compared.
# (barabasi-albert-m6.dim64 ends as perfectly, one Adam step aside in a few numbers.)
SETTLED = [c for c in META if c.endswith("dim64") and not c.startswith("barabasi-albert-m6")]


def adjacency(case):
    return IO[case.rsplit(".", 1)[0] + ".adjacency"]


def fit(case, **options):
    init = IO[f"{case}.init_signatures"]
    return fit_signatures(adjacency(case), init.shape[1], 0, init=init, **options)


@pytest.mark.parametrize("case", META)
@pytest.mark.parametrize("when", ["init", "final"])
def test_loss_and_score(case, when):
    signatures = IO[f"{case}.{when}_signatures"]
    loss = hinge_loss(signatures, adjacency(case), META[case]["truncation"])
    np.testing.assert_allclose(loss, META[case][f"{when}_loss"], rtol=1e-5)
    assert float(score(signatures, adjacency(case))) == META[case][f"{when}_score"]


@pytest.mark.parametrize("case", META)
def test_fit_from_the_published_start(case):
    signatures, got = fit(case)
    assert got <= META[case]["final_score"]
    assert got == float(score(signatures, adjacency(case)))
    ratio = float(hinge_loss(signatures, adjacency(case))) / META[case]["final_loss"]
    # Losses are negative: more than 1 is better.
    assert ratio > 1 - 1e-4
    if case not in CHAOTIC:
        assert ratio < 1 + 1e-4


@pytest.mark.parametrize("case", SETTLED)
def test_fitted_signatures(case):
    assert len(SETTLED) == 5
    signatures, _ = fit(case, polish=0)
    np.testing.assert_allclose(signatures, IO[f"{case}.final_signatures"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", META)
def test_fit_from_our_start(case):
    dim = IO[f"{case}.init_signatures"].shape[1]
    signatures, got = fit_signatures(adjacency(case), dim, seed=0)
    assert signatures.shape == (32, dim)
    assert got <= META[case]["final_score"]


@pytest.mark.parametrize("case", [c for c in META if c.endswith("dim64")])
def test_generators_give_the_published_kind_of_graph(case):
    published = adjacency(case)
    options = {k: v for k, v in META[case]["generator_kwargs"].items() if k != "n"}
    ours = build_graph(META[case]["graph_type"], len(published), options, seed=0)
    assert (ours == ours.T).all() and not ours.diagonal().any()
    edges = META[case]["edges"]
    if META[case]["graph_type"] == "ring-of-cliques":
        np.testing.assert_array_equal(ours, published)
    elif META[case]["graph_type"] in ("erdos-renyi", "planted-partition"):
        # Binomial numbers of edges: within 5 standard deviations of the published draw.
        assert abs(ours.sum() / 2 - edges) < 5 * np.sqrt(2 * edges)
    else:
        assert ours.sum() / 2 == edges
