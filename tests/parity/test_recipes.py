"""Every learning rate and every weight decay group of the published phases (i_optim)."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.config.defaults import scaled_lr
from m2mkd_jax.train.optimizer import decay_mask
from m2mkd_jax.train.schedule import learning_rate

FOLDER = Path(__file__).parents[1] / "fixtures/i_optim"
SCHEDULES = json.loads((FOLDER / "lr_schedules.json").read_text())
MAIN = json.loads((FOLDER / "param_groups_main.json").read_text())
NACS = json.loads((FOLDER / "param_groups_nacs.json").read_text())


@pytest.mark.parametrize("phase", SCHEDULES)
def test_every_learning_rate(phase):
    theirs = SCHEDULES[phase]
    recipe = SimpleNamespace(
        lr=theirs["scaled_lr"],
        min_lr=theirs["min_lr"],
        warmup_lr=theirs["warmup_lr"],
        epochs=theirs["epochs"],
        warmup_epochs=theirs["warmup_epochs"],
        schedule="published_nac" if phase.startswith("nacs") else "published",
    )
    steps = 7
    schedule = jax.jit(learning_rate(recipe, steps))
    expected = np.repeat(theirs["lr_used_in_epoch"], steps)
    assert len(expected) == recipe.epochs * steps
    np.testing.assert_allclose(schedule(jnp.arange(len(expected))), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "phase, base", [("PT", 5e-4), ("MT", 5e-4), ("FT", 5e-4), ("nacs_e2e_tinyimnet", 1.2e-3)]
)
def test_scaling_rule(phase, base):
    theirs = SCHEDULES[phase]
    batch = theirs["world"] * theirs["batch_size"] * theirs.get("update_freq", 1)
    np.testing.assert_allclose(scaled_lr(base, batch), theirs["scaled_lr"], rtol=1e-12)


# torch leaf -> ours. A `.weight` is a kernel, unless it belongs to a norm.
LEAVES = {
    "native_weight": "kernel",
    "native_bias": "bias",
    "scale_gain": "gain",
    "codes_": "codes",
    "signatures_": "signatures",
}
NORMS = ("ln", "norm")


def ours(name):
    """Our path and the number of dimensions of a torch parameter, blocks stacked."""
    *path, leaf = name.split(".")
    module = path[-1] if path else ""
    # In the tokenizer the stem is (conv, norm), the later downsamplers are (norm, conv).
    sequence = path[-3:-1]
    if sequence[:1] == ["downsample_layers"]:
        is_norm = (sequence[1] == "0") == (module == "1")
    else:
        is_norm = module in NORMS or module[:-1] in NORMS or module.endswith("layernorm")
    if leaf == "weight":
        leaf = "scale" if is_norm else "kernel"
    leaf = LEAVES.get(leaf, leaf)
    one_dimensional = {"bias": 1, "scale": 1, "gamma": 1, "gain": 0, "bandwidth": 0}
    ndim = {"pos_embed": 3, "cls_token": 3, "grid": 3}.get(leaf, one_dimensional.get(leaf, 2))
    if "experts" in path and leaf == "bias":
        ndim = 2
    # blocks.3.x and propagators.3.x are slices of one stacked leaf blocks.x, propagators.x.
    out = []
    for part in path:
        if part.isdigit() and out and out[-1] in ("blocks", "propagators"):
            ndim += 1
            continue
        out.append(part)
    return (*out, leaf), ndim


def masked(names, rule):
    """rule -> {torch name: decayed}, through a synthetic tree of ours."""
    tree, where = {}, {}
    for name in names:
        path, ndim = ours(name)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jax.ShapeDtypeStruct((2,) * ndim, jnp.float32)
        where[name] = path
    mask = decay_mask(tree, rule)

    def look_up(path):
        node = mask
        for part in path:
            node = node[part]
        return node

    return {name: look_up(path) for name, path in where.items()}


@pytest.mark.parametrize("case", MAIN)
def test_decay_groups(case):
    decay, no_decay = MAIN[case]["decay"], MAIN[case]["no_decay"]
    rule = "published_stage" if case.endswith("MT(stages[0] only)") else "published"
    expected = {**dict.fromkeys(decay, True), **dict.fromkeys(no_decay, False)}
    assert expected
    assert masked(expected, rule) == expected


def test_decay_groups_of_nac_end_to_end():
    (everything,) = NACS["filter_bias_and_bn=False (all configs)"]
    assert masked(everything["names"], "all") == dict.fromkeys(everything["names"], True)
    expected = {
        name: group["weight_decay"] > 0
        for group in NACS["filter_bias_and_bn=True (not used)"]
        for name in group["names"]
    }
    assert masked(expected, "published") == expected
