"""Two result files of benchmarks/speed.py side by side, as ratios.

    python -m benchmarks.compare A B

A and B are .json files, or directories of them, for which a bare name is one of
benchmarks/results/. Above 1 in the column B / A means that B has more.
"""

from __future__ import annotations

import argparse

from benchmarks import results_files

# key of a result: what is printed, unit
NUMBERS = {
    "seconds_per_step": ("ms per step", 1e-3),
    "cpu_seconds_per_step": ("CPU ms per step", 1e-3),
    "images_per_second": ("images/s", 1.0),
    "flops_per_step": ("GFLOP", 1e9),
    "bytes_accessed": ("GiB accessed", 2**30),
    "share_of_matrix_rate": ("% of the matrix rate", 1e-2),
    "memory_bytes": ("GiB memory", 2**30),
    "compile_seconds": ("s to compile", 1.0),
    "peer_over_ours": ("times as fast as the peer", 1.0),
}
FACTS = ("job", "batch", "dtype", "remat", "memory_is", "machine", "peer")


def table(a: dict[str, dict], b: dict[str, dict]) -> list[str]:
    """Lines that compare the cases which both have."""
    lines = []
    for case in (name for name in a if name in b):
        one, two = a[case], b[case]
        lines.append(f"{case:30} {'A':>12} {'B':>12} {'B / A':>8}")
        lines += [
            f"  {fact} differs: {one.get(fact)} / {two.get(fact)}"
            for fact in FACTS
            if one.get(fact) != two.get(fact)
        ]
        for key, (title, unit) in NUMBERS.items():
            first, second = one.get(key), two.get(key)
            if first and second:
                row = f"  {title:28} {first / unit:12,.2f} {second / unit:12,.2f}"
                lines.append(f"{row} {second / first:8.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a")
    parser.add_argument("b")
    options = parser.parse_args()
    try:
        a, b = results_files.read(options.a), results_files.read(options.b)
    except FileNotFoundError as error:
        parser.error(str(error))
    lines = table(a, b)
    if not lines:
        parser.error(f"no case is in both: {', '.join(a) or 'none'} / {', '.join(b) or 'none'}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
