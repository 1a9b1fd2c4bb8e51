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
from collections.abc import Sequence
from pathlib import Path

from m2mkd_jax.command_line import Parser, run_module
from m2mkd_jax.conversion.converted import IMAGENET


def parser() -> Parser:
    """The command's arguments."""
    found = Parser("convert", __doc__)
    found.add_argument("source", metavar="SRC", help="a path, or hf://OWNER/REPOSITORY/FILE")
    found.add_argument("target", metavar="DST", type=_target, help="the file or directory to write")
    found.add_argument(
        "--arch",
        default="",
        help="the network: VARIANT[:DEPTH,...], or a .json, .yml or .py file; by default it is "
        "inferred from the weights",
    )
    found.add_argument(
        "--image_size",
        type=int,
        default=0,
        metavar="N",
        help="resize the position embedding for images of N x N pixels",
    )
    found.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="for arrays that the weights do not have (default: 0)",
    )
    for name, words in (("mean", "mean"), ("std", "standard deviation")):
        found.add_argument(
            f"--{name}",
            type=_numbers,
            metavar="R,G,B",
            help=f"{words} of the pixels (0 to 1) that the network was trained with (default: "
            f"ImageNet's {','.join(map(str, IMAGENET[name]))})",
        )
    found.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return found


def _seed(text: str) -> int:
    """The value of --seed."""
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not one of 0 to 2^63 - 1")
    return seed


def _numbers(text: str) -> list[float]:
    """The value of --mean or --std."""
    numbers = [float(word) for word in text.split(",")]
    if not all(0 <= n <= 1 for n in numbers):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1 for each channel")
    return numbers


def _target(text: str) -> Path:
    """The path to write to, which is a local one."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no local path; write to one, and copy it")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. `argv`: arguments, by default those of the process."""
    return run_module("convert", parser(), argv)
