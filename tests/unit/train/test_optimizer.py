"""Decay masks and optimizer updates against plain numpy arithmetic."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.train.optimizer import decay_mask, ema_update, global_norm, make_optimizer
from m2mkd_jax.train.schedule import learning_rate


def recipe(**changes):
    fields = dict(
        optimizer="adamw",
        lr=1e-2,
        min_lr=1e-4,
        warmup_lr=1e-3,
        epochs=4,
        warmup_epochs=1,
        schedule="clean",
        weight_decay=0.05,
        decay_rule="published",
        momentum=0.9,
        clip=0.0,
        accumulate=1,
    )
    return SimpleNamespace(**{**fields, **changes})


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    "pos_embed": shaped(1, 5, 8),
    "cls_token": shaped(1, 1, 8),
    "norm": {"scale": shaped(8), "bias": shaped(8)},
    "head": {"kernel": shaped(8, 3), "bias": shaped(3)},
    "read_in": {"gain": shaped(), "gamma": shaped(8)},
    "latents": {"codes": shaped(6, 8), "signatures": shaped(6, 4)},
    "grid": shaped(4, 4, 2),
    # Stacked: one more leading axis.
    "blocks": {"norm": {"scale": shaped(3, 8)}, "fc": {"kernel": shaped(3, 8, 8)}},
    "propagators": {"bandwidth": shaped(2), "gain": shaped(2), "gamma": shaped(2, 8)},
    "experts": {"bias": shaped(4, 8), "kernel": shaped(4, 8, 8)},
    # A list of blocks that differ: not stacked.
    "other": {"blocks": {0: {"scale": shaped(8), "gain": shaped(), "kernel": shaped(8, 8)}}},
}
PUBLISHED = {
    "pos_embed": False,
    "cls_token": False,
    "norm": {"scale": False, "bias": False},
    "head": {"kernel": True, "bias": False},
    "read_in": {"gain": True, "gamma": False},
    "latents": {"codes": True, "signatures": True},
    "grid": True,
    "blocks": {"norm": {"scale": False}, "fc": {"kernel": True}},
    "propagators": {"bandwidth": True, "gain": True, "gamma": False},
    "experts": {"bias": False, "kernel": True},
    "other": {"blocks": {0: {"scale": False, "gain": True, "kernel": True}}},
}


def test_decay_rules():
    assert decay_mask(PARAMS, "published") == PUBLISHED
    stage = {**PUBLISHED, "pos_embed": True, "cls_token": True}
    assert decay_mask(PARAMS, "published_stage") == stage
    assert all(jax.tree.leaves(decay_mask(PARAMS, "all")))
    assert not any(jax.tree.leaves(decay_mask(PARAMS, "none")))


def weights_and_gradients(updates=3):
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(3, 4)), "bias": random.normal(size=4)}
    gradients = [
        {k: random.normal(size=v.shape) * 10.0 ** random.integers(-3, 1) for k, v in params.items()}
        for _ in range(updates)
    ]
    return params, gradients


def run(r, params, gradients, steps_per_epoch=2):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    optimizer = make_optimizer(r, steps_per_epoch, params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
        params, state = step(params, state, gradient)
    return params


def torch_clip(gradient, clip):
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    coefficient = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    return {k: g * coefficient for k, g in gradient.items()}


def numpy_adamw(r, params, gradients, steps_per_epoch=2):
    """torch.optim.AdamW in float64: p -= lr * decay * p, then the Adam step at the same lr."""
    rate = learning_rate(r, steps_per_epoch)
    params = {k: v.copy() for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t, gradient in enumerate(gradients, start=1):
        lr = float(rate(t - 1))
        for k, g in torch_clip(gradient, r.clip).items():
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            params[k] *= 1 - lr * (r.weight_decay if k == "kernel" else 0.0)
            corrected = np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8
            params[k] -= lr * (m[k] / (1 - 0.9**t)) / corrected
    return params


@pytest.mark.parametrize("clip", [0.0, 1.0, 0.05])
def test_adamw_is_torchs(clip):
    start, gradients = weights_and_gradients()
    # A large decay, so that leaving it out, or putting it on the bias, would show.
    r = recipe(clip=clip, weight_decay=2.0)
    ours, theirs = run(r, start, gradients), numpy_adamw(r, start, gradients)
    for k in start:
        np.testing.assert_allclose(ours[k] - start[k], theirs[k] - start[k], rtol=1e-4, atol=1e-6)


def test_sgd_is_torchs():
    start, gradients = weights_and_gradients()
    r = recipe(optimizer="sgd", weight_decay=0.1)
    rate = learning_rate(r, 2)
    expected, buffer = {k: v.copy() for k, v in start.items()}, {}
    for t, gradient in enumerate(gradients):
        for k, g in gradient.items():
            g = g + (0.1 * expected[k] if k == "kernel" else 0.0)
            buffer[k] = 0.9 * buffer[k] + g if t else g
            expected[k] = expected[k] - float(rate(t)) * (g + 0.9 * buffer[k])
    ours = run(r, start, gradients)
    for k in start:
        np.testing.assert_allclose(ours[k] - start[k], expected[k] - start[k], rtol=1e-4, atol=1e-6)


def test_accumulation_is_one_update_with_the_mean_gradient():
    start, gradients = weights_and_gradients(updates=4)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *gradients[i : i + 2]) for i in (0, 2)]
    # Clipping must see the mean, and the rate must advance once per update.
    accumulated = run(recipe(accumulate=2, clip=0.5), start, gradients)
    expected = run(recipe(clip=0.5), start, means)
    for k in start:
        np.testing.assert_allclose(accumulated[k], expected[k], rtol=1e-5)
    halfway = run(recipe(accumulate=2), start, gradients[:1])
    np.testing.assert_allclose(halfway["kernel"], start["kernel"], rtol=1e-6)


def test_ema():
    ema = ema_update({"a": jnp.asarray(1.0)}, {"a": jnp.asarray(3.0)}, 0.9)
    np.testing.assert_allclose(ema["a"], 1.2, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"optimizer": "adam"}, "'adam' is unknown"),
        ({"decay_rule": "some"}, "'some' is unknown"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
)
def test_mistakes(changes, says):
    with pytest.raises(UserError, match=says) as error:
        make_optimizer(recipe(**changes), 5, {"kernel": shaped(2, 2)})
    assert "\n" not in str(error.value)


def test_the_global_norm_of_large_and_small_arrays():
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "row": (7,), "matrix": (130, 127), "experts": (4, 5, 6)}
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    squares = sum(np.square(leaf, dtype=np.float64).sum() for leaf in tree.values())
    np.testing.assert_allclose(global_norm(tree), np.sqrt(squares), rtol=1e-6)
    assert global_norm({}) == 0
