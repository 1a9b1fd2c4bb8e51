"""convert and predict as commands, the memory they take, and the program without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.e2e import command as commands
from tests.e2e.command import ROOT, TIMEOUT
from tests.published_files import ARCH, arch_flag, finished_checkpoint
from tests.support import FIXTURES, OUTPUT_TOLERANCE, arrays, assert_close


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return commands.environment(tmp_path_factory)


@pytest.fixture
def python(environment, tmp_path):
    def run(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env={**environment, "PYTHONPATH": str(ROOT)},
        )

    return run


def test_there_predict_and_back(python, tmp_path):
    recorded = arrays("d_vmoe_student_last/io.npz")
    np.savez(tmp_path / "in.npz", images=recorded["tokens"])
    source = FIXTURES / "d_vmoe_student_last/finished_checkpoint.pth"
    flag = arch_flag(ARCH["vmoe_last"], tmp_path)
    done = python("-m", "m2mkd_jax.convert", source, "weights", flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sha256" in done.stdout and "ignored: optimizer state" in done.stdout
    done = python("-m", "m2mkd_jax.predict", "weights", "--npz_in=in.npz", "--npz=out.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert_close(arrays(tmp_path / "out.npz")["logits"], recorded["tokens.out"], OUTPUT_TOLERANCE)
    done = python("-m", "m2mkd_jax.convert", "weights", "back.pth")
    assert (done.returncode, done.stderr) == (0, "")
    state = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    published = torch.load(source, weights_only=True)["model"]
    assert state.keys() == published.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in published.items())
    done = python("-m", "m2mkd_jax.predict", "weights", "missing.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_wrong_input(python, tmp_path):
    (tmp_path / "hostile.pth").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    done = python("-m", "m2mkd_jax.convert", "hostile.pth", "weights")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = python("-m", "m2mkd_jax.convert", "hostile.pth")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pth"]
    assert python("-m", "m2mkd_jax.convert", "--help").returncode == 0


MEASURED = """
import resource, sys
from m2mkd_jax import convert
import jax, torch, orbax.checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
convert.main([sys.argv[1] + "/small.pth", "small", "--arch=arch.json"])
before = peak()
assert convert.main([sys.argv[1] + "/large.pth", "large", "--arch=arch.json"]) == 0
print("grown by", peak() - before)
"""


def test_memory_stays_below_the_weights(python, tmp_path):
    """Stage by stage, and what has been read is dropped: not even once the file's size."""

    def save(name: str, width: int, stages: int) -> int:
        state = {
            "cls_token": (1, 1, width),
            "pos_embed": (1, 5, width),
            "norm.bias": (width,),
            "norm.weight": (width,),
            "patch_embed.proj.weight": (width, 3, 2, 2),
            "patch_embed.proj.bias": (width,),
            "head.weight": (3, width),
            "head.bias": (3,),
        }
        matrices = {
            "attn.qkv": 3 * width,
            "attn.proj": width,
            "mlp.fc1": 4 * width,
            "mlp.fc2": width,
        }
        for i in range(stages):
            for layer in ("norm1", "norm2"):
                state |= {f"blocks.{i}.{layer}.{p}": (width,) for p in ("weight", "bias")}
            for layer, size in matrices.items():
                inputs = 4 * width if layer == "mlp.fc2" else width
                state[f"blocks.{i}.{layer}.weight"] = (size, inputs)
                state[f"blocks.{i}.{layer}.bias"] = (size,)
        ends = {
            n: 0 if n.split(".")[0] in ("cls_token", "pos_embed", "patch_embed") else stages - 1
            for n in state
            if not n.startswith("blocks.")
        }
        for shape_name in list(state):
            stage = ends.get(shape_name)
            if stage is None:
                stage = int(shape_name.split(".")[1])
                inside = f"blocks.0.{shape_name.split('.', 2)[2]}"
            else:
                inside = shape_name
            state[f"stages.{stage}.{inside}"] = state[shape_name]
        tensors = {name: torch.ones(shape) for name, shape in state.items()}
        checkpoint = finished_checkpoint(tensors)
        # An optimizer's moments triple the file and are never read.
        checkpoint["optimizer"] = {"moments": [torch.ones(50, 1000, 1000)]}
        torch.save(checkpoint, tmp_path / name)
        return sum({id(t): t.nbytes for t in checkpoint["model"].values()}.values())

    save("small.pth", 64, 2)
    size = save("large.pth", 1024, 8)
    assert size > 4e8
    (tmp_path / "arch.json").write_text(json.dumps({"kind": "vit", "heads": 4}))
    done = python("-c", MEASURED, tmp_path)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.rsplit("grown by", 1)[1])
    assert grown < 0.6 * size, f"{grown / size:.2f} times the weights"


# What is optional cannot be imported; then whatever the arguments say is run.
WITHOUT = """
import importlib.abc, importlib.util, pkgutil, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "huggingface_hub", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import m2mkd_jax
assert "jax" not in sys.modules  # the package itself is light
"""
IMPORT_ALL = (
    WITHOUT
    + """
# As on Windows: no POSIX modules, signals and errors, once the standard library has what it needs.
import asyncio, errno, multiprocessing, pdb, psutil, signal, subprocess
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
for module, name in ((signal, "SIGUSR1"), (signal, "SIGHUP"), (errno, "EDQUOT")):
    delattr(module, name)
"""
    + """
for module in pkgutil.walk_packages(m2mkd_jax.__path__, "m2mkd_jax."):
    importlib.import_module(module.name)
assert not {"torch", "huggingface_hub", "safetensors"} & sys.modules.keys()
from m2mkd_jax import convert, predict
assert convert.main([sys.argv[1], "weights", "--arch=arch.json"]) == 2
assert convert.main([sys.argv[2], "weights", "--arch=arch.json"]) == 0  # safetensors needs nothing
assert predict.main(["weights", "--npz_in=in.npz"]) == 0
assert convert.main(["weights", "back.pth"]) == 2
assert convert.main(["weights", "back.safetensors"]) == 0
"""
)
TRAIN = (
    WITHOUT
    + """
import runpy
sys.argv = ["main", *sys.argv[1:]]
runpy.run_module("m2mkd_jax.main", run_name="__main__")
"""
)


def test_everything_imports_without_torch(python, tmp_path):
    source = FIXTURES / "a_vit_large_meta/finished_checkpoint.pth"
    state = torch.load(source, weights_only=True)["model"]
    state = {k: v.contiguous() for k, v in state.items() if not k.startswith("stages.")}
    save_file(state, tmp_path / "vit.safetensors")
    np.savez(tmp_path / "in.npz", images=np.zeros((1, 64, 64, 3), np.float32))
    (tmp_path / "arch.json").write_text(json.dumps(ARCH["a_meta"]))
    done = python("-c", IMPORT_ALL, source, tmp_path / "vit.safetensors")
    assert done.returncode == 0, done.stderr
    # jax warns that it has no hard locks either.
    errors = [line for line in done.stderr.splitlines() if line.startswith("m2mkd_jax.")]
    assert len(errors) == 2 and all("pip install 'm2mkd_jax[convert]'" in e for e in errors)


def test_trains_without_torch(python, tmp_path):
    config = ROOT / "tests/e2e/tiny.py"
    done = python(
        "-c",
        TRAIN,
        f"--config={config}",
        f"--workdir={tmp_path / 'run'}",
        "--only=pt",
        "--config.recipes.pt.epochs=1.0",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/jobs/pt/weights/description.json").is_file()
