"""NAC students, their distillation and their assembly (fixtures f and g)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.conversion.names import vit_stage_names
from m2mkd_jax.conversion.names_nac import nac_names, nac_student_names
from m2mkd_jax.losses import classification, distillation
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.students import (
    MediatorStudent,
    ReadInStudent,
    ReadOutStudent,
    assemble,
    build_student,
)
from m2mkd_jax.phases.program import Program
from tests.support import (
    GRADIENT_TOLERANCE,
    NAC_SPEC,
    OUTPUT_TOLERANCE,
    STITCH_DIM,
    STUDENT_SPEC,
    VIT_DEPTHS,
    VIT_SPECS,
    arrays,
    assert_close,
    assert_trees_close,
    facts,
    nhwc,
    vit_stage_params,
    with_params,
)
from tests.torch_arrays import arrays_from_torch, arrays_to_torch

FILES = {
    "readin": ["ReadInStudent"],
    "mediator": [f"MediatorStudent_{i}" for i in (1, 2, 3)],
    "readout": ["ReadOutStudent"],
}
KIND = {file: kind for kind, files in FILES.items() for file in files}


def student_params(file: str) -> dict:
    table = nac_student_names(STUDENT_SPEC, KIND[file])
    return arrays_from_torch(table, arrays(f"f_students/{file}.npz"))


def student(file: str, fixed: dict, latents: int = 1, states: int = 1):
    def build(rngs):
        if KIND[file] == "mediator":
            return MediatorStudent(STUDENT_SPEC, STITCH_DIM, rngs=rngs)
        kind = ReadInStudent if KIND[file] == "readin" else ReadOutStudent
        return kind(STUDENT_SPEC, STITCH_DIM, states, latents, rngs=rngs)

    fixed = {name: jnp.asarray(value) for name, value in fixed.items()}
    return with_params(build, student_params(file), fixed)


@pytest.mark.parametrize("latents", [1, 4])
def test_read_in_student(latents):
    io = arrays("f_students/ReadInStudent_io.npz")
    fixed = {"codes": io[f"codes_{latents}"], "states": io[f"states_{latents}"]}
    stage = student("ReadInStudent", fixed, latents, len(io["states_1"]))
    tokens, out = jax.jit(lambda x: (stage.tokenizer(x), stage(x)))(nhwc(io["image"]))
    assert_close(tokens, io["tokens"], OUTPUT_TOLERANCE)
    assert_close(out, io[f"out_{latents}"], OUTPUT_TOLERANCE)


@pytest.mark.parametrize("file", FILES["mediator"])
def test_mediator_student(file):
    io = arrays(f"f_students/{file}_io.npz")
    stage = student(file, {"codes": io["codes_1"]})

    def with_codes(x, codes):
        x = stage.pre_stitch(x)
        return stage.post_stitch(stage.layer(x, codes, x, codes))

    run = jax.jit(lambda x, small, codes: (stage(x), stage(small), with_codes(x, codes)))
    out, small, coded = run(io["tokens"], io["tokens_small"], io["codes_17"])
    assert_close(out, io["out"], OUTPUT_TOLERANCE)
    assert_close(small, io["out_small"], OUTPUT_TOLERANCE)
    assert_close(coded, io["out_codes_17"], OUTPUT_TOLERANCE)


@pytest.mark.parametrize("latents", [1, 5])
@pytest.mark.parametrize("mode", ["zero", "noisy"])
def test_read_out_student(latents, mode):
    io = arrays("f_students/ReadOutStudent_io.npz")
    fixed = {"codes": io[f"codes_{latents}"], "states": io[f"states_{latents}"]}
    stage = student("ReadOutStudent", fixed, latents, len(io["states_1"]))
    codes, states = jnp.asarray(fixed["codes"]), jnp.asarray(fixed["states"])

    @jax.jit
    def run(tokens, sender_codes, gumbel):
        senders = stage.pre_stitch(tokens)
        return stage.pooling(stage.layer(states, codes, senders, sender_codes), gumbel)

    gumbel = io[f"noise.gumbel_{latents}"] if mode == "noisy" else None
    logits = run(io["tokens"], io["codes_1"], gumbel)
    assert_close(logits, io[f"{mode}.out_{latents}"], OUTPUT_TOLERANCE)


CASES = {
    "readin": ("ReadInStudent", 0),
    "mediator": ("MediatorStudent_2", 2),
    "readout": ("ReadOutStudent", 4),
}
# With one latent the pooling's scorer has no gradient; the original has rounding noise there.
NO_GRADIENT = ("['pooling']['confidence']['kernel']", "['pooling']['confidence']['bias']")


def distillation_case(name: str, kind: str, temperature: float):
    """The hybrid chains of fixture g: meta[:i] + [student or teacher i] + meta[i + 1:]."""
    spec, depths = VIT_SPECS["b_vit_huge"], VIT_DEPTHS["b_vit_huge"]
    io, (_, index) = arrays(f"g_m2mkd/nac_{name}.npz"), CASES[name]
    meta_depths = (1,) * len(depths)
    meta_params = vit_stage_params(spec, arrays("b_vit_huge_meta/weights.npz"), meta_depths)
    teacher = chain.abstract(lambda rngs: vit.build(spec, depths, rngs=rngs)[index])
    last = index == len(depths) - 1
    table = vit_stage_names(depths[index], first=index == 0, last=last, qkv_bias=False)
    teacher_params = arrays_from_torch(table, arrays(f"b_vit_huge/module_{index}.npz"))
    states = len(io["states"]) if "states" in io else 1
    student = chain.abstract(
        lambda rngs: build_student(STUDENT_SPEC, index, len(depths), STITCH_DIM, states, rngs=rngs)
    )
    fixed = {k: jnp.asarray(io[k]) for k in student.fixed}
    frozen = {f"meta/{i}": {"params": p, "fixed": {}} for i, p in enumerate(meta_params)}
    frozen |= {"teacher": {"params": teacher_params, "fixed": {}}, "student": {"fixed": fixed}}
    graphs = {
        f"meta/{i}": chain.abstract(
            lambda rngs, i=i: vit.build(spec, meta_depths, rngs=rngs)[i]
        ).graph
        for i in range(len(depths))
    }
    graphs |= {"teacher": teacher.graph, "student": student.graph}
    names = [f"meta/{i}" for i in range(len(depths))]
    hybrid = lambda middle: (*names[:index], middle, *names[index + 1 :])
    program = Program(
        graphs,
        hybrid("student"),
        ("student",),
        teacher=hybrid("teacher"),
        kind=kind,
        temperature=temperature,
    )
    batch = {"image": nhwc(io["image"]), "target": jnp.asarray(io["labels"])}
    return program, frozen, batch, io


def trained_student(name: str) -> dict:
    """The fixture's student weights: those of fixture f."""
    return jax.tree.map(jnp.asarray, student_params(CASES[name][0]))


