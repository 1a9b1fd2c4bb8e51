"""A script that its own worker processes would start again is refused before they start."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = """
from m2mkd_jax.config.defaults import base
from m2mkd_jax.data.pipeline import train_batches
from m2mkd_jax.data.sources import load_source
data = base().data
data.name, data.image_size, data.classes, data.workers = "digits", 8, 10, 2
print("started")
try:
    next(train_batches(load_source(data, "train"), data, batch_size=8, total_steps=1, seed=0))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_script_without_a_guard_is_refused(tmp_path):
    script = tmp_path / "my_script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "started" and len(lines) == 2, done
    assert lines[1].startswith(f"UserError {script} starts its work when it is imported")
    assert 'if __name__ == "__main__"' in lines[1] and not done.stderr
