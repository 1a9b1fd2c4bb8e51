"""Experts on eight devices: the same numbers as on one, moved by all-to-alls and nothing else."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import blocks, dispatch, experts, router, vmoe
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from tests.random_params import random_params
from tests.support import OUTPUT_TOLERANCE, assert_trees_close

WIDTH, EXPERTS, IMAGES, TOKENS = 6, 8, 16, 5
VIT = vit.ViTSpec(16, 8, WIDTH, 2, 5)
CASES = {
    "dropless": {},
    "capacity": {"dispatch": "capacity", "capacity_factor": 0.7, "group_images": 2},
    "vmoe": {"router": "vmoe", "dispatch": "capacity", "capacity_factor": 0.7, "group_images": 2},
    "expert_choice": {"router": "expert_choice", "group_images": 1},
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(IMAGES, TOKENS, WIDTH)), jnp.float32)


@functools.cache
def layer(case: str):
    """A layer's parameters, and (params, x) -> loss, output, what was seen, and gradients."""
    spec = blocks.VMoESpec(VIT, (0,), EXPERTS, **CASES[case])
    parts = chain.abstract(lambda rngs: blocks.MoE(spec, rngs=rngs))

    def loss(params, x):
        y, seen = nnx.merge(parts.graph, nnx.State(params))(x, jax.random.key(0))
        return jnp.square(y).sum() + seen["importance_loss"] + seen["load_loss"], (y, seen)

    return random_params(parts.params, 0), jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@functools.cache
def on_one(case: str):
    params, run = layer(case)
    return jax.device_get(jax.jit(run)(params, X))


def compiled(case: str, expert: int):
    """The program on eight devices and its arguments, laid out as in training."""
    params, run = layer(case)
    mesh = make_mesh(expert=expert)
    cut = NamedSharding(mesh, PartitionSpec("expert"))
    params = {
        "router": jax.device_put(params["router"], replicated(mesh)),
        "experts": jax.device_put(params["experts"], cut),
    }
    x = jax.device_put(X, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(params, x).compile(), params, x


def collectives(text: str) -> dict[str, int]:
    kinds = ("all-to-all", "all-gather", "collective-permute", "reduce-scatter", "all-reduce")
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}


@pytest.mark.parametrize(
    "case, expert",
    [
        ("dropless", 1),
        ("dropless", 4),
        ("capacity", 1),
        ("capacity", 2),
        ("capacity", 4),
        ("capacity", 8),
        ("vmoe", 2),
        ("expert_choice", 4),
    ],
)
def test_eight_devices_equal_one(case, expert):
    program, params, x = compiled(case, expert)
    result = jax.device_get(program(params, x))
    assert_trees_close(result, on_one(case), OUTPUT_TOLERANCE)
    _, (_, seen) = on_one(case)[0]
    assert (seen["dropped"] > 0.1) == (case in ("capacity", "vmoe"))
    used = collectives(program.as_text())
    # Slots go to their experts and back, and so do their gradients. No activation is gathered:
    # what else is exchanged are sums, of gradients and of the router's statistics.
    assert used["all-to-all"] == (4 if expert > 1 else 0)
    assert used["all-gather"] == used["collective-permute"] == 0
    assert used["all-reduce"] > 0


def test_rows_in_tiles_on_eight_devices(monkeypatch):
    """As on GPUs, where each device decides by its own rows how its tiles are multiplied."""
    expected = on_one("dropless")
    monkeypatch.setattr(dispatch, "default_method", lambda: "batched")
    program, params, x = compiled("dropless", 1)
    assert_trees_close(jax.device_get(program(params, x)), expected, OUTPUT_TOLERANCE)
    assert " conditional(" in program.as_text()


