"""Alternates rounds of our step and of the peer's, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from benchmarks import machine

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin take the cores of whoever else works
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as m2mkd sets it, for both sides
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both sides share a GPU
}


class Side:
    """A worker process."""

    def __init__(self, name: str, **options: Any):
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peers.worker"]
        self.process = subprocess.Popen(
            [*command, json.dumps({"side": name, **options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the worker and waits for its answer.

        Raises:
            SystemExit: the worker ended, after it wrote why to stderr.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the side {self.name!r} stopped in {method!r}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def alternate(options: argparse.Namespace) -> dict[str, Any]:
    """Times both sides; `options` are those of benchmarks/speed.py.

    The peer is compared with ours before it is timed, and not timed where it differs.
    """
    os.environ.update(ENVIRONMENT)  # before this process, too, looks at its devices
    about, common = machine.describe(), {"case": options.case}
    on_cpu = jax.default_backend() == "cpu"
    with tempfile.TemporaryDirectory() as directory:
        chosen = {"batch": options.batch, "remat": options.remat, "fused": options.fused}
        # A process of its own: what it traces and compiles would stay in the memory measured.
        exporting = Side("ours", directory=directory, **chosen, **common)
        sides = [exporting]
        try:
            exported = exporting.ask("export")
            exporting.close()
            ours = Side("ours", directory=directory, **chosen, **common)
            sides = [ours]
            choices = {name: getattr(options, name) for name in ("compile", "literal", "timm")}
            peer = Side("peer", directory=directory, cpu=on_cpu, **choices)
            sides.append(peer)
            equal = peer.ask("check")
            facts = exported | ours.ask("prepare") | peer.ask("prepare")
            seconds = timed_rounds(sides, options.steps, options.rounds)
            memory = {side.name: side.ask("memory") for side in sides}
        finally:
            for side in sides:
                side.close()
    result = summary(seconds, memory)
    return {
        **common,
        **facts,
        "remat": options.remat,
        "fused": options.fused,
        "steps": options.steps,
        "peer": choices,
        "differences": equal,
        **result,
        "machine": about,
    }


def timed_rounds(
    sides: list[Side], steps: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall-clock and CPU seconds per step of every round; the sides take turns to begin.

    A step before each is not timed: just after the other side, memory comes slowly from the system
    and the caches are cold, which is neither's in training.
    """
    found: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for side in sides:
        side.ask("reset_memory")
    for i in range(rounds):
        for side in sides if i % 2 == 0 else sides[::-1]:
            side.ask("steps", 1)
            found[side.name].append(tuple(side.ask("steps", steps)))
    return found


def summary(seconds: dict[str, list[tuple[float, float]]], memory: dict[str, dict]) -> dict:
    """Medians, ranges and ratios: their seconds divided by ours."""
    ratios = {
        kind: [b[i] / a[i] for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
        for i, kind in enumerate(("wall", "cpu"))
    }
    medians = {
        name: [statistics.median(values) for values in zip(*rounds, strict=True)]
        for name, rounds in seconds.items()
    }
    return {
        "seconds_per_step": medians["ours"][0],
        "cpu_seconds_per_step": medians["ours"][1],
        "peer_seconds_per_step": medians["peer"][0],
        "peer_cpu_seconds_per_step": medians["peer"][1],
        "rounds": seconds,
        "peer_over_ours": statistics.median(ratios["wall"]),
        "peer_over_ours_range": [min(ratios["wall"]), max(ratios["wall"])],
        "peer_over_ours_cpu": statistics.median(ratios["cpu"]),
        "peer_over_ours_cpu_range": [min(ratios["cpu"]), max(ratios["cpu"])],
        "memory": memory,
        "memory_is": "peak_rss",
        "memory_bytes": memory["ours"]["peak_rss"],
    }


def lines(r: dict[str, Any]) -> list[str]:
    """A result in words."""
    chosen = ", ".join(name for name, on in r["peer"].items() if on) or "eager"
    equal = r["differences"]
    title = f"{r['case']} ({r['job']}, batch {r['batch']}, {r['dtype']}, {r['machine']['device']})"
    text = [
        f"{title}: equal within {equal['logits']:.1e} (logits) and {equal['loss']:.1e} (loss), "
        f"{equal['trained_parameters']:,} trained and {equal['frozen_parameters']:,} frozen "
        "parameters"
    ]
    for side, prefix, note in (("ours", "", "compiled"), ("peer", "peer_", chosen)):
        memory = r["memory"][side]
        device = memory.get("peak_on_device")
        on_device = f", {device / 2**30:.2f} GiB peak on the device" if device else ""
        text.append(
            f"  {side:5}{1e3 * r[f'{prefix}seconds_per_step']:10.1f} ms per step, "
            f"{r['batch'] / r[f'{prefix}seconds_per_step']:,.1f} images/s, "
            f"{_share(r, prefix):.1f}% of the matrix rate, CPU "
            f"{1e3 * r[f'{prefix}cpu_seconds_per_step']:.1f} ms, "
            f"{memory['peak_rss'] / 2**30:.2f} GiB peak RSS{on_device} ({note})"
        )
    for kind, key in (("wall", "peer_over_ours"), ("CPU", "peer_over_ours_cpu")):
        low, high = r[f"{key}_range"]
        text.append(f"  peer / ours, {kind}: {r[key]:.2f} ({low:.2f} to {high:.2f})")
    return text


def _share(r: dict[str, Any], prefix: str) -> float:
    """Percent of the matrix rate, measured by our side before the rounds, at our count of FLOPs."""
    return 100 * r["flops_per_step"] / r[f"{prefix}seconds_per_step"] / r["matrix_rate"]
