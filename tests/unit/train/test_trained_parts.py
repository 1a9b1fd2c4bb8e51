"""Other optimizers, learning rates by layer, and parts of a network that stay as they are."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2mkd_jax.data.indices import balanced_weights
from m2mkd_jax.detection.optimizer import layer_scales as detector_scales
from m2mkd_jax.errors import UserError
from m2mkd_jax.losses.classification import soft_cross_entropy
from m2mkd_jax.train.optimizer import OPTIMIZERS, hidden_matrices, make_optimizer
from m2mkd_jax.train.step import make_step
from m2mkd_jax.train.trained_parts import layer_scales, trained_mask


def recipe(**changes):
    fields = dict(
        optimizer="adamw",
        lr=0.1,
        min_lr=0.1,
        warmup_lr=0.1,
        epochs=4,
        warmup_epochs=0,
        schedule="constant",
        weight_decay=0.05,
        decay_rule="all",
        momentum=0.9,
        clip=0.0,
        accumulate=1,
    )
    return SimpleNamespace(**{**fields, **changes})


def stages(depths=(2, 1)):
    """Stages of blocks of one matrix, with embeddings before and a head after them."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    tree = {
        f"module_{i}": {"blocks": {"fc": {"kernel": draw(depth, 4, 4)}}}
        for i, depth in enumerate(depths)
    }
    tree["module_0"] |= {"pos_embed": draw(1, 3, 4)}
    tree[f"module_{len(depths) - 1}"] |= {"head": {"kernel": draw(4, 2), "bias": draw(2)}}
    return tree


def updated(given, params, updates=1, order=()):
    """The parameters after updates with gradients of one."""
    optimizer = make_optimizer(given, 1, params, order)
    state = optimizer.init(params)
    for _ in range(updates):
        ones = jax.tree.map(jnp.ones_like, params)
        change, state = jax.jit(optimizer.update)(ones, state, params)
        params = jax.tree.map(jnp.add, params, change)
    return params


