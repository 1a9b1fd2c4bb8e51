"""Converts weights between PyTorch files and this program's directories, in both directions.

SRC is a torch or safetensors file, or a directory of module files -> DST is a new directory of
weights. SRC is such a directory (converted, or a job's) -> DST is a .pth, .pt or .safetensors file,
in the layout that the weights came in.

examples:
  python -m m2mkd_jax.convert vit_large.pth weights --arch=vit_large_patch16_224:6,6,6,6
  python -m m2mkd_jax.convert runs/nac/jobs/e2e nac.safetensors
  python -m m2mkd_jax.convert detector.pth weights --arch=detector.json

exit codes: 0 done; 2 the input is wrong (one line on stderr, nothing is written)
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.command_line import Parser, run
from m2mkd_jax.conversion.converted import IMAGENET
from m2mkd_jax.conversion.from_torch import convert_from_torch
from m2mkd_jax.conversion.open_weights import (
    description_errors,
    find_weights,
    local_path,
    open_weights,
)
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.conversion.to_torch import convert_to_torch
from m2mkd_jax.detection.spec import is_detection
from m2mkd_jax.detection.weights import TREE, convert_detector, read_arch_file, write_detector
from m2mkd_jax.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = Parser("convert", __doc__)
    parser.add_argument("source", metavar="SRC", help="a path, or hf://OWNER/REPOSITORY/FILE")
    parser.add_argument(
        "target", metavar="DST", type=_target, help="the file or directory to write"
    )
    parser.add_argument(
        "--arch",
        default="",
        help="the network: VARIANT[:DEPTH,...], or a .json, .yml or .py file; by default it is "
        "inferred from the weights",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        default=0,
        metavar="N",
        help="resize the position embedding for images of N x N pixels",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="for arrays that the weights do not have (default: 0)",
    )
    for name, words in (("mean", "mean"), ("std", "standard deviation")):
        parser.add_argument(
            f"--{name}",
            type=_three_numbers,
            metavar="R,G,B",
            help=f"{words} of the pixels (0 to 1) that the network was trained with (default: "
            f"ImageNet's {','.join(map(str, IMAGENET[name]))})",
        )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return parser


def _seed(text: str) -> int:
    """The value of --seed."""
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not one of 0 to 2^63 - 1")
    return seed


def _three_numbers(text: str) -> list[float]:
    """The value of --mean or --std."""
    numbers = [float(word) for word in text.split(",")]
    if len(numbers) != 3 or not all(0 <= n <= 1 for n in numbers):
        raise argparse.ArgumentTypeError(f"{text} is not three numbers from 0 to 1")
    return numbers


def _target(text: str) -> Path:
    """The path to write to, which is a local one."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no local path; write to one, and copy it")
    return Path(text)


def convert(args: argparse.Namespace) -> None:
    """Does one conversion, and prints what became of every tensor.

    Raises:
        UserError: the input is wrong; nothing is left at DST.
    """
    began = time.monotonic()
    target = Path(os.path.realpath(args.target.expanduser()))  # through links
    source = local_path(args.source)
    stored = find_weights(source)
    _check_target(target, args, into_weights=stored is None)
    if stored is None:
        _from_torch(source, target, args)
    else:
        print("\n".join(_to_torch(stored, target, args).lines()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    minutes = (time.monotonic() - began) / 60
    print(f"{source} -> {args.target}: {minutes:.2f} minutes, peak memory {peak:.2f} GiB")


def _from_torch(source: Path, target: Path, args: argparse.Namespace) -> None:
    detector = read_arch_file(args.arch)
    if detector is None:
        converted = convert_from_torch(source, args.arch, args.image_size, args.seed)
    else:
        if args.image_size:
            raise UserError("--image_size: a detector takes images of any size")
        converted = convert_detector(source, detector, args.arch, args.seed)
    report = converted.report
    given = {key: value for key, value in (("mean", args.mean), ("std", args.std)) if value}
    if not all(given.get("std", [1])):
        raise UserError("--std must be above 0")
    converted.description["normalisation"] |= given
    used = converted.description["normalisation"]
    stated = given or any(name.startswith("pixel_") for name in detector or ())
    source_of = "as given" if stated else "ImageNet's, for no file says it; see --mean and --std"
    report.notes.append(f"normalisation: mean {used['mean']}, std {used['std']} ({source_of})")
    try:
        save_weights(
            target,
            converted.trees,
            lambda: {**converted.description, "conversion": report.facts()},
        )
    except OSError as error:
        raise UserError(f"{args.target} cannot be written: {error.strerror}") from None
    print("\n".join(report.lines()))
    for name, tree in read_record(target / "description.json")["trees"].items():
        print(f"{name}: {tree['arrays']} arrays, sha256 {tree['sha256']}")


def _to_torch(stored: Path, target: Path, args: argparse.Namespace) -> Report:
    if args.arch or args.image_size or args.mean or args.std:
        raise UserError(
            "--arch, --image_size, --mean and --std are for weights that come from torch"
        )
    weights = open_weights(stored)
    with description_errors(stored):
        if is_detection(weights.description):
            tree = weights.trees[TREE]["params"]
            return write_detector(stored, weights.description, tree, target)
        return convert_to_torch(stored, weights.description, weights.trees, target)


def _check_target(target: Path, args: argparse.Namespace, into_weights: bool) -> None:
    """Refuses a target that exists, unless it may be replaced.

    Args:
        target: the path.
        args: of the command.
        into_weights: whether the target is a directory of weights, not a torch file or files.

    Raises:
        UserError: it exists without --overwrite, or is not what the conversion writes.
    """
    if not target.exists():
        return
    if not args.overwrite:
        raise UserError(f"{args.target} is there already; choose another DST or add --overwrite")
    if into_weights != (target / "description.json").is_file() or (
        not into_weights and target.is_dir()
    ):
        raise UserError(f"{args.target} is not what this conversion makes; remove it yourself")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. `argv`: arguments, by default those of the process."""
    return run("convert", lambda: convert(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
