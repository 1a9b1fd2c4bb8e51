"""V-MoE stages: which blocks have experts, stitches, joining, students, upcycling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import experts, vmoe
from tests.random_params import random_params
from tests.support import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, assert_close, assert_trees_close

VIT = vit.ViTSpec(16, 8, 12, 2, 5)
DEPTHS = (2, 1, 2)
STITCH_DIM = 8
SPEC = vmoe.VMoESpec(VIT, (1, 2, 4), experts=3)
STITCHED = vmoe.student_spec(SPEC, DEPTHS, STITCH_DIM)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 3)), jnp.float32)


def stages_of(spec, depths=DEPTHS, seed: int = 0):
    """Structure and parameters of every stage."""
    graphs, params = [], []
    for i in range(len(depths)):
        build = functools.partial(vmoe.build_stage, spec, i, depths)
        parts = chain.abstract(lambda rngs, build=build: build(rngs=rngs))
        graphs.append(parts.graph)
        params.append(random_params(parts.params, 10 * seed + i))
    return graphs, params


def merged(graphs, params):
    return [chain.merge(g, p, {}) for g, p in zip(graphs, params, strict=True)]


def dense_params(depths=DEPTHS, seed: int = 5) -> list[dict]:
    return [
        random_params(
            chain.abstract(lambda rngs, i=i: vit.build(VIT, depths, rngs=rngs)[i]).params, seed + i
        )
        for i in range(len(depths))
    ]


@functools.cache
def dense_logits(depths):
    stages = [
        chain.merge(
            chain.abstract(lambda rngs, i=i: vit.build(VIT, depths, rngs=rngs)[i]).graph, p, {}
        )
        for i, p in enumerate(dense_params(depths))
    ]
    return jax.jit(lambda x: chain.run(stages, x))(IMAGES)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"router": "switch"}, "no router 'switch'; one of published"),
        ({"dispatch": "drop"}, "no dispatch 'drop'; one of dropless, capacity"),
        ({"top_k": 4}, "4 choices among 3 experts"),
        ({"noise": -1.0}, "vmoe.noise: -1.0 must not be negative"),
        ({"capacity_factor": 0.0}, "capacity_factor: 0.0 must be above 0"),
        ({"pre_stitch_pos": (1,)}, "stitches need the width"),
    ],
)
def test_what_a_spec_refuses(change, message):
    with pytest.raises(UserError, match=message) as error:
        dataclasses.replace(SPEC, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pre, post, stage, block",
    [((1,), (), 0, 1), ((), (0,), 0, 1), ((0,), (), 0, 0), ((2,), (1, 4), 2, 5)],
)
def test_stitches_come_in_pairs(pre, post, stage, block):
    spec = dataclasses.replace(SPEC, stitch_dim=8, pre_stitch_pos=pre, post_stitch_pos=post)
    with pytest.raises(UserError, match=f"before block {block} the width"):
        chain.abstract(lambda rngs: vmoe.build_stage(spec, stage, DEPTHS, rngs=rngs))


@pytest.mark.parametrize(
    "moe_pos, depths, lengths",
    [
        ((), (5,), [5]),
        ((0, 1, 2, 3, 4), (5,), [5]),
        ((1, 3), (5,), [1, 1, 1, 1, 1]),
        ((1, 2, 4), (3, 2), [1, 2, 1, 1]),
    ],
)
def test_any_blocks_can_have_experts(moe_pos, depths, lengths):
    """With the published router an upcycled network is the dense one: its weights sum to one."""
    spec = dataclasses.replace(SPEC, moe_pos=moe_pos)
    graphs, params = stages_of(spec, depths)
    counts = [s["norm1"]["scale"].shape[0] for p in params for s in vmoe.assembly.stacks(p)]
    assert counts == lengths
    dense = dense_params(depths)
    upcycled = vmoe.upcycle(params, dense)
    logits, seen = jax.jit(lambda x: chain.run_with_aux(merged(graphs, upcycled), x))(IMAGES)
    assert_close(logits, dense_logits(depths), OUTPUT_TOLERANCE)
    starts = np.cumsum([0, *depths])
    for i, observed in enumerate(seen):
        layers = [b for b in moe_pos if starts[i] <= b < starts[i + 1]]
        assert {k: v.shape for k, v in observed.items()} == (
            {"load": (len(layers), 3)}
            | {
                k: (len(layers),)
                for k in ("dead", "dropped", "entropy", "importance_loss", "load_loss")
            }
            if layers
            else {}
        )
        assert all(np.allclose(row.sum(), 1.0) for row in observed.get("load", []))


def test_upcycling_copies_and_keeps_routers_fresh():
    _, params = stages_of(SPEC)
    dense = dense_params()
    result = vmoe.upcycle(params, dense)
    blocks = [b for p in result for b in vmoe.assembly.blocks(p)]
    sources = [b for p in dense for b in vmoe.assembly.unstacked(p["blocks"])]
    fresh = [b for p in params for b in vmoe.assembly.blocks(p)]
    for i, (block, source) in enumerate(zip(blocks, sources, strict=True)):
        assert_trees_close(block["attn"], source["attn"], 0.0)
        if i in SPEC.moe_pos:
            for e in range(SPEC.experts):
                own = jax.tree.map(lambda a, e=e: a[e], block["moe"]["experts"])
                assert_trees_close(own, source["mlp"], 0.0)
            assert_trees_close(block["moe"]["router"], fresh[i]["moe"]["router"], 0.0)
        else:
            assert_trees_close(block["mlp"], source["mlp"], 0.0)
    assert_trees_close(result[0]["pos_embed"], dense[0]["pos_embed"], 0.0)
    assert_trees_close(result[-1]["head"], dense[-1]["head"], 0.0)
    with pytest.raises(UserError, match="2 dense stages for 3 stages"):
        vmoe.upcycle(params, dense[:2])
    with pytest.raises(UserError, match="upcycle: stage 1 has 1 blocks, its source has 2"):
        vmoe.upcycle(params, [dense[0], {"blocks": dense[0]["blocks"]}, dense[2]])
    with pytest.raises(UserError, match="stage 0, block 1: post_stitch/linear/bias is absent in"):
        vmoe.upcycle(stages_of(STITCHED)[1], dense)


@pytest.mark.parametrize("count, choices", [(1, 1), (3, 3)])
def test_an_upcycled_network_starts_as_the_dense_one(count, choices):
    """Equal experts whose weights sum to one are one MLP, however many are asked."""
    spec = dataclasses.replace(SPEC, experts=count, top_k=choices)
    graphs, params = stages_of(spec)
    stages = merged(graphs, vmoe.upcycle(params, dense_params()))
    logits = jax.jit(lambda x: chain.run(stages, x))(IMAGES)
    assert_close(logits, dense_logits(DEPTHS), OUTPUT_TOLERANCE)


def test_assembly_with_stitches_is_the_chain_of_the_students():
    students = stages_of(STITCHED, seed=1)[1]
    fresh = stages_of(STITCHED)[1]
    result, origin = vmoe.assemble(fresh, students, keep_stitches=True)
    for ours, theirs in zip(result, students, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert origin == {str(i): f"m2mkd/{i}, stitches kept" for i in range(3)}


def test_assembly_without_stitches():
    graphs, fresh = stages_of(SPEC)
    students = stages_of(STITCHED, seed=1)[1]
    result, origin = vmoe.assemble(fresh, students, keep_stitches=False)
    # As blocks, not as segments: without stitches these are cut otherwise.
    for ours, theirs in zip(result, students, strict=True):
        for block, source in zip(*map(vmoe.assembly.blocks, (ours, theirs)), strict=True):
            assert set(source) - set(block) <= {"pre_stitch", "post_stitch"}
            assert_trees_close(block, {k: source[k] for k in block}, 0.0)
    assert origin["0"] == "m2mkd/0, stitches dropped"
    jax.eval_shape(lambda x: chain.run(merged(graphs, result), x), IMAGES)
    with pytest.raises(UserError, match=r"stage 0, block 1: post_stitch/linear/bias is of shape"):
        vmoe.assemble(fresh, students, keep_stitches=True)
    with pytest.raises(UserError, match="2 students for 3 stages"):
        vmoe.assemble(fresh, students[:2], keep_stitches=False)
    more = stages_of(dataclasses.replace(SPEC, experts=4))[1]
    with pytest.raises(UserError, match=r"block 1: moe/experts/fc1/bias is of shape \(3, 48\)"):
        vmoe.assemble(more, students, keep_stitches=False)


def test_a_head_of_other_classes_starts_fresh():
    other = dataclasses.replace(SPEC, vit=dataclasses.replace(VIT, classes=7))
    fresh = stages_of(other)[1]
    students = stages_of(STITCHED, seed=1)[1]
    result, origin = vmoe.assemble(fresh, students, keep_stitches=False)
    assert_trees_close(result[-1]["head"], fresh[-1]["head"], 0.0)
    assert_trees_close(result[-1]["norm"], students[-1]["norm"], 0.0)
    assert origin["2"] == "m2mkd/2, stitches dropped, head fresh"


def test_students_are_the_stages_of_the_network_cut_open():
    for i in range(3):
        ours = chain.abstract(
            lambda rngs, i=i: vmoe.build_student(SPEC, i, DEPTHS, STITCH_DIM, rngs=rngs)
        ).params
        assert ("patch_embed" in ours, "head" in ours) == (i == 0, i == 2)
        blocks = vmoe.assembly.blocks(jax.tree.map(lambda a: jnp.zeros(a.shape), ours))
        assert ["pre_stitch" in b for b in blocks] == [i > 0] + [False] * (len(blocks) - 1)
        assert ["post_stitch" in b for b in blocks] == [False] * (len(blocks) - 1) + [i < 2]
    with pytest.raises(UserError, match="m2mkd/3: there are 3 modules, 0 to 2"):
        vmoe.build_student(SPEC, 3, DEPTHS, STITCH_DIM, rngs=None)


def joined_and_apart(spec, depths, remat):
    """The chain's function as it is and joined, the latter with activations recomputed."""
    graphs, params = stages_of(spec, depths)
    vit_spec = dataclasses.replace(VIT, remat=remat)
    joined_graphs = stages_of(dataclasses.replace(spec, vit=vit_spec), depths)[0]

    def run(params, join):
        stages = merged(joined_graphs if join else graphs, params)
        if join:
            stages, _ = chain.join(stages, None)
            assert len(stages) == 1
        y, seen = chain.run_with_aux(stages, IMAGES)
        seen = [s for s in seen if s]
        return jnp.square(y).sum(), jax.tree.map(lambda *a: jnp.concatenate(a), *seen)

    return params, run


