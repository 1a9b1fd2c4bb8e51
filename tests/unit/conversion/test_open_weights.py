"""Weights on the Hugging Face hub."""

import logging
import sys
import types

import pytest

import m2mkd_jax
from m2mkd_jax import convert
from m2mkd_jax.errors import UserError
from tests.published_files import ARCH, arch_flag, run
from tests.support import FIXTURES

VIT = FIXTURES / "a_vit_large_meta/finished_checkpoint.pth"


def hub(monkeypatch, download=None, snapshot=None) -> list:
    """A stand-in for huggingface_hub; the calls that reach it."""
    calls: list = []

    def recorded(function):
        def call(*arguments, **options):
            calls.append((arguments, options))
            return function(*arguments, **options)

        return call

    fake = types.SimpleNamespace(
        hf_hub_download=recorded(download), snapshot_download=recorded(snapshot)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return calls


def test_files_of_the_hub(monkeypatch, tmp_path):
    calls = hub(monkeypatch, lambda repository, file: str(VIT))
    flag = arch_flag(ARCH["a_meta"], tmp_path)
    run(convert, "hf://owner/repo/pretrained/vit_large.pth", tmp_path / "weights", flag)
    assert calls == [(("owner/repo", "pretrained/vit_large.pth"), {})]


def test_a_folder_of_the_hub(monkeypatch, tmp_path):
    folder = tmp_path / "snapshot" / "FT_huge"
    folder.mkdir(parents=True)
    for i in range(4):
        file = f"rig_vit_large_{i}.pth"
        (folder / file).write_bytes((FIXTURES / "a_vit_large" / file).read_bytes())
    calls = hub(monkeypatch, snapshot=lambda *_, **__: str(tmp_path / "snapshot"))
    model = m2mkd_jax.load("hf://owner/repo/FT_huge", arch=arch_flag(ARCH["a"], tmp_path)[7:])
    assert calls == [(("owner/repo",), {"allow_patterns": ["FT_huge/*"]})]
    assert model.description["depths"] == [2, 2, 1, 1]
    with pytest.raises(UserError, match="no such folder"):
        m2mkd_jax.load("hf://owner/repo/FT_large")


def test_the_hub_fails(monkeypatch, tmp_path, capsys, caplog):
    def gone(*_):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise RuntimeError("404: no such repository\nand a long explanation")

    hub(monkeypatch, gone)
    arguments = ["hf://owner/repo/x.pth", str(tmp_path / "weights")]
    assert convert.main(arguments) == 2
    assert "404: no such repository\n" in capsys.readouterr().err
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert convert.main(arguments) == 2
    assert "pip install 'm2mkd_jax[hub]'" in capsys.readouterr().err
    assert convert.main(["hf://owner", str(tmp_path / "weights")]) == 2
    assert "give hf://OWNER/REPOSITORY" in capsys.readouterr().err
