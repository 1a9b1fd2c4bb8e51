"""Every recorded checkpoint: convert, predict as the original did, and convert back to the bit."""

import numpy as np
import pytest

from m2mkd_jax import convert, load
from tests.published_files import (
    ARCH,
    CASES,
    assert_same_tensors,
    converted,
    predicted,
    run,
)
from tests.support import FIXTURES, OUTPUT_TOLERANCE, arrays, assert_close


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_recorded_checkpoint(case, tmp_path):
    source = FIXTURES / case.file
    weights = converted(source, tmp_path / "weights", ARCH[case.arch])
    back = tmp_path / source.name
    run(convert, weights, back)
    assert_same_tensors(source, back, ignore=("codes", "states"))
    if not case.recorded:
        return
    recorded = arrays(case.recorded)
    x = recorded[case.x]
    inputs = {"images": x.transpose(0, 2, 3, 1) if x.ndim == 4 else x}
    # The published students do not carry their codes and states; one latent, as in the phase.
    inputs |= {key: recorded[f"{key}_1"] for key in ("codes", "states") if f"{key}_1" in recorded}
    np.savez(tmp_path / "in.npz", **inputs)
    predicted(weights, tmp_path)
    outputs = arrays(tmp_path / "out.npz")
    assert_close(outputs["outputs"], recorded[case.y], OUTPUT_TOLERANCE)
    assert ("logits" in outputs) == (recorded[case.y].ndim == 2)
    if "logits" in outputs:
        assert (outputs["logits"] == outputs["outputs"]).all()


def test_teacher_from_its_modules(tmp_path):
    """FT_huge's layout: a directory of modules is one network, and goes back into a directory."""
    source = tmp_path / "modules"
    source.mkdir()
    for i in range(5):
        name = f"rig_vit_huge_{i}.pth"
        (source / name).write_bytes((FIXTURES / "b_vit_huge" / name).read_bytes())
    weights = converted(source, tmp_path / "weights", ARCH["b"])
    recorded = arrays("b_vit_huge/io.npz")
    logits = load(weights)(recorded["image"].transpose(0, 2, 3, 1))
    assert_close(logits, recorded["logits"], OUTPUT_TOLERANCE)
    run(convert, weights, tmp_path / "back")
    for file in source.iterdir():
        assert_same_tensors(file, tmp_path / "back" / file.name)
    assert len(list((tmp_path / "back").iterdir())) == 5


def test_one_module_of_a_network(tmp_path):
    """predict --module=I is what the split module computes."""
    weights = converted(
        FIXTURES / "a_vit_large/finished_checkpoint.pth", tmp_path / "weights", ARCH["a"]
    )
    recorded = arrays("a_vit_large/teacher_modules_io.npz")
    np.savez(tmp_path / "in.npz", tokens=recorded["tokens"])
    predicted(weights, tmp_path, "--module=1")
    outputs = arrays(tmp_path / "out.npz")
    assert_close(outputs["outputs"], recorded["module_1.out"], OUTPUT_TOLERANCE)
