"""The dependency lists agree, and the lanes that must not skip cannot."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_requirements_are_those_of_pyproject_with_cuda():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    have = {line for line in lines if line and not line.startswith("#")}
    want = {line for line in project["dependencies"] if not line.startswith("jax>")}
    assert have == want | set(project["optional-dependencies"]["cuda12"])


BODIES = {
    "skip": "import pytest\ndef test_a(): pytest.skip('no reason')",
    "xfail": "import pytest\n@pytest.mark.xfail\ndef test_a(): assert 0",
    "module": "import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass",
    "pass": "def test_a(): pass",
}


@pytest.mark.parametrize(
    ("lane", "body", "options", "code"),
    [
        ("parity", "skip", [], 1),
        ("parity", "skip", ["-n", "2"], 1),
        ("multidevice", "xfail", [], 1),
        ("parity", "module", [], 1),
        ("parity", "pass", [], 0),
        ("unit", "skip", [], 0),
        ("parity", None, [], 5),  # pytest's own: no test collected
    ],
)
def test_no_skip_goes_unnoticed_where_it_is_forbidden(tmp_path, lane, body, options, code):
    folder = tmp_path / "tests" / lane
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    if body:
        (folder / "test_it.py").write_text(BODIES[body])
        # A lane where one test skips and another passes is the case that would look green.
        (folder / "test_other.py").write_text(BODIES["pass"])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-q", f"tests/{lane}", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # imports of seconds
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("FORBIDDEN tests/" in done.stdout) == (code == 1)
