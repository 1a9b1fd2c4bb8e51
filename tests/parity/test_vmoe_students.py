"""V-MoE students: their distillation (fixture g) and their assembly (fixture d)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.conversion.names import vit_stage_names
from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.losses import classification, distillation
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import vmoe
from m2mkd_jax.phases.program import Program
from tests.random_params import random_params
from tests.support import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    VIT_DEPTHS,
    VIT_SPECS,
    VMOE_DEPTHS,
    VMOE_SPEC,
    VMOE_STITCHED,
    arrays,
    assert_close,
    facts,
    nhwc,
    vit_stage_params,
    vmoe_stage_params,
)
from tests.torch_arrays import arrays_from_torch, arrays_to_torch

CASES = {"0": 0, "1": 1, "last": 3}
MODULES = len(VMOE_DEPTHS)
TEACHER, TEACHER_DEPTHS = VIT_SPECS["a_vit_large"], VIT_DEPTHS["a_vit_large"]


def table(index: int):
    return vmoe_stage_names(
        VMOE_STITCHED,
        sum(VMOE_DEPTHS[:index]),
        VMOE_DEPTHS[index],
        first=index == 0,
        last=index == MODULES - 1,
    )


def student_params(name: str) -> dict:
    params = arrays_from_torch(table(CASES[name]), arrays(f"d_vmoe_student_{name}/weights.npz"))
    return jax.tree.map(jnp.asarray, params)


def distillation_case(name: str):
    """The hybrid chains of fixture g: meta[:i] + [student or teacher i] + meta[i + 1:]."""
    index, io = CASES[name], arrays(f"g_m2mkd/vmoe_{name}.npz")
    meta_depths = (1,) * MODULES
    meta_params = vit_stage_params(TEACHER, arrays("a_vit_large_meta/weights.npz"), meta_depths)
    teacher = arrays_from_torch(
        vit_stage_names(
            TEACHER_DEPTHS[index], first=index == 0, last=index == MODULES - 1, qkv_bias=True
        ),
        arrays(f"a_vit_large/module_{index}.npz"),
    )

    def of_vit(i, depths):
        return chain.abstract(lambda rngs: vit.build(TEACHER, depths, rngs=rngs)[i]).graph

    graphs = {f"meta/{i}": of_vit(i, meta_depths) for i in range(MODULES)}
    graphs["teacher"] = of_vit(index, TEACHER_DEPTHS)
    graphs["student"] = chain.abstract(
        lambda rngs: vmoe.build_stage(VMOE_STITCHED, index, VMOE_DEPTHS, rngs=rngs)
    ).graph
    frozen = {f"meta/{i}": {"params": p, "fixed": {}} for i, p in enumerate(meta_params)}
    frozen |= {"teacher": {"params": teacher, "fixed": {}}, "student": {"fixed": {}}}
    names = [f"meta/{i}" for i in range(MODULES)]
    hybrid = lambda middle: (*names[:index], middle, *names[index + 1 :])
    program = Program(
        graphs,
        hybrid("student"),
        ("student",),
        teacher=hybrid("teacher"),
        kind="soft",
    )
    return program, frozen, {"image": nhwc(io["image"]), "target": jnp.asarray(io["labels"])}, io


@pytest.mark.parametrize("name", CASES)
def test_distillation_loss_and_gradients(name):
    program, frozen, batch, io = distillation_case(name)
    trainable = {"student": student_params(name)}

    @jax.jit
    def grad(trainable, temperature):
        loss = dataclasses.replace(program, temperature=temperature).loss
        return jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch, None)

    for case, prefix in (("soft_tau1", "grad."), ("soft_tau2", "grad_soft_tau2.")):
        (loss, _), grads = grad(trainable, float(case[-1]))
        assert_close(loss, io[f"{case}.loss"], OUTPUT_TOLERANCE, case)
        ours = arrays_to_torch(table(CASES[name]), grads["student"], VMOE_SPEC.vit.patch)
        recorded = facts(f"g_m2mkd/vmoe_{name}.json")[case]
        norms, total = recorded["grad_norms"], recorded["grad_norm_total"]
        assert set(norms) == set(ours)
        # At temperature 2 only the norms of most gradients are recorded.
        given = [key for key in ours if prefix + key in io]
        assert given and (case == "soft_tau2" or len(given) == len(ours))
        for key, value in ours.items():
            if key in given:
                assert_close(value, io[prefix + key], GRADIENT_TOLERANCE, f"{case} {key}")
            norm = float(np.linalg.norm(value.ravel()))
            assert abs(norm - norms[key]) <= GRADIENT_TOLERANCE * max(norms[key], 1e-6 * total), key


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_the_other_losses(name):
    program, frozen, batch, io = distillation_case(name)
    trainable = {"student": student_params(name)}
    student, teacher = jax.jit(
        lambda trainable, x: (
            program.logits(trainable, frozen, x),
            program.run(program.teacher, trainable, frozen, x),
        )
    )(trainable, batch["image"])
    assert_close(student, io["student_outputs"], OUTPUT_TOLERANCE)
    assert_close(teacher, io["teacher_outputs"], OUTPUT_TOLERANCE)
    labels = classification.soft_cross_entropy(student, batch["target"])
    for kind in ("hard", "none"):
        loss = distillation.distill(labels, student, teacher, kind, 0.5)
        assert_close(loss, io[f"{kind}_tau1.loss"], OUTPUT_TOLERANCE, kind)


def test_assembly():
    """Students 0, 1 and last are the original's; the weights of 2 are read off its result."""
    expected = vmoe_stage_params(VMOE_SPEC, arrays("d_vmoe_assembled_plain/weights.npz"))
    students = [student_params("0"), student_params("1"), None, student_params("last")]
    students[2] = jax.tree.map(lambda a: a, students[1])
    blocks = students[2]["segment_0"]["blocks"]
    blocks |= expected[2]["segment_0"]["blocks"]
    fresh = []
    for i in range(MODULES):
        build = functools.partial(vmoe.build_stage, VMOE_SPEC, i, VMOE_DEPTHS)
        shapes = chain.abstract(lambda rngs, build=build: build(rngs=rngs)).params
        fresh.append(random_params(shapes, i))
    result, origin = vmoe.assemble(fresh, students, keep_stitches=False)
    report = facts("d_vmoe_assembled_plain/meta.json")["calls"]
    for i, (ours, theirs, call) in enumerate(zip(result, expected, report, strict=True)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        # What the original found too much are the stitches, and nothing else.
        given = {entry.torch for entry in table(i)}
        assert set(call["given"]) == given and not call["missing"]
        assert {k for k in given if "stitch" in k} == set(call["unexpected"])
    assert origin == {str(i): f"m2mkd/{i}, stitches dropped" for i in range(MODULES)}
