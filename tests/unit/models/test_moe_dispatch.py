"""Dispatches: by hand-written routings, and against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.moe import chunks, dispatch, experts, router
from m2mkd_jax.models.moe import grouped as grouped_layers
from m2mkd_jax.models.moe.grouped import METHODS, grouped_linear
from m2mkd_jax.models.moe.router import ExpertChoice, TokenChoice
from tests.support import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, assert_close, assert_trees_close

# One group, four tokens, two choices each, three experts.
CHOSEN = [[0, 1], [0, 1], [0, 2], [1, 0]]
WEIGHTS = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.5], [0.25, 0.5]]


def by_hand(order=None) -> TokenChoice:
    order = None if order is None else jnp.asarray([order])
    return TokenChoice(jnp.asarray([CHOSEN]), jnp.asarray([WEIGHTS]), order)


# (order of the tokens, slots per expert): token and choice in each slot, or None.
FIRST_COME = [
    # Expert 0 is the first choice of tokens 0, 1, 2, and the second of 3; expert 1 the first of 3,
    # then the second of 0 and 1.
    (None, 2, [[(0, 0), (1, 0)], [(3, 0), (0, 1)], [(2, 1), None]]),
    (None, 1, [[(0, 0)], [(3, 0)], [(2, 1)]]),
    (
        None,
        4,
        [
            [(0, 0), (1, 0), (2, 0), (3, 1)],
            [(3, 0), (0, 1), (1, 1), None],
            [(2, 1), None, None, None],
        ],
    ),
    ([2, 3, 1, 0], 2, [[(2, 0), (1, 0)], [(3, 0), (1, 1)], [(2, 1), None]]),
]


@pytest.mark.parametrize("order, slots, expected", FIRST_COME)
def test_who_gets_which_slot(order, slots, expected):
    source, slot = dispatch.fill_slots(by_hand(order), 3, slots)
    none, dropped = len(CHOSEN) * 2, 3 * slots
    flat = [held for expert in expected for held in expert]
    np.testing.assert_array_equal(source[0], [none if h is None else 2 * h[0] + h[1] for h in flat])
    where = {held: i for i, held in enumerate(flat) if held is not None}
    pairs = [(s, k) for s in range(4) for k in range(2)]
    np.testing.assert_array_equal(slot[0], [where.get(pair, dropped) for pair in pairs])


def test_groups_have_their_own_slots():
    both = jax.tree.map(lambda *a: jnp.concatenate(a), by_hand([2, 3, 1, 0]), by_hand(range(4)))
    pair = dispatch.fill_slots(both, 3, 2)
    for i, order in enumerate(([2, 3, 1, 0], None)):
        alone = dispatch.fill_slots(by_hand(order), 3, 2)
        for together, single in zip(pair, alone, strict=True):
            np.testing.assert_array_equal(together[i], single[0])


def times(weights, rows, linear):
    return linear(rows, weights)


# Expert e multiplies by 10^e, one channel, and adds nothing.
TENFOLD = {"kernel": jnp.asarray([1.0, 10.0, 100.0])[:, None, None], "bias": jnp.zeros((3, 1))}
ONE_TO_FOUR = jnp.asarray([1.0, 2.0, 3.0, 4.0])[None, :, None]


def test_outputs_by_hand():
    y, dropped = dispatch.dropless(ONE_TO_FOUR, by_hand(), TENFOLD, times)
    # 1 (.75 + .25 10), 2 (.5 + .5 10), 3 (1 + .5 100), 4 (.25 10 + .5)
    np.testing.assert_allclose(y[0, :, 0], [3.25, 11.0, 153.0, 12.0])
    assert dropped == 0
    y, dropped = dispatch.capacity(ONE_TO_FOUR, by_hand(), TENFOLD, times, slots=2)
    # Dropped: second choice of token 1, first of token 2, second of token 3.
    np.testing.assert_allclose(y[0, :, 0], [3.25, 1.0, 150.0, 10.0])
    assert dropped == 3 / 8
    y, dropped = dispatch.capacity(ONE_TO_FOUR, by_hand([2, 3, 1, 0]), TENFOLD, times, slots=1)
    # Only the first choices of tokens 2 and 3 and the second of token 2 are served.
    np.testing.assert_allclose(y[0, :, 0], [0.0, 0.0, 153.0, 10.0])
    assert dropped == 5 / 8


def test_expert_choice_by_hand():
    routing = ExpertChoice(
        jnp.asarray([[[0, 3], [3, 1], [3, 0]]]),
        jnp.asarray([[[0.5, 0.25], [1.0, 0.5], [0.5, 0.25]]]),
    )
    for move in (dispatch.dropless, functools.partial(dispatch.capacity, slots=99)):
        y, dropped = move(ONE_TO_FOUR, routing, TENFOLD, times)
        # 1 (.5 + .25 100), 2 (.5 10), nobody takes 3, 4 (.25 + 10 + .5 100)
        np.testing.assert_allclose(y[0, :, 0], [25.5, 10.0, 0.0, 241.0])
        assert dropped == 1 / 4


EXPERTS, WIDTH, TOKENS = 4, 6, 20


def random_experts() -> dict:
    draw = np.random.default_rng(0)
    shapes = {"fc1": (EXPERTS, WIDTH, 4 * WIDTH), "fc2": (EXPERTS, 4 * WIDTH, WIDTH)}
    return {
        name: {
            "kernel": jnp.asarray(draw.normal(size=shape) * shape[1] ** -0.5, jnp.float32),
            "bias": jnp.asarray(draw.normal(size=(EXPERTS, shape[2])), jnp.float32),
        }
        for name, shape in shapes.items()
    }


def every_expert_on_every_token(x, gates, weights):
    """The dense loop: gates (G, S, E), zero where a token does not go."""
    y = jnp.zeros_like(x)
    for e in range(EXPERTS):
        fc1, fc2 = (
            {"kernel": layer["kernel"][e], "bias": layer["bias"][e][None, None]}
            for layer in (weights["fc1"], weights["fc2"])
        )
        h = jax.nn.gelu(x @ fc1["kernel"] + fc1["bias"], approximate=False)
        y += gates[..., e, None] * (h @ fc2["kernel"] + fc2["bias"])
    return y


def spread(routing, tokens: int):
    """A routing's weights as gates (G, S, E)."""
    if isinstance(routing, ExpertChoice):
        hot = jax.nn.one_hot(routing.tokens, tokens)  # (G, E, C, S)
        return jnp.einsum("gec,gecs->gse", routing.weights, hot)
    return jnp.einsum("gsk,gske->gse", routing.weights, jax.nn.one_hot(routing.experts, EXPERTS))


