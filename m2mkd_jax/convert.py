"""python -m m2mkd_jax.convert SRC DST [--arch=...] [--image_size=N] [--seed=N] [--overwrite]

SRC a torch or safetensors file, or a directory of module files -> DST a directory of weights.
SRC such a directory (converted, or a job's) -> DST a .pth, .pt or .safetensors file.

Exit codes: 0 done; 2 the input is wrong (one line on stderr, nothing written).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from m2mkd_jax.checkpoint.files import read_json
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.command_line import Parser, run
from m2mkd_jax.conversion.from_torch import read_converted
from m2mkd_jax.conversion.open_weights import find_weights, local_path, open_weights, validate
from m2mkd_jax.conversion.to_torch import to_torch
from m2mkd_jax.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m m2mkd_jax.convert", __doc__)
    parser.add_argument("source", metavar="SRC", help="a path, or hf://OWNER/REPOSITORY/FILE")
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument(
        "--arch",
        default="",
        help="VARIANT[:DEPTH,...], or a .json, .yml or .py file; by default the weights decide",
    )
    parser.add_argument("--image_size", type=int, default=0, help="resize the position embedding")
    parser.add_argument("--seed", type=_seed, default=0, help="of what the weights do not bring")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not one of 0 to 2^63 - 1")
    return seed


def convert(args: argparse.Namespace) -> None:
    """Does one conversion and prints what it did.

    Raises:
        UserError: the input is wrong; nothing is left at DST.
    """
    began = time.monotonic()
    target = Path(os.path.realpath(args.target.expanduser()))  # through links
    source = local_path(args.source)
    stored = find_weights(source)
    _check_target(target, args, stored is None)
    if stored is not None:
        if args.arch or args.image_size:
            raise UserError("--arch and --image_size are for weights that come from torch")
        weights = open_weights(stored)
        report = validate(
            stored, lambda: to_torch(stored, weights.description, weights.trees, target)
        )
        print("\n".join(report.lines()))
    else:
        converted = read_converted(source, args.arch, args.image_size, args.seed)
        report = converted.report
        try:
            save_weights(
                target,
                converted.trees,
                lambda: {**converted.description, "conversion": report.facts()},
            )
        except OSError as error:
            raise UserError(f"{args.target} cannot be written: {error.strerror}") from None
        print("\n".join(report.lines()))
        for name, tree in read_json(target / "description.json")["trees"].items():
            print(f"{name}: {tree['arrays']} arrays, sha256 {tree['sha256']}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    minutes = (time.monotonic() - began) / 60
    print(f"{source} -> {args.target}: {minutes:.2f} minutes, peak memory {peak:.2f} GiB")


def _check_target(target: Path, args: argparse.Namespace, into_weights: bool) -> None:
    if not target.exists():
        return
    if not args.overwrite:
        raise UserError(f"{args.target} is there already; choose another DST or add --overwrite")
    # Never a directory of something else.
    if into_weights != (target / "description.json").is_file() or (
        not into_weights and target.is_dir()
    ):
        raise UserError(f"{args.target} is not what this conversion makes; remove it yourself")


def main(argv: Sequence[str] | None = None) -> int:
    return run("convert", lambda: convert(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
