"""Weights on a hub on loopback, and back; the model card; refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

import m2mkd_jax
from m2mkd_jax.push import card, main
from m2mkd_jax.push.training_record import TrainingRecord, read_training_record
from tests import hub_server

REPOSITORY = "me/small-vit"
METRICS = {"eval_accuracy": 0.91, "eval_images": 100}


def small_vit() -> m2mkd_jax.Model:
    sizes = {"classes": 3, "image_size": 16, "patch": 8, "width": 16, "heads": 2, "depth": 1}
    return m2mkd_jax.build("vit_large_patch16_224", **sizes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with the weights of e2e, and the network."""
    directory, model = tmp_path_factory.mktemp("run"), small_vit()
    names = {"class_names": ["cat", "dog", "emu"], "job": "e2e", "step": 7, "metrics": METRICS}
    m2mkd_jax.save_weights(
        directory / "jobs/e2e/weights", model.trees, {**model.description, **names}
    )
    data = {"name": "image_folder", "classes": 3, "image_size": 16}
    recipe = {"epochs": 2.0, "batch": 16, "optimizer": "adamw", "lr": 0.001}
    config = {"data": data, "phases": ["e2e", "eval"], "seed": 0, "recipes": {"e2e": recipe}}
    (directory / "config.json").write_text(json.dumps(config))
    result = {"mean": 0.9, "interval95": 0.0123, "values": [0.91, 0.89]}
    (directory / "summary.json").write_text(json.dumps({"results": {"e2e": result, "ft": 1}}))
    return directory, model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that asks for a token, which is given, and an empty cache."""
    with hub_server.running("secret") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)


def test_pushed_weights_give_the_same_logits(run, hub, capsys):
    directory, model = run
    assert main([str(directory), REPOSITORY, "--license=mit"]) == 0
    assert f'm2mkd_jax.load("hf://{REPOSITORY}")' in capsys.readouterr().out
    assert set(hub.files[REPOSITORY]) == {"model.safetensors", "config.json", "README.md"}
    loaded = m2mkd_jax.load(f"hf://{REPOSITORY}")
    np.testing.assert_array_equal(loaded(images()), model(images()))
    assert loaded.class_names == ("cat", "dog", "emu")
    _, metadata, card = hub.files[REPOSITORY]["README.md"].decode().split("---\n", 2)
    known = yaml.safe_load(metadata)
    assert known["license"] == "mit" and known["library_name"] == "m2mkd_jax"
    for said in ("cat, dog, emu", "0.9000", "+- 0.0123", "image_folder", "| e2e | 2.0 | 16 |"):
        assert said in card
    # Again: a commit to the repository that is there.
    assert main([str(directory / "jobs/e2e"), REPOSITORY]) == 0


@pytest.mark.parametrize(
    ("config", "job", "words"),
    [
        ({}, "e2e", "at the end of their training"),
        ({"data": {"validation": 0.0}}, "e2e", "on the test split"),
        ({"data": {"validation": 0.1}}, "e2e", "on held-out validation images"),
        ({"data": {"validation": 0.1}, "teaching_data": {"name": ""}}, "mt/1", "on held-out"),
        ({"data": {"validation": 0.1}, "teaching_data": {"name": "cub"}}, "mt/1", "on the test"),
    ],
)
def test_the_card_says_which_images_a_metric_is_of(config, job, words):
    description = {"kind": "vit", "job": job, "metrics": METRICS}
    record = TrainingRecord(config, {"e2e": 0.5}, "validation images")
    text = "\n".join(card._measured(description, record))
    assert f"| of these weights, {words}" in text
    assert "Accuracies in the run are of validation images.\n\n| accuracy in the run" in text


def test_a_flipped_bit_is_found(run, hub, tmp_path):
    folder = tmp_path / "files"
    assert main([str(run[0]), REPOSITORY, f"--out={folder}"]) == 0
    np.testing.assert_array_equal(m2mkd_jax.load(folder)(images()), run[1](images()))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(m2mkd_jax.UserError, match="is damaged: the checksum"):
        m2mkd_jax.load(folder)
    assert not hub.files


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("summary.json", "[]", "it is not a JSON object"),
        ("summary.json", '{"results": []}', "its results are no object"),
        ("config.json", "3", "it is not a JSON object"),
    ],
)
def test_a_run_whose_records_are_of_another_kind_is_one_line(name, text, words, tmp_path):
    directory = tmp_path / "run"
    (directory / "jobs").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / name).write_text(text)
    with pytest.raises(m2mkd_jax.UserError, match=words):
        read_training_record(directory, {"job": "e2e"})


def test_refusals_are_one_line(run, hub, tmp_path, capsys, monkeypatch):
    directory = str(run[0])

    def refused(*arguments: str, words: str) -> None:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line, line

    refused(directory, "small-vit", words="give OWNER/NAME")
    refused(directory, "me/../x", words="give OWNER/NAME")
    refused(directory, REPOSITORY, "--license=My own", words="--license=My own")
    refused(directory, REPOSITORY, f"--out={tmp_path}", words="is there already")
    refused(directory, REPOSITORY, f"--out={directory}/jobs/hub", words="lies in")
    refused(str(tmp_path / "none"), REPOSITORY, words="does not exist")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused(directory, REPOSITORY, words="log in (hf auth login")
    with pytest.raises(m2mkd_jax.UserError, match="cannot be downloaded"):
        m2mkd_jax.load("hf://me/nothing")
    hub.files["me/other"] = {"config.json": b"{}", "model.safetensors": b"8"}
    with pytest.raises(m2mkd_jax.UserError, match="holds no weights"):
        m2mkd_jax.load("hf://me/other")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    refused(directory, REPOSITORY, words="pip install 'm2mkd_jax[hub]'")
    assert list(hub.files) == ["me/other"] and not list(Path(tmp_path).glob("*push*"))