def test_joined_stages_compute_what_the_chain_does():
    """With activations recomputed too, which changes no value."""
    params, run = joined_and_apart(
        dataclasses.replace(SPEC, moe_pos=(0, 1)), (1, 2), remat="always"
    )
    run = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1)
    (apart, seen), grads = run(params, False)
    (joined, seen_joined), grads_joined = run(params, True)
    assert_close(joined, apart, OUTPUT_TOLERANCE)
    assert_trees_close(seen_joined, seen, OUTPUT_TOLERANCE)
    assert_trees_close(grads_joined, grads, GRADIENT_TOLERANCE)


def test_stages_with_stitches_are_joined_too():
    spec = dataclasses.replace(STITCHED, moe_pos=(0, 1, 2))
    spec = vmoe.student_spec(spec, (1, 1, 1, 1), STITCH_DIM)
    params, run = joined_and_apart(spec, (1, 1, 1, 1), remat="never")
    run = jax.jit(run, static_argnums=1)
    # Blocks 1 and 2, open at both ends, become one segment.
    assert_trees_close(run(params, True), run(params, False), OUTPUT_TOLERANCE)


def test_rates_are_joined_like_the_stages():
    graphs, params = stages_of(SPEC)
    stages, rates = chain.join(merged(graphs, params), [None, (0.2,), None])
    assert [s.depth for s in stages] == [5] and rates == [(0.0, 0.0, 0.2, 0.0, 0.0)]


