"""A device without memory left is told in one line that says what to set."""

import platform

import jax
import psutil
import pytest

from m2mkd_jax.main import command as main
from m2mkd_jax.parallel import memory

ALLOCATION = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes.\n"
    "BufferAssignment OOM Debugging.\n  parameter allocation:    3.00GiB"
)
START = (
    "Unable to initialize backend 'cuda': INTERNAL: no supported devices found for platform CUDA: "
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory"
)


@pytest.mark.parametrize(
    ("error", "says", "advice"),
    [
        (jax.errors.JaxRuntimeError(ALLOCATION), "left for 12884901888 bytes;", True),
        (RuntimeError(START), "no memory left at the start;", False),
        (jax.errors.JaxRuntimeError("INTERNAL: cublasCreate: RESOURCE_EXHAUSTED"), "start", False),
    ],
)
def test_what_to_set(monkeypatch, capsys, error, says, advice):
    def run(*_):
        raise error

    monkeypatch.setattr(main, "_run", run)
    monkeypatch.setattr(main, "CONFIG", type("Flag", (), {"value": None}))
    monkeypatch.setattr(main, "WORKDIR", type("Flag", (), {"value": "x"}))
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)  # pytest keeps its own
    assert main.main([]) == main.WRONG_INPUT
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false" in line
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=" in line
    assert ("config.recipes.*.batch" in line) == advice


def test_other_errors_are_none_of_it():
    assert not memory.exhausted(RuntimeError("INTERNAL: Gloo AllGather failed"))
    full = "RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"
    assert not memory.exhausted(ValueError(full))
    assert not memory.exhausted(KeyError("out of memory"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do it themselves")
def test_freed_memory_goes_back_to_the_system():
    size = 64 * 1024  # less than what glibc takes from the system by itself
    blocks = [bytearray(b"x") * size for _ in range(2000)]
    last = blocks.pop()  # keeps the heap from shrinking at its end
    held = psutil.Process().memory_info().rss
    del blocks
    memory.give_back()
    assert psutil.Process().memory_info().rss < held - 1500 * size
    assert len(last) == size