def test_optimizers_by_name_descend_and_decay():
    params = {"module_0": {"blocks": stages((1,))["module_0"]["blocks"]}}
    kernel = np.asarray(params["module_0"]["blocks"]["fc"]["kernel"])

    @jax.jit  # one program for all
    def changes():
        found = {}
        for name, decay in itertools.product(OPTIMIZERS, (0.0, 0.05)):
            optimizer = make_optimizer(recipe(optimizer=name, weight_decay=decay), 1, params)
            ones = jax.tree.map(jnp.ones_like, params)
            change, _ = optimizer.update(ones, optimizer.init(params), params)
            found[name, decay] = change["module_0"]["blocks"]["fc"]["kernel"]
        return {f"{name} {decay}": value for (name, decay), value in found.items()}

    found = jax.tree.map(np.asarray, changes())
    for name in OPTIMIZERS:
        plain, decayed = found[f"{name} 0.0"], found[f"{name} 0.05"]
        assert plain.sum() < 0, name
        if name in ("adamw", "lion", "adafactor", "muon"):  # decoupled, times the rate
            np.testing.assert_allclose(decayed - plain, -0.1 * 0.05 * kernel, atol=1e-6)
        assert np.abs(decayed - plain).max() > 0, name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_rule_leaves_out_does_not_decay(name):
    params = stages((1,))
    still = jax.tree.map(jnp.zeros_like, params)
    for rule, kept in (("published", ("bias", "scale", "pos_embed", "cls_token")), ("none", ())):
        own = recipe(optimizer=name, weight_decay=0.5, decay_rule=rule)
        optimizer = make_optimizer(own, 1, params)
        change, _ = optimizer.update(still, optimizer.init(params), params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(change):
            if not kept or path[-1].key in kept:
                np.testing.assert_array_equal(leaf, 0, jax.tree_util.keystr(path))


def test_muon_leaves_the_head_to_adamw():
    params = stages((1,))
    plain, muon = (updated(recipe(optimizer=name), params) for name in ("adamw", "muon"))
    for tree in (plain, muon):
        assert (tree["module_0"]["head"]["kernel"] != params["module_0"]["head"]["kernel"]).any()
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(
            muon["module_0"]["head"][name], plain["module_0"]["head"][name]
        )


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_layers_of_a_stack_are_measured_each_by_itself(name):
    """LAMB's trust ratio and Adafactor's root mean squares, against optax on single layers."""
    random = np.random.default_rng(3)
    size = lambda *shape: (1.0 + np.arange(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)
    draw = lambda *shape: jnp.asarray(size(*shape) * random.normal(size=shape), jnp.float32)
    experts = {"experts": {"fc1": {"kernel": draw(2, 3, 4, 5)}}}
    params = {"vmoe_0": {"blocks": {"fc": {"kernel": draw(2, 4, 5)}, "moe": experts}}}
    gradient = jax.tree.map(lambda leaf: draw(*leaf.shape)[::-1], params)
    optimizer = make_optimizer(recipe(optimizer=name), 1, params)
    change, _ = optimizer.update(gradient, optimizer.init(params), params)

    def single(tree):
        leaves = jax.tree.leaves(tree)
        return [layer for leaf in leaves for layer in leaf.reshape(-1, *leaf.shape[-2:])]

    alone = {
        "lamb": optax.lamb(0.1, weight_decay=0.05),
        "adafactor": optax.chain(
            optax.adafactor(None),
            optax.scale(-1.0),
            optax.add_decayed_weights(0.05),
            optax.scale(-0.1),
        ),
    }[name]
    with jax.numpy_dtype_promotion("standard"):
        wanted, _ = alone.update(single(gradient), alone.init(single(params)), single(params))
    for mine, theirs in zip(single(change), wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrices_between_hidden_layers():
    chosen = hidden_matrices(stages())
    assert chosen["module_0"]["blocks"]["fc"]["kernel"] == (-2, -1)
    assert chosen["module_1"]["head"] == {"kernel": None, "bias": None}
    params = stages((1,))
    change = jax.tree.map(
        jnp.subtract, updated(recipe(optimizer="muon", weight_decay=0.0), params), params
    )
    # A gradient of rank one stays of rank one, of 0.2 times the size that AdamW's would have.
    own = np.asarray(change["module_0"]["blocks"]["fc"]["kernel"][0])
    values = np.linalg.svd(own, compute_uv=False)
    assert values[1] < 1e-4 and 0.1 * 0.2 * 2 * 0.6 < values[0] < 0.1 * 0.2 * 2 * 1.3


def test_layer_decay_counts_blocks_through_the_stages():
    params = stages((2, 1))
    scales = layer_scales(params, 0.5, ["module_0", "module_1"])
    assert scales["module_0"]["pos_embed"] == 0.5**4
    found = scales["module_0"]["blocks"]["fc"]["kernel"]
    assert found.shape == (2, 1, 1) and found.ravel().tolist() == [0.5**3, 0.5**2]
    assert scales["module_1"]["blocks"]["fc"]["kernel"].item() == 0.5
    assert scales["module_1"]["head"]["kernel"] == 1.0
    # As many layers as in a detector's backbone of these blocks.
    spec = SimpleNamespace(depth=3, depths=(3,), segments=lambda: [("dense", 3)])
    net = {"net": {"segment_0": {"kernel": jnp.zeros((3, 4, 4))}, "pos_embed": jnp.zeros(1)}}
    detector = detector_scales(net, spec, 0.5)["net"]
    assert detector["segment_0"]["kernel"].ravel().tolist() == [0.5**3, 0.5**2, 0.5]
    assert detector["pos_embed"] == 0.5**4
    # Ten stages and more are in the order in which they run.
    names = [f"module_{i}" for i in range(11)]
    many = layer_scales(stages((1,) * 11), 0.5, names)
    assert many["module_10"]["blocks"]["fc"]["kernel"].item() == 0.5
    plain, slow = (
        updated(recipe(layer_decay=d), params, 2, ["module_0", "module_1"]) for d in (1.0, 0.5)
    )
    moved = lambda tree: np.asarray(tree["module_0"]["pos_embed"] - params["module_0"]["pos_embed"])
    assert np.abs(moved(slow) / moved(plain) - 0.5**4).max() < 0.01


def test_what_is_frozen_neither_moves_nor_counts():
    params = stages()
    given = recipe(freeze=("module_0/*",), clip=1.0, optimizer="sgd", momentum=0.0)
    after = updated(given, params, 2)
    jax.tree.map(np.testing.assert_array_equal, after["module_0"], params["module_0"])
    alone = {"module_1": params["module_1"]}
    expected = updated(recipe(clip=1.0, optimizer="sgd", momentum=0.0), alone, 2)
    jax.tree.map(np.testing.assert_array_equal, {"module_1": after["module_1"]}, expected)

    def loss(trainable, frozen, batch, key):
        value = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(trainable))
        return value, {"loss": value}

    given = recipe(train_only=("*/head/*",), ema=0.0, mixup=0, cutmix=0, smoothing=0.0)
    optimizer = make_optimizer(given, 1, params)
    state = {"step": jnp.zeros((), int), "skipped": jnp.zeros((), int), "fixed": {}}
    state |= {"params": params, "opt_state": optimizer.init(params)}
    data = SimpleNamespace(classes=2)
    step = make_step(loss, optimizer, given, data, seed=0)
    head = jax.tree.map(np.asarray, params["module_1"]["head"])
    _, metrics = step(state, {}, {"label": jnp.zeros(2, int)})
    norm = np.sqrt(sum((4 * np.square(leaf)).sum() for leaf in jax.tree.leaves(head)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": ("module_9/*",)}, "'module_9/\\*' fits no parameter"),
        ({"train_only": ("head",)}, "'head' fits no parameter"),
        ({"freeze": ("*",)}, "nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        trained_mask(stages(), recipe(**fields))


def test_class_weights_multiply_the_targets():
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 3)).astype(np.float32)
    targets = random.dirichlet(np.ones(3), 6).astype(np.float32)
    weights = balanced_weights(np.repeat([0, 1, 2], [6, 2, 1]), 4)
    assert weights == (0.5, 1.5, 3.0, 0.0)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -(np.array(weights[:3]) * targets * np.log(shares)).sum(-1).mean()
    found = soft_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), weights[:3])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
