"""Minutes and peak memory of converting a checkpoint of a published network's full size.

    python -m benchmarks.convert [--manifest=vit_huge_patch14_224.4333333334] [--back]

Writes a file with the names and shapes of that manifest and random values into a temporary
directory (the released file's layout, so each tensor under two names), and runs the convert command
on it in a process of its own. --back: converts the result back too, and compares every tensor.
Needs the extra `test`; for the ViT-H teacher 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.published_files import assert_same_tensors, finished_checkpoint

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "tests" / "fixtures" / "manifests"


def write(manifest: str, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(finished_checkpoint(state), path)


def convert(source: Path, target: Path, size: int) -> None:
    """Runs the command and prints what it took beside the torch file's size in bytes."""
    command = [sys.executable, "-m", "m2mkd_jax.convert", str(source), str(target)]
    began = time.monotonic()
    with open(target.with_suffix(".log"), "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log)
        _, status, used = os.wait4(process.pid, 0)
        log.seek(0)
        lines = log.read().splitlines()
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    peak = used.ru_maxrss * 1024
    print(next(line for line in lines if "tensors used" in line))
    print(
        f"{source.name} -> {target.name}: {(time.monotonic() - began) / 60:.2f} minutes, file of "
        f"{size / 2**30:.2f} GiB, peak memory {peak / 2**30:.2f} GiB: {peak / size:.2f} times it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", default="vit_huge_patch14_224.4333333334")
    parser.add_argument("--back", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, weights = Path(folder) / "source.pth", Path(folder) / "weights"
        # A process of its own: what writing needs must not count.
        if (child := os.fork()) == 0:
            write(arguments.manifest, source)
            os._exit(0)
        os.waitpid(child, 0)
        size = source.stat().st_size
        convert(source, weights, size)
        if arguments.back:
            convert(weights, Path(folder) / "back.pth", size)
            # A student's random codes and states, which the original forgets, are added.
            assert_same_tensors(source, Path(folder) / "back.pth", ignore=("codes", "states"))
            print("back: every tensor is the same to the bit")


if __name__ == "__main__":
    main()
