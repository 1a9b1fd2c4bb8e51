"""Runs the command from a process that has imported everything: each run is a fork of it.

Importing takes most of the time of a tiny run, and a run that is killed is to be a process.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """The process that forks; to be used as a context manager.

    Args:
        env: its environment, and that of the runs.
        log: file that gets what a run prints.
    """

    def __init__(self, env: dict, log: Path):
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(log)],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, *arguments: str) -> int:
        """Starts a run; returns the number of its process."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Waits for the run; returns its exit code and what it printed."""
        return int(self._process.stdout.readline()), self.log.read_text()

    def run(self, *arguments: str) -> tuple[int, str]:
        """Starts a run and waits for it."""
        self.start(*arguments)
        return self.wait()


def serve(log: str) -> None:
    """The process that forks: a run for every line of arguments on stdin."""
    # Of which the runs will ask; none of them starts threads.
    sys.path.insert(0, str(ROOT))
    for name in ("sklearn.datasets", "tensorstore", "m2mkd_jax.main.command"):
        importlib.import_module(name)
    prepare: Any = importlib.import_module("m2mkd_jax.files.paths").prepare
    start: Any = importlib.import_module("m2mkd_jax.main").start
    prepare()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = ["m2mkd", *json.loads(line)]
            start()
            sys.exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
