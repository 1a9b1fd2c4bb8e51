"""Students in a directory: kept as a set, or assembled by the published rules (fixtures d, f)."""

import numpy as np
import pytest

from m2mkd_jax import convert, load
from m2mkd_jax.conversion.assemble_nac import carried_parts
from m2mkd_jax.models.nac.spec import NACSpec
from tests.published_files import ARCH, assert_same_tensors, converted, description, run, tensors
from tests.published_files import load as load_torch
from tests.support import (
    FIXTURES,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    arrays,
    assert_close,
    facts,
)

STUDENTS = FIXTURES / "f_students"
# Of a NAC; what a JSON file says where the original's YAML is not at hand.
NETWORK = {
    "kind": "nac",
    "heads": 3,
    "classes": 10,
    "input_latents": 6,
    "mediator_latents": 10,
    "output_latents": 5,
    "signature_dim": 12,
}


def assert_report(weights, case: str) -> None:
    """Which tensor came from where, and which were left alone, is as recorded."""
    recorded, found = facts("f_students/loading_report.json")[case], description(weights)
    loaded = {name: f"{file}: model.{key}" for name, (file, key) in recorded["loaded"].items()}
    assert found["conversion"]["loaded"] == loaded
    assert set(found["conversion"]["fresh"]) == set(recorded["nac_keys_not_loaded"])


@pytest.mark.parametrize(
    "case, size, student_type",
    [
        ("imagenet_grid7", 56, ""),  # the students' own task: all of them
        ("tinyimnet_grid7", 56, "tinyimnet"),
        ("tinynet_grid4", 32, "tinyimnet"),  # the original stops here
    ],
)
def test_what_is_loaded(case, size, student_type, tmp_path):
    arch = NETWORK | {"image_size": size}
    arch |= {"student_type": student_type} if student_type else {}
    assert_report(converted(STUDENTS, tmp_path / "weights", arch), case)


@pytest.mark.parametrize(
    "word, size, expected",
    [
        ("imagenet", 32, (True, True)),
        ("tinynet", 56, (False, False)),
        ("", 32, (False, False)),
        ("", 56, (True, True)),
    ],
)
def test_the_published_words(word, size, expected):
    """Positional grid and output pooling; see loading_report.json for what each word loads."""
    taught = {"image_size": 56, "classes": 10}
    network = NACSpec(size, 10, 24, 20, 3, 6, 10, 5)
    assert carried_parts(taught, network, word) == expected


def test_a_network_of_another_size_by_the_published_yaml(tmp_path):
    """Without student_type, as in that file; its graph prior is fitted."""
    weights = converted(STUDENTS, tmp_path / "nac", ARCH["nac"])
    assert_report(weights, "tinynet_grid4")
    run(convert, weights, tmp_path / "nac.pth")
    state = load_torch(tmp_path / "nac.pth")["model"]
    recorded = load_torch(FIXTURES / "f_nac_from_students/nac_state_dict.pth")
    assert state.keys() == recorded.keys()
    report = facts("f_students/loading_report.json")["tinynet_grid4"]
    for name in report["loaded"]:
        assert (state[name] == recorded[name]).all(), name
    # Barabasi-Albert with m = 2 on 10 nodes: 16 links, each seen from both ends.
    signatures = state["latent_graphs.0.mediator_latents.signatures_"].numpy()
    unit = signatures / np.linalg.norm(signatures, axis=1, keepdims=True)
    assert ((1 - unit @ unit.T < 0.8).sum() - 10) == 32


def test_the_students_as_a_set(tmp_path):
    weights = converted(STUDENTS, tmp_path / "weights", ARCH["students"])
    recorded = arrays("f_students/MediatorStudent_2_io.npz")
    student = load(weights, module=2)
    outputs = student(recorded["tokens"], {"codes": recorded["codes_1"]})
    assert_close(outputs, recorded["out"], OUTPUT_TOLERANCE)
    stored = student(recorded["tokens"])  # with codes of its own: something else, but finite
    assert np.isfinite(stored).all()
    assert abs(stored - recorded["out"]).max() > GRADIENT_TOLERANCE
    run(convert, weights, tmp_path / "back")
    for file in STUDENTS.glob("*.pth"):
        assert_same_tensors(file, tmp_path / "back" / file.name, ignore=("codes", "states"))
    # Their codes are in the files now: the second time nothing is drawn.
    again = converted(tmp_path / "back", tmp_path / "again", ARCH["students"], "--seed=5")
    assert (load(again, module=2)(recorded["tokens"]) == stored).all()
    assert "drawn" not in str(description(again)["conversion"]["notes"])


@pytest.fixture
def vmoe_students(tmp_path):
    """Four students; the recorded ones have three middle modules of one file."""
    folder = tmp_path / "students"
    for i, name in enumerate(("0", "1", "1", "last")):  # where the published program leaves them
        file = folder / f"m2mKD_vmoe_{i}" / "finished_checkpoint.pth"
        file.parent.mkdir(parents=True)
        file.write_bytes((FIXTURES / f"d_vmoe_student_{name}/finished_checkpoint.pth").read_bytes())
    return folder


def test_vmoe_assembled_with_its_stitches(vmoe_students, tmp_path):
    weights = converted(vmoe_students, tmp_path / "kept", ARCH["vmoe_stitch"])
    x = arrays("d_vmoe_student_0/io.npz")["image"].transpose(0, 2, 3, 1)
    expected = x
    for i, name in enumerate(("0", "1", "1", "last")):
        file = FIXTURES / f"d_vmoe_student_{name}/finished_checkpoint.pth"
        arch = ARCH[f"vmoe_{name}"]
        expected = load(converted(file, tmp_path / f"student_{i}", arch))(expected)
    assert_close(load(weights)(x), expected, OUTPUT_TOLERANCE)
    run(convert, weights, tmp_path / "back")
    for file in vmoe_students.glob("*/*.pth"):
        assert_same_tensors(file, tmp_path / "back" / file.relative_to(vmoe_students))


def test_vmoe_assembled_without_stitches(vmoe_students, tmp_path):
    """As published: the positions are not given again, so the stitches are dropped."""
    weights = converted(vmoe_students, tmp_path / "dropped", ARCH["vmoe"])
    dropped = [
        name
        for name, why in description(weights)["conversion"]["ignored"].items()
        if why == "stitch, dropped"
    ]
    # pre_stitch and post_stitch of three seams: ln and fc, weight and bias, in three containers.
    assert len(dropped) == 2 * 3 * 4 * 3
    run(convert, weights, tmp_path / "back")
    for file in vmoe_students.glob("*/*.pth"):
        before = dict(tensors(load_torch(file)["model"]))
        other = tmp_path / "back" / file.relative_to(vmoe_students)
        after = dict(tensors(load_torch(other)["model"]))
        assert after.keys() == {path for path in before if "_stitch." not in path[0]}
        assert all((before[path] == tensor).all() for path, tensor in after.items())
