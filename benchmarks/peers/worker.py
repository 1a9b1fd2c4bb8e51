"""One side of a comparison, in a process of its own: does what it is told, line by line.

    python -m benchmarks.peers.worker '{"side": "ours" or "peer", "directory": DIR, ...}'

A request is a JSON list [method, argument ...] on a line of stdin, the answer a line of stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class OurSide:
    """This package."""

    def __init__(self, options: dict[str, Any]):
        from benchmarks.ours import Ours  # noqa: PLC0415 (the other side loads no jax)

        self.options = options
        self.ours = Ours(options["case"], *(options[k] for k in ("batch", "remat", "fused")))

    def export(self) -> dict:
        """Writes the job for the peer, and counts its FLOPs."""
        from benchmarks.cases import make_config  # noqa: PLC0415 (see above)
        from benchmarks.peers.export import export  # noqa: PLC0415 (see above)

        ours = self.ours
        config = make_config(ours.case, ours.batch, self.options["remat"])
        directory = Path(self.options["directory"])
        export(directory, ours.setup, config, ours.batch, ours.case.predict)
        return {"flops_per_step": ours.count_flops()}

    def prepare(self) -> dict:
        """Compiles, and runs a step."""
        rate = self.ours.matrix_rate()
        self.ours.compile()
        self.ours.steps(1)
        return {
            "compile_seconds": self.ours.compile_seconds,
            "job": self.ours.case.job,
            "batch": self.ours.batch,
            "dtype": str(self.ours.program.dtype),
            "matrix_rate": rate,
        }

    def steps(self, count: int) -> list[float]:
        """Wall-clock and CPU seconds per step."""
        return list(self.ours.steps(count))

    def memory(self) -> dict[str, int]:
        """See benchmarks.ours.Ours.memory."""
        return self.ours.memory()


class PeerSide:
    """PyTorch."""

    def __init__(self, options: dict[str, Any]):
        import torch  # noqa: PLC0415 (the other side loads no torch)

        from benchmarks.peers.job import Job  # noqa: PLC0415 (see above)

        self.torch, self.options = torch, options
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() and not options["cpu"] else "cpu"
        directory = Path(options["directory"])
        self.job = Job(directory, options["literal"], options["timm"], device)

    def check(self) -> dict[str, float]:
        """See Job.check."""
        return self.job.check()

    def prepare(self) -> dict:
        """Compiles if asked for, and runs a step."""
        self.job.prepare(self.options["compile"])
        began = time.perf_counter()
        self.job.steps(1)
        return {"first_step_seconds": time.perf_counter() - began}

    def steps(self, count: int) -> list[float]:
        """Wall-clock and CPU seconds per step."""
        return list(self.job.steps(count))

    def memory(self) -> dict[str, int]:
        """Bytes: 'peak_rss' of the process and, of a GPU, 'peak_on_device'."""
        from benchmarks.memory import peak_rss  # noqa: PLC0415 (see above)

        found = {"peak_rss": peak_rss()}
        if self.job.device.type == "cuda":
            found["peak_on_device"] = self.torch.cuda.max_memory_allocated()
        return found


def reset_memory() -> dict:
    """Counts the peak from now on."""
    from benchmarks.memory import reset_peak_rss  # noqa: PLC0415 (see above)

    reset_peak_rss()
    return {}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    options = json.loads(sys.argv[1])
    side = {"ours": OurSide, "peer": PeerSide}[options["side"]](options)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        call = reset_memory if method == "reset_memory" else getattr(side, method)
        answer = call(*arguments)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
