"""Files that claim more than they hold, odd names and places, and fields of --arch that say little.

Damaged and hostile files are in test_damaged_files.py, the usual layouts in test_torch_layouts.py.
"""

import collections
import dataclasses
import datetime
import decimal
import fractions
import io
import json
import os
import sys
import types
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2mkd_jax import convert, predict
from m2mkd_jax.conversion import torch_layouts
from m2mkd_jax.conversion.arch_flag import read_arch
from m2mkd_jax.conversion.from_torch import convert_from_torch
from m2mkd_jax.errors import UserError
from tests.published_files import (
    ARCH,
    TINY,
    arch_flag,
    assert_same_tensors,
    converted,
    load,
    run,
    saved,
    tiny_state,
)
from tests.support import FIXTURES

WHOLE = FIXTURES / "a_vit_large/finished_checkpoint.pth"


def test_a_few_bytes_do_not_fill_the_memory(tmp_path, refused):
    """Strides of 0 claim a gigabyte of positions; lists that hold each other, 10 ** 15 entries."""
    huge = torch.zeros(1).expand(1, 1 + 2**28, 4)
    line = refused(saved(tmp_path, {"model": tiny_state() | {"pos_embed": huge}}))
    assert "more numbers than are stored" in line
    entries: list = [1]
    for _ in range(15):
        entries = [entries] * 10
    assert "without end" in refused(saved(tmp_path, {"model": tiny_state(), "args": entries}))


@pytest.mark.parametrize("kind", ["vit", "vmoe"])
def test_odd_names(kind, tmp_path, refused):
    """Numbers too long to be numbers, stitches outside blocks, control characters, a megabyte."""
    arch, tensor = {"kind": kind, "heads": 1}, torch.zeros(4, 4)
    names = [
        f"blocks.{'9' * 5000}.x",
        f"stages.{'9' * 5000}.blocks.0.x",
        "a\n\x1b[31m\ud800",
        "a" * 10**6,
    ]
    experts = "blocks.0.moe.x"  # makes it a V-MoE
    if kind == "vmoe":
        names += ["a.pre_stitch.b", "blocks.x.post_stitch.fc.weight"]
    for name in names:
        state = tiny_state() | {name: tensor} | ({experts: tensor} if kind == "vmoe" else {})
        line = refused(saved(tmp_path, {"model": state}), arch)
        assert line.rstrip("\n").isprintable() and len(line) < 3000


def test_odd_names_of_what_is_ignored(tmp_path):
    name = "x\n\x1b[31m\ud800" + "y" * 10**5
    source = saved(tmp_path, {"model": tiny_state(), name: 1, "codes": torch.zeros(3)})
    run(convert, source, tmp_path / "weights", arch_flag(TINY, tmp_path))
    text = (tmp_path / "weights/description.json").read_text()
    ignored = json.loads(text)["description"]["conversion"]["ignored"]
    assert set(ignored) == {"codes"}  # the other is a plain value, kept for the way back
    back = tmp_path / "back.pth"
    run(convert, tmp_path / "weights", back)
    assert load(back)[name] == 1


def test_values_of_harmless_types_are_skipped_and_listed(tmp_path):
    """What training programs keep beside weights; none of it is executed."""
    counts = collections.defaultdict(list, {"a": [1]})
    beside = {
        "best_acc": np.float64(3.5),
        "epoch": 7,
        "history": np.arange(5.0),
        "names": np.array(["a", "b"]),
        "flag": np.bool_(True),
        "counts": counts,
        "path": Path("/x/y"),
        "classes": {1, 2},
        "took": datetime.timedelta(3),
        "day": datetime.date(2026, 11, 28),
        "begun": datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC),
        "frozen": frozenset({1}),
        "every": range(3),
        "rate": decimal.Decimal("0.1"),
        "share": fractions.Fraction(1, 3),
        "run": uuid.UUID(int=1),
        "arguments": types.SimpleNamespace(lr=0.1, betas=(0.9, 0.999)),
        "version": torch.__version__,
        "generator": np.random.default_rng(0).bit_generator.state,
    }
    source = saved(tmp_path, {"model": tiny_state(), **beside})
    run(convert, source, tmp_path / "weights", arch_flag(TINY, tmp_path))
    facts = json.loads((tmp_path / "weights/description.json").read_text())["description"]
    assert set(facts["conversion"]["ignored"]) == set(beside) - {"epoch"}


