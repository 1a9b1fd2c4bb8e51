"""What a training step or an evaluation costs on this device: seconds, matrix rate, memory.

    python -m benchmarks.speed CASE [--batch=N] [--steps=20] [--rounds=5] [--remat=always]
                                    [--json=NAME] [--peer [--compile] [--literal] [--timm]]

A case (benchmarks/cases.py) is a job of one of the configs at a batch that one device holds
(--batch: another one), in the precision that the config gives the device. Random images lie on the
device already: what decoding takes is benchmarks/input.py's. FLOPs are those of the matrix products
and convolutions of forward and backward, counted in the traced program (evaluate/flops.py), what is
recomputed counted too; bytes are XLA's count, in which the body of a loop counts once. The matrix
rate is measured in the same run: a square product in the compute type, timed just before and after
the steps, the better of the two.

--peer alternates rounds with a plain PyTorch program of the same work, in a process of its own
(benchmarks/peers/), the first step of every turn untimed: compiled with --compile, with the literal
read-in of a NAC with --literal, with timm's blocks in the dense transformers with --timm.

Both sides have huge pages where glibc gives them (m2mkd_jax/parallel/huge_pages.py).

--json=NAME writes benchmarks/results/NAME/CASE.json, or NAME itself if it ends in .json;
benchmarks/compare.py compares two such files.
"""

from __future__ import annotations

import argparse
import statistics

import jax.numpy as jnp

from benchmarks import machine, results_files
from benchmarks import memory as process_memory
from benchmarks.cases import CASES, FUSED, REMAT
from benchmarks.ours import Ours
from benchmarks.peers import rounds
from m2mkd_jax.parallel.huge_pages import start_again


def measure(options: argparse.Namespace) -> dict:
    """All numbers of one case."""
    about = machine.describe()
    ours = Ours(options.case, options.batch, options.remat, options.fused)
    flops = ours.count_flops()
    ours.compile()
    before = machine.matrix_rate(ours.program.dtype)
    ours.steps(1)
    process_memory.reset_peak_rss()
    timed = [ours.steps(options.steps) for _ in range(options.rounds)]
    memory = ours.memory()
    rate = max(before, machine.matrix_rate(ours.program.dtype))
    seconds = [wall for wall, _ in timed]
    each = statistics.median(seconds)
    kind = "peak_on_device" if "peak_on_device" in memory else "peak_rss"
    return {
        "case": options.case,
        "job": ours.case.job,
        "batch": ours.batch,
        "remat": options.remat,
        "fused": options.fused,
        "dtype": str(jnp.dtype(ours.program.dtype)),
        "seconds_per_step": each,
        "cpu_seconds_per_step": statistics.median(cpu for _, cpu in timed),
        "fastest_and_slowest_round": [min(seconds), max(seconds)],
        "images_per_second": ours.batch / each,
        "flops_per_step": flops,
        "bytes_accessed": ours.bytes_accessed(),
        "matrix_rate": rate,
        "share_of_matrix_rate": flops / each / rate,
        "memory_bytes": memory[kind],
        "memory_is": kind,
        "memory": memory,
        "compile_seconds": ours.compile_seconds,
        "loss": ours.loss,
        "machine": about,
    }


def line(r: dict) -> str:
    """A result in words."""
    low, high = r["fastest_and_slowest_round"]
    bytes_accessed = r["bytes_accessed"] or float("nan")
    planned = r["memory"]["planned"] / 2**30
    loss = "" if r["loss"] is None else f", loss {r['loss']:.3f}"
    return (
        f"{r['case']} ({r['job']}, batch {r['batch']}, {r['dtype']}, {r['machine']['device']}): "
        f"{1e3 * r['seconds_per_step']:.1f} ms per step ({1e3 * low:.1f} to {1e3 * high:.1f}; CPU "
        f"{1e3 * r['cpu_seconds_per_step']:.1f}), {r['images_per_second']:,.1f} images/s, "
        f"{r['flops_per_step'] / 1e9:,.1f} GFLOP, {bytes_accessed / 2**30:.2f} GiB accessed, "
        f"{100 * r['share_of_matrix_rate']:.1f}% of {r['matrix_rate'] / 1e12:.2f} TFLOP/s, "
        f"{r['memory_bytes'] / 2**30:.2f} GiB {r['memory_is'].replace('_', ' ')} (planned "
        f"{planned:.2f}), compiled in {r['compile_seconds']:.1f} s{loss}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--batch", type=int, default=0, help="images per step")
    parser.add_argument("--steps", type=int, default=20, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", choices=REMAT, default="config", help="recompute blocks")
    parser.add_argument("--fused", choices=FUSED, default="auto", help="config.nac.fused")
    parser.add_argument("--json", default="", help="name or file for the numbers")
    parser.add_argument("--peer", action="store_true", help="alternate with PyTorch")
    parser.add_argument("--compile", action="store_true", help="the peer by torch.compile")
    parser.add_argument("--literal", action="store_true", help="the peer's read-in as published")
    parser.add_argument("--timm", action="store_true", help="timm's blocks in the peer")
    return parser.parse_args()


def main() -> None:
    options = parse()
    start_again()  # with huge pages, as m2mkd does
    if options.peer:
        result = rounds.alternate(options)
        print("\n".join(rounds.lines(result)))
    else:
        result = measure(options)
        print(line(result))
    if options.json:
        results_files.write(result, options.json)


if __name__ == "__main__":
    main()
