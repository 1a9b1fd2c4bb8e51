"""Broken and hostile files: one line, exit 2, nothing executed, nothing written."""

import builtins
import dataclasses
import os
import pickle
import pickletools
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m2mkd_jax import convert, predict
from m2mkd_jax.conversion import from_torch, torch_file, torch_layouts
from m2mkd_jax.conversion.arch_flag import read_arch
from m2mkd_jax.conversion.torch_weights import torch_weights_of
from m2mkd_jax.errors import UserError
from tests.published_files import ARCH, TINY, arch_flag, saved, tiny_state
from tests.support import FIXTURES

MUTATIONS = 500


def test_the_good_file_is_good(tmp_path):
    torch.save({"model": tiny_state()}, tmp_path / "good.pth")
    target = str(tmp_path / "weights")
    assert convert.main([str(tmp_path / "good.pth"), target, arch_flag(TINY, tmp_path)]) == 0


def test_mutations(tmp_path, refused):
    """Bytes flipped, overwritten, taken out or put in, anywhere in a good file."""
    file = tmp_path / "good.pth"
    torch.save({"model": tiny_state()}, file)
    good, draw = file.read_bytes(), random.Random(0)
    mutant = tmp_path / "mutant.pth"
    for number in range(MUTATIONS):
        at, length = draw.randrange(len(good)), draw.choice((1, 1, 1, 4, 64, 700))
        noise = draw.randbytes(length)
        changed = (
            good[:at] + bytes([good[at] ^ (1 << draw.randrange(8))]) + good[at + 1 :],
            good[:at] + noise + good[at + length :],
            good[:at] + good[at + length :],
            good[:at] + noise + good[at:],
            good[:at],
        )[number % 5]
        if changed != good:
            mutant.write_bytes(changed)
            refused(mutant)


def test_mutations_of_safetensors(tmp_path, capfd):
    """The format has no checksums: a changed number may pass, but never anything else."""
    save_file(tiny_state(), tmp_path / "good.safetensors")
    good, draw = (tmp_path / "good.safetensors").read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    mutant, flag = tmp_path / "mutant.safetensors", arch_flag(TINY, tmp_path)
    refusals = 0
    for number in range(100):
        at = draw.randrange(header if number % 2 else len(good))
        mutant.write_bytes(good[:at] + draw.randbytes(1) + good[at + 1 :])
        target = tmp_path / f"weights_{number}"
        code = convert.main([str(mutant), str(target), flag])
        error = capfd.readouterr().err
        refusals += code == 2
        assert (code, error) == (0, "") or (code == 2 and error.count("\n") == 1), error
        assert target.exists() == (code == 0)
    assert refusals > 40


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def in_zip(path, content: bytes, like) -> None:
    """`like`, a file of torch.save, with another pickle in it."""
    with zipfile.ZipFile(like) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = content if name.endswith("data.pkl") else source.read(name)
            target.writestr(zipfile.ZipInfo(name), data)


@pytest.mark.parametrize("container", ["bare", "zip", "nested"])
@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "builtins.exec", "open"])
def test_pickles_that_call_functions(function, container, tmp_path, refused):
    marker = tmp_path / "executed"
    call = {
        "os.system": Call(os.system, f"touch {marker}"),
        "builtins.eval": Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
    }[function]
    source = tmp_path / "hostile.pth"
    content = pickle.dumps({"model": {"x": call}} if container == "nested" else call, protocol=2)
    if container == "bare":
        source.write_bytes(content)
    else:
        torch.save({"model": tiny_state()}, tmp_path / "good.pth")
        in_zip(source, content, tmp_path / "good.pth")
    assert "cannot be read safely" in refused(source)
    assert not marker.exists()
    # It is what it claims to be.
    assert "REDUCE" in {opcode.name for opcode, _, _ in pickletools.genops(content)}