@pytest.mark.parametrize("name", CASES)
def test_outputs(name):
    program, frozen, batch, io = distillation_case(name, "soft", 1.0)
    assert program.shared == (0 if name == "readin" else CASES[name][1])
    prefix = program.student[: CASES[name][1]]

    @jax.jit
    def run(trainable, x):
        logits = program.logits(trainable, frozen, x)
        taught = program.run(program.teacher, trainable, frozen, x)
        return logits, taught, program.run(prefix, trainable, frozen, x)

    logits, taught, tokens = run({"student": trained_student(name)}, batch["image"])
    assert_close(logits, io["student_outputs"], OUTPUT_TOLERANCE)
    assert_close(taught, io["teacher_outputs"], OUTPUT_TOLERANCE)
    assert ("meta_output" in io) == (len(prefix) > 0)
    if prefix:  # what the student is given: the meta prefix's tokens
        assert_close(tokens, io["meta_output"], OUTPUT_TOLERANCE)
    labels = classification.soft_cross_entropy(logits, batch["target"])
    for kind in ("hard", "none"):
        loss = distillation.distill(labels, logits, taught, kind, 0.5)
        assert_close(loss, io[f"{kind}_tau1.loss"], OUTPUT_TOLERANCE, kind)


# What hard labels and no teacher give the logits' gradient is no matter of the student.
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "soft") for name in CASES), ("readout", "hard"), ("readout", "none")],
)
def test_distillation_loss_and_gradients(name, kind):
    program, frozen, batch, io = distillation_case(name, kind, 1.0)
    recorded = facts(f"g_m2mkd/nac_{name}.json")

    @jax.jit
    def grad(trainable, temperature):
        loss = dataclasses.replace(program, temperature=temperature).loss
        return jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch, None)

    # Gradients are recorded of the soft loss, of the others their norms alone.
    given = {"soft_tau1": "grad.", "soft_tau2": "grad_soft_tau2."}
    for case in [case for case in recorded if case.startswith(f"{kind}_tau")]:
        (loss, _), grads = grad({"student": trained_student(name)}, float(case[-1]))
        assert_close(loss, io[f"{case}.loss"], OUTPUT_TOLERANCE, case)
        kind_name = KIND[CASES[name][0]]
        ours = arrays_to_torch(nac_student_names(STUDENT_SPEC, kind_name), grads["student"])
        norms, total = recorded[case]["grad_norms"], recorded[case]["grad_norm_total"]
        assert set(norms) == set(ours)
        for key, value in ours.items():
            if "confidence_scorer" in key:
                assert abs(value).max() <= 1e-6  # closed form: one latent, no gradient
                continue
            if case in given and given[case] + key in io:
                assert_close(value, io[given[case] + key], GRADIENT_TOLERANCE, f"{case} {key}")
            norm = float(np.linalg.norm(value.ravel()))
            # A gain's gradient is a sum of terms of either sign, which rounds as the largest of
            # them: on processors without AVX-512 by 1.6e-9 of the whole gradient.
            assert abs(norm - norms[key]) <= max(GRADIENT_TOLERANCE * norms[key], 3e-9 * total), key


