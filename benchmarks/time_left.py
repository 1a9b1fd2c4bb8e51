"""How right a run's estimate of its remaining time is.

    python -m benchmarks.time_left [--config=configs/nac_digits.py]

Runs all phases of a config in an empty directory, as a user does, and compares "run m:ss" of each
line with the time that the run then took. A line per job: the estimate at its first line that has
one, the time that was left, and the error as a share of that.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time

LINE = re.compile(r"^\[(?P<job>[^\]]+)\].*, run (?P<left>[\d:]+) .*\(job (?P<place>\d+) of \d+\)")
WARM = 3  # jobs after which the estimate is to be right


def seconds(clock: str) -> float:
    """Seconds of m:ss or h:mm:ss."""
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return float(total)


def estimates(config: str) -> list[tuple[str, int, float, float]]:
    """Runs a config: (job, its place, estimated seconds left, actual seconds left) of each line."""
    found: list[tuple[str, int, float, float]] = []
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "m2mkd_jax.main", f"--config={config}"]
        command += [f"--workdir={workdir}/run", "--config.log_seconds=2"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if match := LINE.match(line):
                left = seconds(match["left"])
                found.append((match["job"], int(match["place"]), left, time.monotonic()))
        if code := process.wait():
            raise SystemExit(code)
        end = time.monotonic()
    return [(job, place, left, end - at) for job, place, left, at in found]


def main(argv: list[str]) -> None:
    """Prints the table, and the errors after the first WARM jobs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/nac_digits.py")
    found = estimates(parser.parse_args(argv).config)
    print(f"{'job':16} {'estimate':>9} {'actual':>9} {'error':>7}")
    shown = set()
    for job, _, left, actual in found:
        if job not in shown:
            shown.add(job)
            print(f"{job:16} {left:8.0f}s {actual:8.1f}s {100 * (left / actual - 1):+6.0f}%")
    errors = [abs(left / actual - 1) for _, place, left, actual in found if place > WARM]
    if errors:
        middle, largest = statistics.median(errors), max(errors)
        print(
            f"after {WARM} jobs: median error {100 * middle:.0f}%, largest {100 * largest:.0f}% "
            f"({len(errors)} lines)"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