DECISIONS = {
    "published": lambda logits: router.published(logits, 2),
    "vmoe": lambda logits: router.vmoe(logits, 3),
    "expert_choice": lambda logits: router.expert_choice(logits, 7),
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", DECISIONS)
def test_all_dispatches_are_the_dense_loop(kind, groups):
    """Values and gradients, of tokens, logits and experts; one expert is nobody's choice."""
    draw = np.random.default_rng(groups)
    x = jnp.asarray(draw.normal(size=(groups, TOKENS // groups, WIDTH)), jnp.float32)
    logits = draw.normal(size=(groups, TOKENS // groups, EXPERTS))
    logits[..., 2] -= 100.0 if kind == "published" else 0.0
    decide = DECISIONS[kind]
    if kind == "expert_choice":
        decide = lambda logits: router.expert_choice(logits, 7 // groups + 1)

    def loop(x, routing, weights):
        return every_expert_on_every_token(x, spread(routing, x.shape[1]), weights), 0.0

    def moved(x, routing, weights):
        return dispatch.dropless(x, routing, weights, experts.mlp)

    def in_tiles(x, routing, weights):
        """As on a GPU."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "default_method", lambda: "batched")
            return dispatch.dropless(x, routing, weights, experts.mlp)

    def fitted(x, routing, weights):
        return dispatch.capacity(x, routing, weights, experts.mlp, slots=x.shape[1])

    def value(move, x, logits, weights):
        y, dropped = move(x, decide(logits), weights)
        return jnp.sum(jnp.square(y + 1.0)), (y, dropped)

    arguments = (x, jnp.asarray(logits, jnp.float32), random_experts())
    results = {}
    for move in (loop, moved, in_tiles, fitted):
        run = jax.jit(
            jax.value_and_grad(functools.partial(value, move), argnums=(0, 1, 2), has_aux=True)
        )
        (_, (y, dropped)), grads = run(*arguments)
        results[move] = y, grads
        assert dropped == 0 or (kind == "expert_choice" and move is not loop)
    for move in (moved, in_tiles, fitted):
        assert_close(results[move][0], results[loop][0], OUTPUT_TOLERANCE)
        assert_trees_close(results[move][1], results[loop][1], GRADIENT_TOLERANCE)
    if kind == "published":
        assert not results[loop][1][2]["fc1"]["kernel"][2].any()


# Rows per expert: none at the start, in the middle, at the end; chunks of 16 and their edges; more
# rows than the largest chunk holds.
SIZES = [
    (0, 5, 0, 59),
    (16, 17, 15, 16),
    (64, 0, 0, 0),
    (1, 1, 61, 1),
    (3, 800, 0, 200, 0, 0, 21, 0),
    (0, 0, 0, 0, 0, 0, 0, 769),
    (60, 70, 62, 64),  # as many tiles for each expert
]


@pytest.mark.parametrize(("sizes", "c"), [*((sizes, 5) for sizes in SIZES), (SIZES[-2], 6)])
def test_grouped_linear_is_each_experts_own(sizes, c, monkeypatch):
    if c == 6:  # as in large layers
        monkeypatch.setattr(chunks, "SMALL_LAYER", 0)
    draw, n, e = np.random.default_rng(0), sum(sizes), len(sizes)
    rows, kernel, bias, pull = (
        jnp.asarray(draw.normal(size=shape), jnp.float32)
        for shape in ((n, c), (e, c, 7), (e, 7), (n, 7))
    )
    owner = np.repeat(np.arange(e), sizes)

    def literal(rows, kernel, bias):
        return jnp.einsum("nc,ncd->nd", rows, kernel[owner]) + bias[owner]

    def grouped(method, rows, kernel, bias):
        return grouped_linear(rows, kernel, bias, jnp.asarray(sizes), method)

    def both(function):
        y, pullback = jax.vjp(function, rows, kernel, bias)
        return y, pullback(pull)

    expected = jax.jit(functools.partial(both, literal))()
    for method in METHODS:
        y, grads = jax.jit(functools.partial(both, functools.partial(grouped, method)))()
        assert_close(y, expected[0], OUTPUT_TOLERANCE, method)
        assert_trees_close(grads, expected[1], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("rows", [1, 17, 64, 1000, 25_216])
@pytest.mark.parametrize("experts", [1, 4, 8, 64])
def test_tiles_hold_any_sizes(rows, experts):
    """Every row has a place of its own in a tile of its expert."""
    draw = np.random.default_rng(0)
    alone = np.zeros(experts, int)
    alone[experts // 2] = rows
    ones = np.full(experts, rows // experts)
    ones[0] += rows - ones.sum()
    many = draw.multinomial(rows, draw.dirichlet(np.ones(experts)))
    # The most tiles: one row in the last tile of each expert.
    _, tile = grouped_layers._tile(rows, experts)
    worst = np.zeros(experts, int)
    for i in range(experts):
        worst[i] = min(rows - worst.sum(), tile + 1 if i < experts - 1 else rows)
    for sizes in (alone, ones, many, worst):
        own = grouped_layers.tiles(jnp.asarray(sizes), rows)
        place, owner = np.asarray(own.place), np.repeat(np.arange(experts), sizes)
        assert len(set(place.tolist())) == rows and place.min() >= 0
        assert place.max() < own.source.size
        np.testing.assert_array_equal(own.source.reshape(-1)[place], np.arange(rows))
        assert (own.source < rows).sum() == rows
        np.testing.assert_array_equal(own.owner[place // own.source.shape[1]], owner)
        assert (
            own.even
            == (np.bincount(own.owner, minlength=experts) == len(own.owner) / experts).all()
        )


@pytest.mark.parametrize("even", [(True, True), (True, False), (False, False)])
def test_experts_of_several_networks_in_tiles(even):
    """Mapped over networks, whether the experts of all, of one or of none have as many tiles."""
    sizes = jnp.asarray([(60, 70, 62, 64) if one else (0, 200, 30, 26) for one in even])
    draw, n, e = np.random.default_rng(0), 256, 4
    rows, kernel, bias, pull = (
        jnp.asarray(draw.normal(size=(2, *shape)), jnp.float32)
        for shape in ((n, 5), (e, 5, 7), (e, 7), (n, 7))
    )

    def both(method, rows, kernel, bias, sizes, pull):
        y, pullback = jax.vjp(
            lambda *weights: grouped_linear(*weights, sizes, method), rows, kernel, bias
        )
        return y, pullback(pull)

    arguments = (rows, kernel, bias, sizes, pull)
    together = jax.jit(jax.vmap(functools.partial(both, "batched")))
    assert str(together.trace(*arguments).jaxpr).count("cond[") == 2  # and no choice between both
    y, grads = together(*arguments)
    for i in range(2):
        expected = both("chunks", *(a[i] for a in arguments))
        assert_close(y[i], expected[0], OUTPUT_TOLERANCE)
        assert_trees_close([g[i] for g in grads], list(expected[1]), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("method", ["chunks", "batched"])
def test_grouped_linear_in_bfloat16_sums_in_float32(method):
    """Sums of many rows: 1 + 2^-7 added up in bfloat16 would stop at 256."""
    rows, bias = jnp.ones((4096, 1), jnp.bfloat16), jnp.zeros((1, 1), jnp.bfloat16)
    kernel, sizes = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.asarray([4096])
    pull = jnp.full((4096, 1), 1.0 + 2**-7, jnp.bfloat16)
    _, pullback = jax.vjp(lambda k, b: grouped_linear(rows, k, b, sizes, method), kernel, bias)
    for grad in pullback(pull):
        assert grad.dtype == jnp.bfloat16 and float(grad.sum()) == 16 * 258


def test_groups_of_images():
    assert dispatch.groups(12, 0) == 1  # one device
    assert dispatch.groups(12, 4) == 3
    assert dispatch.groups(3, 4) == 1  # a batch smaller than a group is one
    with pytest.raises(UserError, match=r"12 images cannot be cut into groups of 5 images on 1"):
        dispatch.groups(12, 5)