def test_assembly():
    """The published 'tinynet' rule: grid and pooling start fresh."""
    expected = arrays_from_torch(nac_names(NAC_SPEC), arrays("f_nac_from_students/weights.npz"))
    fresh = chain.initialise(lambda rngs: NAC(NAC_SPEC, rngs=rngs), jax.random.key(0)).params
    files = [file for files in FILES.values() for file in files]
    result, origin = assemble(fresh, [student_params(f) for f in files], carry_pooling=False)
    report = facts("f_students/loading_report.json")["tinynet_grid7"]
    table = nac_names(NAC_SPEC)
    flat = arrays_to_torch(table, result)
    wanted, start = arrays_to_torch(table, expected), arrays_to_torch(table, fresh)
    loaded, skipped = set(report["loaded"]), set(report["nac_keys_not_loaded"])
    assert loaded | skipped == set(flat)
    for key, value in flat.items():
        reference = wanted if key in loaded else start
        assert (value == reference[key]).all(), key
    assert origin["pooling"] == "fresh" and origin["seeder"] == "fresh"
    assert origin["tokenizer"] == "m2mkd/0, positional grid fresh"
    # The original's own result, with its own fresh parts, gives its recorded outputs.
    io = arrays("f_nac_from_students/io.npz")
    network = with_params(lambda rngs: NAC(NAC_SPEC, rngs=rngs), expected)
    logits = jax.jit(network.__call__)(nhwc(io["raw_inputs"]))
    assert_close(logits, io["zero.outputs"], OUTPUT_TOLERANCE)
    states = jax.jit(lambda x: network.forward(x, {}))(nhwc(io["raw_inputs"]))
    assert_close(states["tokens"], io["zero.tokenized_inputs"], OUTPUT_TOLERANCE)
    assert_close(states["input"], io["zero.read_in"], OUTPUT_TOLERANCE)
    for group in ("input", "mediator", "output"):
        assert_close(states[group], io[f"zero.{group}_states"], OUTPUT_TOLERANCE, group)


def test_assembly_keeps_grid_and_pooling_where_they_fit():
    files = [file for files in FILES.values() for file in files]
    students = [student_params(f) for f in files]
    fresh = chain.initialise(lambda rngs: NAC(STUDENT_SPEC, rngs=rngs), jax.random.key(0)).params
    result, origin = assemble(fresh, students)
    report = facts("f_students/loading_report.json")["imagenet_grid7"]
    table = nac_names(STUDENT_SPEC)
    flat, start = arrays_to_torch(table, result), arrays_to_torch(table, fresh)
    kept = {k for k, v in flat.items() if v.shape == start[k].shape and (v == start[k]).all()}
    # A learned value may equal a fresh one by chance only where both are constants of the init.
    assert set(report["nac_keys_not_loaded"]) <= kept
    assert not kept & set(report["loaded"])
    assert_trees_close(result["pooling"], students[-1]["pooling"], 0.0)
    assert origin["pooling"] == "m2mkd/4"