class Node(dict):
    """As yacs's: a dict with attributes beside its items."""

    def __init__(self, *items):
        super().__init__(*items)
        self.__dict__["frozen"] = False


@dataclasses.dataclass
class Options:
    """As omegaconf's: an object that holds others, and itself."""

    kind: object = Any
    content: object = None


def execute(*_):
    """Stands for whatever a file would call."""
    raise AssertionError("executed")


class Hostile:
    """Pickles to a call, and a state."""

    def __reduce__(self):
        return execute, ("called",), {"state": 1}


def in_other_package(monkeypatch, *classes):
    """Moves classes and functions to another package, as long as `monkeypatch` says."""
    module = types.ModuleType("otherpackage.config")
    monkeypatch.setitem(sys.modules, "otherpackage", types.ModuleType("otherpackage"))
    monkeypatch.setitem(sys.modules, "otherpackage.config", module)
    for own in classes:
        monkeypatch.setattr(own, "__module__", module.__name__)
        setattr(module, own.__name__, own)


def test_containers_of_other_packages_are_skipped_and_listed(tmp_path, monkeypatch, refused):
    """None of them is imported or called, and no weights are looked for in them."""
    options = Options(content={"a": Options()})
    options.content["self"] = options
    beside = {
        "config": Node({"MODEL": Node({"DEPTH": 2}), "weight": torch.zeros(3)}),
        "cfg": options,
        "hooks": [Options],
    }
    with monkeypatch.context() as patch:
        in_other_package(patch, Node, Options)
        source = saved(tmp_path, {"model": tiny_state(), **beside})
        alone = tmp_path / "alone.pth"
        torch.save(Node({"model": tiny_state()}), alone)
    run(convert, source, tmp_path / "weights", arch_flag(TINY, tmp_path))
    facts = json.loads((tmp_path / "weights/description.json").read_text())["description"]
    assert set(facts["conversion"]["ignored"]) == set(beside)
    assert "it is a otherpackage.config.Node; only tensors" in refused(alone)