def zip_without(name, tmp_path):
    torch.save({"model": tiny_state()}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as source:
        members = {n: source.read(n) for n in source.namelist() if not n.endswith(name)}
    return members


@pytest.mark.parametrize(
    "change",
    ["no pickle", "no storage", "stranger", "escape", "twice", "packed", "other folder", "empty"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_wrong_zip_members(change, tmp_path, refused):
    missing = {"no pickle": "data.pkl", "no storage": "data/3"}.get(change, "\0")
    members = zip_without(missing, tmp_path)
    packing = zipfile.ZIP_DEFLATED if change == "packed" else zipfile.ZIP_STORED
    source = tmp_path / "wrong.pth"
    with zipfile.ZipFile(source, "w", packing) as target:
        for name, data in members.items() if change != "empty" else ():
            target.writestr(name, data)
        strangers = {
            "stranger": "good/code.py",
            "escape": "good/../../evil",
            "twice": "good/data/0",
            "other folder": "bad/data/99",
        }
        if change in strangers:
            target.writestr(strangers[change], b"x")
    refused(source)


def test_zip_files_of_other_programs_are_accepted_whole(tmp_path):
    """Packed again by Python's zipfile: other headers, the same contents."""
    members = zip_without("\0", tmp_path)
    with zipfile.ZipFile(tmp_path / "again.pth", "w") as target:
        for name, data in members.items():
            target.writestr(zipfile.ZipInfo(name), data)
    arguments = [str(tmp_path / "again.pth"), str(tmp_path / "weights"), arch_flag(TINY, tmp_path)]
    assert convert.main(arguments) == 0


def test_the_format_before_zip(tmp_path, refused):
    torch.save({"model": tiny_state()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    good = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(good[: len(good) // 2])
    refused(tmp_path / "cut.pth")
    arguments = [str(tmp_path / "old.pth"), str(tmp_path / "weights"), arch_flag(TINY, tmp_path)]
    assert convert.main(arguments) == 0


def test_wrong_contents(tmp_path, refused):
    state = tiny_state()
    cases = {
        "NaN": state | {"norm.bias": torch.full((4,), float("nan"))},
        "infinite": state | {"head.bias": torch.tensor([1.0, float("inf"), 0.0])},
        '"blocks.0.norm2.bias" is missing': {
            k: v for k, v in state.items() if k != "blocks.0.norm2.bias"
        },
        '"model.blocks.0.extra" has no place': state | {"blocks.0.extra": torch.zeros(4)},
        '"model.module.norm.bias" has no place': state | {"module.norm.bias": state["norm.bias"]},
        "has shape (5,)": state | {"norm.bias": torch.zeros(5)},
        "is float64": state | {"norm.bias": torch.zeros(4, dtype=torch.float64)},
        "is int64": state | {"norm.bias": torch.zeros(4, dtype=torch.int64)},
        "is a list": state | {"norm.bias": [1.0]},
        "are one tensor": state | {f"stages.0.{k}": v + 1 for k, v in state.items()},
        "not a square": state | {"pos_embed": torch.zeros(1, 7, 4)},
        "no vision transformer": {"conv1.weight": torch.zeros(4, 3, 3, 3)},
    }
    for words, content in cases.items():
        assert words in refused(saved(tmp_path, {"model": content})), words
    within = {f"model.{name}": tensor for name, tensor in state.items()}
    other = within | {"loss.weight": torch.zeros(4)}
    assert '; there is "model.cls_token"' in refused(saved(tmp_path, other))
    others = {
        "holds a list": [state],
        "holds a Tensor": torch.zeros(3),
        "no weights": {"optimizer": {}, "epoch": 3},
        "weights twice": {"model": state, "state_dict": state},
        "it has teacher, student": {"teacher": state, "student": state, "epoch": 3},
        "model_stages is no list": {"model": state, "model_stages": {"0": state}},
        "is no state dict": {"model": state, "model_stages": [state, 3]},
        "cannot be read safely": {"model": state, "args": torch.nn.Linear(2, 2)},
        "block_index is None": {"block_state_dict": state},
        "no module 5": {"block_state_dict": state, "block_index": 5, "divided_depths": [1]},
        "divided_depths is 'x'": {"model": state, "divided_depths": "x"},
    }
    for words, content in others.items():
        assert words in refused(saved(tmp_path, content)), words


@pytest.mark.filterwarnings("error")
def test_infinite_positions_are_not_resized(tmp_path, refused):
    content = torch.load(FIXTURES / "a_vit_large/finished_checkpoint.pth", weights_only=True)
    whole = {name: t for name, t in content["model"].items() if not name.startswith("stages.")}
    whole["pos_embed"][0, -1, 0] = float("inf")
    text = refused(saved(tmp_path, whole), arch={"heads": 3, "image_size": 96})
    assert '"pos_embed" has NaN or infinite' in text


@pytest.mark.parametrize("size", [0, 1, 2, 30, 1000])
def test_cut_off(size, tmp_path, refused):
    good = saved(tmp_path, {"model": tiny_state()}).read_bytes()
    (tmp_path / "cut.pth").write_bytes(good[:size])
    text = refused(tmp_path / "cut.pth")
    assert "cut off" in text or "not what torch.save writes" in text
    (tmp_path / "cut.pth").write_bytes(good + b"more")
    assert "damaged or changed" in refused(tmp_path / "cut.pth")


def test_containers_without_end(tmp_path, refused):
    content: dict = {}
    for _ in range(100):
        content = {"model": content}
    assert "without end" in refused(saved(tmp_path, content))


def test_wrong_places(tmp_path, refused):
    (tmp_path / "nothing").mkdir()
    assert "holds no weights" in refused(tmp_path / "nothing")
    assert "does not exist" in refused(tmp_path / "missing.pth")
    (tmp_path / "empty.pth").touch()
    refused(tmp_path / "empty.pth")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors")
    (tmp_path / "notes.txt").write_text("notes")
    assert "end in .pth" in refused(tmp_path / "notes.txt")
    (tmp_path / "directory.pth").mkdir()
    assert "holds no weights" in refused(tmp_path / "directory.pth")


def test_directories_that_do_not_belong_together(tmp_path, refused):
    def copy(name, *files):
        (tmp_path / name).mkdir()
        for i, file in enumerate(files):
            (tmp_path / name / f"{i}_{file.split('/')[-1]}").write_bytes(
                (FIXTURES / file).read_bytes()
            )
        return tmp_path / name

    rigs = [f"a_vit_large/rig_vit_large_{i}.pth" for i in range(4)]
    students = [f"f_students/{n}.pth" for n in ("ReadInStudent", "MediatorStudent_1")]
    arch = ARCH["a"]
    assert "module 2 of" in refused(copy("gap", *rigs[:2], rigs[3]), arch)
    assert "are both module 1" in refused(copy("double", *rigs, rigs[1]), arch)
    assert "mixes networks" in refused(copy("mixed", *rigs, students[0]), arch)
    assert "one first and one last" in refused(copy("no end", *students), ARCH["students"])
    whole = "a_vit_large/finished_checkpoint.pth"
    assert "not a single module" in refused(copy("whole", whole, whole), arch)
    other = copy("other network", *rigs)
    named = torch.load(other / "2_rig_vit_large_2.pth", weights_only=True)
    torch.save(named | {"model_name": "rig_vit_huge"}, other / "2_rig_vit_large_2.pth")
    assert "is of a 'rig_vit_huge', other modules" in refused(other, arch)
    nac = "e_nac/checkpoint_best.pt"
    assert "give one of the files" in refused(copy("nacs", nac, nac), ARCH["nac"])


@pytest.mark.parametrize(
    "form, numbers, missing",
    [
        ("{}Student_{}.pth", (1, 3), "MediatorStudent_2"),
        ("{}Student_{}.pth", (2, 3), "MediatorStudent_1"),
        ("m2mKD_nac_{1}/finished_checkpoint.pth", (1, 2, 4), "m2mKD_nac_3"),
    ],
)
def test_a_student_is_missing(form, numbers, missing, tmp_path, refused):
    """Nothing in the files says which of the middle ones they are."""
    ends = {"ReadIn": 0, "ReadOut": max(numbers) + 1}
    for part, i in ends.items() | {("Mediator", i) for i in numbers}:
        file = tmp_path / "students" / form.format(part, i)
        file.parent.mkdir(parents=True, exist_ok=True)
        source = f"{part}Student_1.pth" if part == "Mediator" else f"{part}Student.pth"
        file.write_bytes((FIXTURES / "f_students" / source).read_bytes())
    for arch in (ARCH["students"], ARCH["nac"]):
        assert f"{missing} is missing" in refused(tmp_path / "students", arch).replace(
            "/finished_checkpoint", ""
        )


def test_seeds(tmp_path, capfd):
    for seed in ("-1", str(2**63), "1e3"):
        file = FIXTURES / "f_students/MediatorStudent_1.pth"
        arguments = [str(file), str(tmp_path / "weights"), f"--arch={ARCH['students']}"]
        assert convert.main([*arguments, f"--seed={seed}"]) == 2
        assert capfd.readouterr().err.count("\n") == 1


def test_another_architecture(refused):
    nac = FIXTURES / "e_nac/checkpoint_best.pt"
    vit = FIXTURES / "a_vit_large/finished_checkpoint.pth"
    moe = FIXTURES / "d_vmoe_full/finished_checkpoint.pth"
    assert "holds a nac; --arch describes a vit" in refused(nac, ARCH["a"])
    assert "holds a vit; --arch describes a nac" in refused(vit, ARCH["nac"])
    assert "holds a vmoe; --arch describes a vit" in refused(moe, ARCH["a"])
    assert "--arch says width 30, the weights have 24" in refused(vit, ARCH["b"])
    biased = ARCH["a"] | {"qkv_bias": False}
    assert "--arch says qkv_bias False, the weights have True" in refused(vit, biased)
    assert "--arch says width" in refused(vit, "vit_large_patch16_224:2,2,1,1")


def test_a_failed_way_back_leaves_nothing(tmp_path, capfd):
    good = saved(tmp_path, {"model": tiny_state()})
    weights = tmp_path / "weights"
    assert convert.main([str(good), str(weights), arch_flag(TINY, tmp_path)]) == 0
    before = sorted(tmp_path.iterdir())
    for target, words in (
        ("back", "must end in"),
        ("weights", "it is read"),
        ("source.pth/x.pth", "cannot be written"),
    ):
        assert convert.main([str(weights), str(tmp_path / target)]) == 2
        assert words in capfd.readouterr().err
    # Damaged weights: the checksum tells.
    file = next(f for f in weights.glob("module_0/d/*") if f.stat().st_size > 500)
    file.write_bytes(file.read_bytes()[:-40])
    np.savez(tmp_path / "in.npz", images=np.zeros((1, 4, 4, 3), np.float32))
    assert convert.main([str(weights), str(tmp_path / "back.pth")]) == 2
    assert "is damaged" in capfd.readouterr().err
    assert predict.main([str(weights), f"--npz_in={tmp_path / 'in.npz'}"]) == 2
    assert "is damaged" in capfd.readouterr().err
    (tmp_path / "in.npz").unlink()
    assert sorted(tmp_path.iterdir()) == before


SHAPES = (None, (), (0,), (3,), (2, 2), (0, 5), (1, 2, 3), (2, 3, 4, 4), (10**6, 10**6))


@pytest.mark.parametrize("with_arch", [True, False])
@pytest.mark.parametrize(
    "file, arch",
    [
        ("a_vit_large_meta/finished_checkpoint.pth", "a_meta"),
        ("a_vit_large/rig_vit_large_1.pth", "a"),
        ("d_vmoe_student_0/finished_checkpoint.pth", "vmoe_0"),
        ("e_nac/checkpoint_best.pt", "nac"),
        ("f_students/ReadInStudent.pth", "students"),
        ("f_students/ReadOutStudent.pth", "students"),
    ],
)
def test_no_shape_of_any_tensor_is_a_bug(file, arch, with_arch, tmp_path):
    """A tensor taken away, or of another shape: said in a line, whichever it is."""
    content = torch_file.read_torch(FIXTURES / file)
    key = "model" if "model" in content else "block_state_dict"
    state = {k: t for k, t in content[key].items() if not k.startswith("stages.")}
    rest = {k: content[k] for k in ("block_index", "divided_depths") if k in content}
    flag = arch_flag(ARCH[arch], tmp_path).removeprefix("--arch=")
    choices = [(name, shape) for name in state for shape in SHAPES if state[name].shape != shape]
    for name, shape in random.Random(0).sample(choices, 60):
        changed = {k: t for k, t in state.items() if k != name}
        if shape is not None:
            changed[name] = dataclasses.replace(state[name], shape=shape, place=(name,))
        with pytest.raises(UserError) as refusal:
            source = torch_weights_of(
                torch_layouts.contents_of({key: changed, **rest}, tmp_path), tmp_path
            )
            given = read_arch(flag, source.kind, None) if with_arch else {}
            from_torch.convert_torch_weights(source, given, tmp_path)
        assert "\n" not in str(refusal.value)
