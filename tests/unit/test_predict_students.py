"""The predict command with a single NAC student, whose states are dealt over the inputs."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import m2mkd_jax
from m2mkd_jax import predict
from m2mkd_jax.models import chain, registry
from m2mkd_jax.predict import images as predict_images
from tests.published_files import run
from tests.support import arrays
from tests.tiny_nac import SPEC

STATES, COUNT = 5, 12
SIDE = SPEC.image_size


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    description = {
        "kind": "nac_student",
        "spec": dataclasses.asdict(SPEC),
        "modules": 3,
        "stitch_dim": 8,
        "states": STATES,
        "module": 0,
        "normalisation": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    parts = chain.initialise(registry.builder(description, "student_0"), jax.random.key(0))
    folder = tmp_path_factory.mktemp("student") / "weights"
    tree = {"params": parts.params, "fixed": parts.fixed}
    m2mkd_jax.save_weights(folder, {"student_0": tree}, description)
    return folder


def inputs() -> np.ndarray:
    shape = (COUNT, SIDE, SIDE, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
@pytest.mark.parametrize("given", [{}, {"states": 3}])
def test_arrays_give_what_one_call_gives(student, tmp_path, batch, given):
    model = m2mkd_jax.load(student)
    stored = model.trees["student_0"]["fixed"]["states"]
    fixed = {key: np.asarray(stored[:count]) + 1 for key, count in given.items()}
    assert model.period(fixed) == given.get("states", STATES)
    np.savez(tmp_path / "in.npz", images=inputs(), **fixed)
    files = f"--npz_in={tmp_path / 'in.npz'}", f"--npz={tmp_path / 'out.npz'}"
    run(predict, student, *files, f"--batch={batch}")
    expected = np.asarray(model(inputs(), fixed))
    # The states matter: other inputs have others.
    assert np.abs(expected - np.asarray(model(inputs()[1:], fixed))[[0, *range(11)]]).max() > 1e-3
    np.testing.assert_allclose(arrays(tmp_path / "out.npz")["outputs"], expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_files_give_what_one_call_of_the_sound_ones_gives(student, tmp_path, batch, capsys):
    folder, draw = tmp_path / "photos", np.random.default_rng(1)
    folder.mkdir()
    pixels = draw.integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    for i in (2, 7):
        (folder / f"{i:02}.png").write_bytes(b"no image")
    run(predict, student, folder, f"--npz={tmp_path / 'out.npz'}", f"--batch={batch}")
    assert capsys.readouterr().err.count("left out") == 2
    sound = [i for i in range(COUNT) if i not in (2, 7)]
    model = m2mkd_jax.load(student)
    prepared = np.stack([read(folder / f"{i:02}.png", model) for i in sound])
    found = arrays(tmp_path / "out.npz")
    np.testing.assert_allclose(found["outputs"], model(prepared), atol=1e-5)
    assert found["images"].tolist() == [str(folder / f"{i:02}.png") for i in sound]


def read(path, model) -> np.ndarray:
    return predict_images.read_image(str(path), model)[1]


def test_odd_codes_and_states_are_refused(student, tmp_path, capsys):
    fixed = m2mkd_jax.load(student).trees["student_0"]["fixed"]
    codes, states = fixed["codes"].shape, fixed["states"].shape
    for content, words in (
        ({"codes": np.full(codes, "a")}, '"codes" is <U1, not numbers'),
        ({"codes": np.zeros((0, codes[1]), np.float32)}, '"codes" has shape (0, '),
        ({"states": np.zeros((0, *states[1:]), np.float32)}, '"states" has shape (0, '),
        ({"states": np.zeros((2, 0, states[2]), np.float32)}, '"states" has shape (2, 0, '),
        ({"states": np.float32(1)}, '"states" has shape ()'),
    ):
        np.savez(tmp_path / "in.npz", images=inputs()[:2], **content)
        out = tmp_path / "out.npz"
        assert predict.main([str(student), f"--npz_in={tmp_path / 'in.npz'}", f"--npz={out}"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not out.exists()
