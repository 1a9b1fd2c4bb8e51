"""The notebook is kept without outputs, and its code runs."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CELLS = json.loads((ROOT / "examples/m2mkd_by_hand.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_no_outputs_are_kept():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_a_module_is_distilled_in_under_40_lines():
    (distilled,) = [cell for cell in CODE if "Program(" in cell]
    assert len(distilled.splitlines()) < 40


def test_the_code_runs():
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(CODE)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