def test_stages_that_do_not_follow_each_other_stay_apart():
    graphs, params = stages_of(SPEC)
    first, middle, last = merged(graphs, params)
    assert first.join(last) is None and last.join(first) is None and middle.join(first) is None
    assert first.join(merged(*stages_of(STITCHED))[1]) is None
    assert first.join(middle).depth == 3


def test_drop_path_and_noise_act_in_training_alone():
    spec = dataclasses.replace(SPEC, router="vmoe", noise=3.0, moe_pos=(1,))
    graphs, params = stages_of(spec, (2,))
    (stage,) = merged(graphs, params)
    rates = (0.0, 0.5)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(key, dropping, train):
        return stage.with_aux(IMAGES, rates=rates if dropping else None, key=key, train=train)

    key, other = jax.random.key(0), jax.random.key(1)
    quiet, seen = run(key, True, False)
    assert not seen["load_loss"].any()
    noisy, seen = run(key, False, True)
    assert (seen["load_loss"] > 0).all() and not np.allclose(noisy, quiet)
    dropped, _ = run(key, True, True)
    assert not np.allclose(dropped, noisy) and not np.allclose(dropped, run(other, True, True)[0])
    np.testing.assert_array_equal(dropped, run(key, True, True)[0])
    # Without a key, in evaluation: the same function.
    assert_close(jax.jit(stage.__call__)(IMAGES), quiet, OUTPUT_TOLERANCE)