@pytest.mark.parametrize("router", ["vmoe", "expert_choice"])
def test_evaluation_depends_neither_on_other_images_nor_on_devices(router):
    """7 images: alone, before black padding, among others; on one device and on four."""
    spec = blocks.VMoESpec(
        VIT, (0,), EXPERTS, router=router, dispatch="capacity", capacity_factor=0.75
    )
    parts = chain.abstract(lambda rngs: vmoe.build_stage(spec, 0, (1,), rngs=rngs))
    params = random_params(parts.params, 0)
    images = np.random.default_rng(0).normal(size=(16, 16, 16, 3)).astype(np.float32)
    padded = np.concatenate([images[:7], np.zeros_like(images[:1])])
    run = jax.jit(lambda params, x: chain.merge(parts.graph, params, {})(x))
    alone = run(params, images[:7])
    for batch, expert in ((padded, 1), (images, 4)):
        assert_trees_close(run(params, batch)[:7], alone, OUTPUT_TOLERANCE)
        mesh = make_mesh(devices=jax.devices()[:4], expert=expert)
        placed = jax.device_put(params, partition.shardings(mesh, params, fsdp=False))
        with jax.set_mesh(mesh):
            logits = run(placed, jax.device_put(batch, batch_sharding(mesh)))
        assert_trees_close(np.asarray(logits)[:7], alone, OUTPUT_TOLERANCE)


def test_exchange_by_hand():
    """The same with an explicit lax.all_to_all per device, written out for one layer of experts."""
    mesh = make_mesh(expert=4)
    draw = np.random.default_rng(1)
    x = X.reshape(8, -1, WIDTH)
    logits = jnp.asarray(draw.normal(size=(8, x.shape[1], EXPERTS)), jnp.float32)
    params = random_params(
        chain.abstract(lambda rngs: experts.Experts(EXPERTS, WIDTH, rngs=rngs)).params, 2
    )
    slots = 3

    def by_sharding(x, logits, params):
        return dispatch.capacity(x, router.published(logits, 2), params, experts.mlp, slots)[0]

    def by_hand(x, logits, params):
        """One group per device: x (1, S, D), and params of 2 of the 8 experts."""
        routing = router.published(logits, 2)
        _, slot = dispatch.fill_slots(routing, EXPERTS, slots)
        token = jnp.arange(x.shape[1] * 2) // 2
        rows = jnp.zeros((EXPERTS * slots, WIDTH)).at[slot[0]].set(x[0, token], mode="drop")
        rows = rows.reshape(4, 2, slots, WIDTH)
        # From my rows for all experts to everybody's rows for mine.
        rows = jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0)
        hidden = jnp.einsum("pesd,edf->pesf", rows, params["fc1"]["kernel"])
        hidden += params["fc1"]["bias"][None, :, None]
        hidden = jax.nn.gelu(hidden, approximate=False)
        rows = jnp.einsum("pesf,efd->pesd", hidden, params["fc2"]["kernel"])
        rows += params["fc2"]["bias"][None, :, None]
        rows = jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0)
        rows = rows.reshape(EXPERTS * slots, WIDTH)
        chosen = jnp.take(rows, slot[0], axis=0, mode="fill", fill_value=0)
        return jnp.einsum("skd,sk->sd", chosen.reshape(-1, 2, WIDTH), routing.weights[0])[None]

    at_home = PartitionSpec(("data", "expert"))
    with jax.set_mesh(mesh):
        # jax 0.12 cannot check which axes the error function's parts vary over.
        by_hand = jax.shard_map(
            by_hand,
            in_specs=(at_home, at_home, PartitionSpec("expert")),
            out_specs=at_home,
            check_vma=False,
        )
        results = []
        for way in (by_sharding, by_hand):
            value = lambda *a, way=way: (jnp.square(y := way(*a)).sum(), y)
            run = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))
            arguments = jax.device_put((x, logits), batch_sharding(mesh))
            shared = jax.device_put(params, NamedSharding(mesh, PartitionSpec("expert")))
            results.append(jax.device_get(run(*arguments, shared)))
    assert_trees_close(results[0], results[1], OUTPUT_TOLERANCE)


def test_what_cannot_be_shared_out_is_refused():
    with jax.set_mesh(make_mesh(expert=8)):
        assert dispatch.groups(16, 0) == 8 and dispatch.groups(32, 2) == 16
        for images, size in ((12, 0), (16, 4), (16, 3)):
            with pytest.raises(UserError, match=f"{images} images cannot be cut .* on 8 device"):
                dispatch.groups(images, size)
        rows = jax.ShapeDtypeStruct((8, 12, 2, 4), jnp.float32)
        with pytest.raises(UserError, match=r"12 experts .* expert axis of 8"):
            jax.eval_shape(lambda rows: dispatch.on_experts(rows, {}, None), rows)
