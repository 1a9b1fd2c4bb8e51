"""A process that dies or hangs ends the other one, which says in one line who it was."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from m2mkd_jax.parallel.watchdog import LOST

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 3


@pytest.mark.parametrize(
    ("victim", "how", "says"),
    [
        (1, "kill", "is dead or cut off: nothing from it for"),
        (0, "kill", "is dead, the last step"),
        (0, "stop", "hangs or is cut off: it has not answered for"),
        (1, "sleep", "hangs: the others have waited for it for"),
    ],
)
def test_a_lost_process_ends_the_other_and_is_named(victim, how, says):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).with_name("watched.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, script, port, str(index), str(victim), how, str(SECONDS)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        _, errors = processes[1 - victim].communicate(timeout=90)
        if how == "kill":
            assert processes[victim].wait(10) == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode == LOST, errors
    if how == "sleep":  # either of the two sees it first
        return
    named = rf"process {victim} \(.*, pid {processes[victim].pid}\) {says}"
    *others, line = errors.splitlines()
    assert re.match(f"m2mkd_jax: {named}", line) and "step 7 of pt" in line, errors
    assert how == "kill" or not others, errors
    assert "Traceback" not in errors