def test_what_is_dropped_leaves_the_tokens_alone():
    """Both branches of a dense block and of one with experts, dropped in all images."""
    graphs, params = stages_of(dataclasses.replace(SPEC, moe_pos=(2,)), (1, 2, 1))
    middle = merged(graphs, params)[1]
    tokens = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 12)), jnp.float32)
    rates = (1.0 - 1e-6,) * 2
    run = jax.jit(lambda x: middle(x, rates=rates, key=jax.random.key(0), train=True))
    np.testing.assert_array_equal(run(tokens), tokens)


def test_only_the_router_stays_in_float32():
    shapes = chain.abstract(lambda rngs: vmoe.build_stage(STITCHED, 0, DEPTHS, rngs=rngs)).params
    cast = jax.eval_shape(lambda p: chain.cast_compute(p, jnp.bfloat16), shapes)
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype == jnp.float32
    }
    router = "segment_1/blocks/moe/router/linear"
    assert kept == {f"{router}/kernel", f"{router}/bias"}
    graphs, params = stages_of(SPEC, (5,))
    out, seen = jax.eval_shape(
        lambda p, x: chain.merge(graphs[0], chain.cast_compute(p, jnp.bfloat16), {}).with_aux(x),
        params[0],
        IMAGES.astype(jnp.bfloat16),
    )
    assert out.dtype == jnp.float32
    assert {a.dtype for a in seen.values()} == {jnp.dtype(jnp.float32)}


def test_capacity_drops_and_says_so():
    spec = dataclasses.replace(
        SPEC, moe_pos=(0,), dispatch="capacity", capacity_factor=0.5, group_images=1
    )
    graphs, params = stages_of(spec, (1,))
    (stage,) = merged(graphs, params)
    run = jax.jit(functools.partial(stage.with_aux, train=True))
    _, seen = run(IMAGES, key=jax.random.key(0))
    # 5 tokens x 2 choices of 3 experts with ceil(0.5 * 10 / 3) = 2 slots: at most 6 of 10 stay.
    assert 0.4 <= float(seen["dropped"][0]) < 1.0
    # In steps of one assignment out of 3 images x 10.
    assert float(seen["dropped"][0]) * 30 == pytest.approx(round(float(seen["dropped"][0]) * 30))
    _, seen = run(IMAGES)  # without a key, in evaluation
    assert not seen["dropped"].any()


def test_experts_start_as_published():
    bound = (6 * 24) ** -0.5
    parts = chain.initialise(lambda rngs: experts.Experts(5, 6, rngs=rngs), jax.random.key(0))
    for name, shape in (("fc1", (5, 6, 24)), ("fc2", (5, 24, 6))):
        kernel = np.asarray(parts.params[name]["kernel"])
        assert kernel.shape == shape and not parts.params[name]["bias"].any()
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        # Uniform: variance bound^2 / 3; 720 draws, standard error 3 % of it.
        assert kernel.var() == pytest.approx(bound**2 / 3, rel=0.15)