def test_what_other_packages_would_execute_is_not(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_other_package(patch, execute)
        source = saved(tmp_path, {"model": tiny_state(), "config": Hostile()})
    for there in (False, True):  # not even where the package is installed
        with monkeypatch.context() as patch:
            if there:
                in_other_package(patch, execute)
            target = tmp_path / f"weights_{there}"
            run(convert, source, target, arch_flag(TINY, tmp_path))
        facts = json.loads((target / "description.json").read_text())["description"]
        assert set(facts["conversion"]["ignored"]) == {"config"}


def test_the_normalisation_is_told_and_can_be_given(tmp_path, capsys):
    source, flag = saved(tmp_path, {"model": tiny_state()}), arch_flag(TINY, tmp_path)
    given = {"mean": [0.5] * 3, "std": [0.25, 0.5, 0.5]}
    for name, flags, normalisation in (
        ("a", [], {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
        ("b", ["--mean=0.5,0.5,0.5", "--std=0.25,0.5,0.5"], given),
    ):
        assert convert.main([str(source), str(tmp_path / name), flag, *flags]) == 0
        assert (
            f"mean {normalisation['mean']}, std {normalisation['std']}" in capsys.readouterr().out
        )
        facts = json.loads((tmp_path / name / "description.json").read_text())["description"]
        assert facts["normalisation"] == normalisation
    means, stds = ("0.5", "a,b,c", "124,117,104"), ("0,1,1", "1e-60,1,1")
    for wrong in (*(f"--mean={mean}" for mean in means), *(f"--std={std}" for std in stds)):
        assert convert.main([str(source), str(tmp_path / "c"), flag, wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "c").exists()


@pytest.mark.parametrize("copy", ["model", "stages", "model_stages"])
def test_a_tensor_missing_from_one_of_the_copies(copy, tmp_path, refused):
    """A finished checkpoint has every tensor three times; one is not enough."""
    content = load(WHOLE)
    names = {"model": "blocks.3.norm1.bias", "stages": "stages.1.blocks.1.norm1.bias"}
    if copy == "model_stages":
        del content["model_stages"][1]["blocks.1.norm1.bias"]
    else:
        del content["model"][names[copy]]
    line = refused(saved(tmp_path, content), ARCH["a"])
    assert 'tensor "blocks.3.norm1.bias" is missing beside' in line


def test_paths_that_are_no_paths(tmp_path, refused, capfd):
    assert "File name too long" in refused("x" * 5000 + ".pth")
    os.symlink("loop.pth", tmp_path / "loop.pth")
    assert "does not exist" in refused(tmp_path / "loop.pth")
    good = saved(tmp_path, {"model": tiny_state()})
    flag = arch_flag(TINY, tmp_path)
    assert convert.main([str(good), str(tmp_path / ("y" * 300)), flag]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    # Through a link, whether something is behind it or not.
    os.symlink("elsewhere", tmp_path / "link")
    for flags in ([flag], [flag, "--overwrite"]):
        run(convert, good, tmp_path / "link", *flags)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere/description.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk(tmp_path, refused, monkeypatch):
    """Orbax tells it by a ValueError with the text of its writer."""

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes [os_error_code='28']")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)
    line = refused(saved(tmp_path, {"model": tiny_state()}))
    assert line.endswith("weights cannot be written: No space left on device\n")


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "model.", "module.teacher.backbone.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_that_wrappers_give(prefix, tmp_path):
    source = saved(tmp_path, {"model": {prefix + k: v for k, v in tiny_state().items()}})
    run(convert, source, tmp_path / "weights", arch_flag(TINY, tmp_path))
    run(convert, tmp_path / "weights", tmp_path / "back.pth")
    assert_same_tensors(source, tmp_path / "back.pth")


def test_a_block_is_no_wrapper():
    """Every tensor of a student of one block begins with its name."""
    names = ["blocks.0.attn.qkv.weight", "blocks.0.pre_stitch.fc.weight", "blocks.0.norm1.bias"]
    assert torch_layouts._prefix(names) == ""
    assert torch_layouts._prefix([f"module.{name}" for name in names]) == "module."
    assert torch_layouts._prefix([*(f"model.{name}" for name in names), "loss.weight"]) == ""


@pytest.mark.parametrize("key", ["model_state_dict", "teacher"])
def test_the_only_tensors_of_a_file_are_its_weights(key, tmp_path):
    source = saved(tmp_path, {key: tiny_state(), "epoch": 3, "optimizer": {"state": {}}})
    run(convert, source, tmp_path / "weights", arch_flag(TINY, tmp_path))
    run(convert, tmp_path / "weights", tmp_path / "back.pth")
    assert_same_tensors(source, tmp_path / "back.pth")


def test_averaged_weights_where_there_are_no_others(tmp_path):
    source = saved(tmp_path, {"model_ema": tiny_state(), "epoch": 3})
    run(convert, source, tmp_path / "weights", arch_flag(TINY, tmp_path))
    run(convert, tmp_path / "weights", tmp_path / "back.pth")
    assert_same_tensors(source, tmp_path / "back.pth")


def test_fields_of_null_are_not_said(tmp_path):
    (tmp_path / "arch.json").write_text(
        json.dumps(ARCH["a"] | dict.fromkeys(("moe_pos", "idx", "stitch_dim")) | {"experts": 0})
    )
    fields = read_arch(str(tmp_path / "arch.json"), "vit", 6)
    assert fields == ARCH["a"] | {"experts": 0}
    assert convert_from_torch(WHOLE, str(tmp_path / "arch.json")).description["depths"] == [
        2,
        2,
        1,
        1,
    ]
    (tmp_path / "arch.json").write_text('{"kind": "nac", "heads": 3, "truncation": null}')
    assert read_arch(str(tmp_path / "arch.json"), "nac", None)["truncation"] is None
    (tmp_path / "arch.json").write_text('{"head": null}')
    with pytest.raises(UserError, match='did you mean "heads"'):
        read_arch(str(tmp_path / "arch.json"), "nac", None)


@pytest.mark.parametrize(
    "name, idx, own",
    [
        ("0", 0, "vmoe_0"),
        ("1", 1, "vmoe_1"),
        ("1", None, "vmoe_1"),
        ("last", -1, "vmoe_last"),
        ("last", 3, "vmoe_last"),
    ],
)
@pytest.mark.parametrize("network", ["vmoe", "vmoe_stitch"])
def test_a_student_by_the_fields_of_its_network(name, idx, own, network, tmp_path):
    """With stitches kept in the network or not: a student has its own."""
    file = FIXTURES / f"d_vmoe_student_{name}/finished_checkpoint.pth"
    whole = ARCH[network] | ({} if idx is None else {"idx": idx})
    weights = [converted(file, tmp_path / f"{i}", a) for i, a in enumerate((ARCH[own], whole))]
    first, second = (json.loads((w / "description.json").read_text()) for w in weights)
    assert first["trees"] == second["trees"]
    assert {**first["description"], "conversion": 0} == {**second["description"], "conversion": 0}


def test_a_student_that_its_network_does_not_have(tmp_path):
    file = FIXTURES / "d_vmoe_student_1/finished_checkpoint.pth"
    for fields, words in (
        ({"depths": [2, 2, 1], "moe_pos": [0]}, "the weights have 1"),
        ({"moe_pos": [0, 1]}, "--arch says moe_pos"),
        ({"idx": 0}, "idx 0"),
    ):
        flag = arch_flag(ARCH["vmoe"] | {"idx": 1} | fields, tmp_path).removeprefix("--arch=")
        with pytest.raises(UserError, match=words):
            convert_from_torch(file, flag)


def set_at(content: dict, path: tuple, value) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def test_descriptions_that_do_not_fit_their_weights(tmp_path, capfd):
    weights = tmp_path / "weights"
    good = saved(tmp_path, {"model": tiny_state()})
    run(convert, good, weights, arch_flag(TINY, tmp_path))
    file, inputs, out = weights / "description.json", tmp_path / "in.npz", tmp_path / "out.pth"
    np.savez(inputs, images=np.zeros((1, 4, 4, 3), np.float32))
    content = json.loads(file.read_text())
    del content["sha256"]  # as the refusal of an edited file says
    description = json.dumps(content)
    texts = ["", "[]", "3", "null", "[" * 10**5, '{"trees": [1], "description": {}, "format": 1}']
    places = [
        ("trees",),
        ("description",),
        ("trees", "module_0"),
        ("description", "kind"),
        ("description", "spec"),
        ("description", "depths"),
        ("description", "normalisation"),
        ("description", "spec", "heads"),
        ("description", "spec", "patch"),
    ]
    for place in places:
        for value in (None, "x", [], {}, 0, [1, 2], {"a": 1}):
            content = json.loads(description)
            set_at(content, place, value)
            texts.append(json.dumps(content))
    content = json.loads(description)
    files = content["description"]["torch"]["files"]
    files["../x.pth"] = files.pop("")
    outside = json.dumps(content)
    for text in texts:
        file.write_text(text)
        assert predict.main([str(weights), f"--npz_in={inputs}"]) == 2, text
        code = convert.main([str(weights), str(out)])
        error = capfd.readouterr().err
        # The way back does not need the normalisation, nor all of the rest.
        assert error.count("\n") == 1 + (code == 2) and "Traceback" not in error, error
        out.unlink(missing_ok=True)
    file.write_text(outside)
    assert convert.main([str(weights), str(tmp_path / "back")]) == 2
    assert "outside" in capfd.readouterr().err and not (tmp_path / "x.pth").exists()


def test_arrays_and_labels_that_predict_cannot_read(tmp_path, capfd):
    weights, npz = tmp_path / "weights", tmp_path / "in.npz"
    run(convert, saved(tmp_path, {"model": tiny_state()}), weights, arch_flag(TINY, tmp_path))
    np.savez(npz, images=np.zeros((1, 4, 4, 3), np.float32))
    good = npz.read_bytes()
    entry = good.find(b"PK\x01\x02")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000, 4, 3)}\n"
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header)
    for content in (
        b"",
        good[:-30],
        huge.getvalue(),
        good[: entry + 8] + b"\x01" + good[entry + 9 :],  # encrypted
        good[: entry + 10] + b"\x63" + good[entry + 11 :],
    ):
        npz.write_bytes(content)
        assert predict.main([str(weights), f"--npz_in={npz}"]) == 2
        error = capfd.readouterr().err
        assert "cannot be read" in error and error.count("\n") == 1, error
    npz.write_bytes(good)
    labels = tmp_path / "labels.json"
    for text in ("3", '"abc"', "[[], [], []]", "[" * 10**5):
        labels.write_text(text)
        assert predict.main([str(weights), f"--npz_in={npz}", f"--labels={labels}"]) == 2
        error = capfd.readouterr().err
        assert "--labels: " in error and error.count("\n") == 1, error
