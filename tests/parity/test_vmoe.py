"""V-MoE against the original (fixtures d): networks, students, assembly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe import vmoe
from tests.support import (
    OUTPUT_TOLERANCE,
    VMOE_DEPTHS,
    VMOE_SPEC,
    VMOE_STITCHED,
    arrays,
    assert_close,
    facts,
    nhwc,
    vmoe_stage_params,
    with_params,
)
from tests.torch_arrays import arrays_from_torch, arrays_to_torch

NETWORKS = {"full": VMOE_SPEC, "assembled_plain": VMOE_SPEC, "full_stitch": VMOE_STITCHED}
STUDENTS = {"student_0": 0, "student_1": 1, "student_last": 3}
MODULES = len(VMOE_DEPTHS)


def one_by_one(params: dict, spec, start: int, depth: int, *, first: bool, last: bool) -> list:
    """A stage as stages of one block each, whose outputs and routers can be looked at."""
    table = functools.partial(vmoe_stage_names, spec)
    flat = arrays_to_torch(table(start, depth, first=first, last=last), params, spec.vit.patch)
    stages = []
    for i in range(depth):
        ends = {"first": first and i == 0, "last": last and i == depth - 1}
        entries = table(start + i, 1, **ends, offset=i)
        build = functools.partial(vmoe.VMoEStage, spec, start + i, 1, **ends)
        stages.append(
            with_params(
                lambda rngs, build=build: build(rngs=rngs),
                arrays_from_torch(entries, {e.torch: flat[e.torch] for e in entries}),
            )
        )
    return stages


def walk(stages, x):
    """Per block: tokens before the head, router logits and decision, as one block computes them."""
    seen = []
    for stage in stages:
        x = stage.embed(x) if stage.first else x
        (block,) = [jax.tree.map(lambda a: a[0], stage.segment_0.blocks)]
        inside = block.pre_stitch(x) if block.kind.pre else x
        inside = inside + block.attn(block.norm1(inside))
        tokens = block.norm2(inside)
        routing, _ = block.moe.router(tokens.reshape(1, -1, tokens.shape[-1]))
        logits = block.moe.router.logits(tokens.reshape(-1, tokens.shape[-1]))
        x, _ = block(x)
        seen.append((x, logits, routing.experts[0], routing.weights[0]))
    return seen


def check_blocks(stages, x, io, prefix):
    for i, (out, logits, experts, weights) in enumerate(jax.jit(lambda x: walk(stages, x))(x)):
        if f"{prefix}block{i}.out" in io:
            assert_close(out, io[f"{prefix}block{i}.out"], OUTPUT_TOLERANCE, f"block {i}")
        gate = f"{prefix}gate{i}." if f"{prefix}gate{i}.logits" in io else f"gate{i}."
        assert_close(logits, io[f"{gate}logits"], OUTPUT_TOLERANCE, f"logits {i}")
        np.testing.assert_array_equal(experts, io[f"{gate}top2_idx"])
        assert_close(weights, io[f"{gate}top2_score"], OUTPUT_TOLERANCE, f"scores {i}")


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    spec = NETWORKS[name]
    io = arrays(f"d_vmoe_{name}/io.npz")
    params = vmoe_stage_params(spec, arrays(f"d_vmoe_{name}/weights.npz"))
    stages = [
        with_params(lambda rngs, i=i: vmoe.build_stage(spec, i, VMOE_DEPTHS, rngs=rngs), p)
        for i, p in enumerate(params)
    ]
    logits, seen = jax.jit(lambda x: chain.run_with_aux(stages, x))(nhwc(io["image"]))
    assert_close(logits, io["image.out"], OUTPUT_TOLERANCE)
    gates = facts(f"d_vmoe_{name}/meta.json")
    gates = gates["gates"] if "gates" in gates else gates["image.gates"]
    counts = np.array([gate["tokens_per_expert"] for gate in gates.values()])
    load = np.concatenate([stage["load"] for stage in seen])
    np.testing.assert_array_equal(np.rint(load * counts.sum(1, keepdims=True)), counts)
    dead = np.concatenate([stage["dead"] for stage in seen])
    np.testing.assert_array_equal(dead, (counts == 0).sum(1))
    singles = [
        single
        for i, p in enumerate(params)
        for single in one_by_one(
            p, spec, sum(VMOE_DEPTHS[:i]), VMOE_DEPTHS[i], first=i == 0, last=i == MODULES - 1
        )
    ]
    check_blocks(singles, nhwc(io["image"]), io, "image.")


def student_params(name: str) -> dict:
    index = STUDENTS[name]
    table = vmoe_stage_names(
        VMOE_STITCHED,
        sum(VMOE_DEPTHS[:index]),
        VMOE_DEPTHS[index],
        first=index == 0,
        last=index == MODULES - 1,
    )
    return arrays_from_torch(table, arrays(f"d_vmoe_{name}/weights.npz"))


@pytest.mark.parametrize("name", STUDENTS)
def test_students(name):
    index, params, io = STUDENTS[name], student_params(name), arrays(f"d_vmoe_{name}/io.npz")
    stage = with_params(
        lambda rngs: vmoe.build_student(
            VMOE_SPEC, index, VMOE_DEPTHS, VMOE_STITCHED.stitch_dim, rngs=rngs
        ),
        params,
    )
    run = jax.jit(stage.__call__)
    inputs = ["image"] if index == 0 else ["tokens", "tokens_small"]
    singles = one_by_one(
        params, VMOE_STITCHED, stage.start, stage.depth, first=stage.first, last=stage.last
    )
    for key in inputs:
        x = nhwc(io[key]) if key == "image" else jnp.asarray(io[key])
        assert_close(run(x), io[f"{key}.out"], OUTPUT_TOLERANCE, key)
        check_blocks(singles, x, io, f"{key}.")


def test_names_go_back():
    weights = arrays("d_vmoe_full_stitch/weights.npz")
    back = {}
    for i, params in enumerate(vmoe_stage_params(VMOE_STITCHED, weights)):
        start = sum(VMOE_DEPTHS[:i])
        table = vmoe_stage_names(
            VMOE_STITCHED, start, VMOE_DEPTHS[i], first=i == 0, last=i == MODULES - 1, offset=start
        )
        back |= arrays_to_torch(table, params, VMOE_SPEC.vit.patch)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(back[key], value, key)
