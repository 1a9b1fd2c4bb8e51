"""`data` knows no jax.Array, nor more of the program than arguments, errors, files and signals."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import m2mkd_jax.data

FOLDER = Path(m2mkd_jax.data.__file__).parent
FORBIDDEN = {"jax", "jaxlib", "flax", "optax", "orbax", "clu", "torch", "tensorflow"}
ALLOWED = {"arguments", "data", "errors", "files", "interruption"}


def imported(path):
    """Every module that a file names, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_data_imports_no_jax(path):
    for name in imported(path):
        first, *rest = name.split(".")
        assert first not in FORBIDDEN, name
        assert first != "m2mkd_jax" or rest[0] in ALLOWED, name


def test_reading_and_augmenting_leave_jax_alone():
    """All but the pipeline: Grain looks for jax itself."""
    modules = "augment, check, few_shot, indices, prepare, preview, sources"
    code = f"import sys; from m2mkd_jax.data import {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0 and not FORBIDDEN & set(loaded.stdout.split()), loaded.stderr
