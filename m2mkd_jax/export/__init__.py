"""Writes a network for other programs to run: as a StableHLO program of jax.export, or as ONNX.

CKPT is a directory of weights (converted, a job's or a run's), a torch or safetensors file, or
hf://OWNER/REPOSITORY. The program takes images (B, S, S, 3), float32 and normalised (--pixels:
uint8, which it normalises itself), or a middle module's tokens (B, N, D), and gives logits or
tokens. B is free unless --batch fixes it. OUT.json says what it takes and gives, the normalisation,
and the names of the classes. Before OUT appears, what was written is run beside the network, and
refused where the outputs differ by more than 1e-4 of the largest.

A StableHLO program is read with jax.export.deserialize(bytes).call(images), by any jax of the next
six months at least, on the platforms of --platforms. ONNX needs the extra `onnx`.

examples:
  python -m m2mkd_jax.export runs/nac nac.stablehlo --format=stablehlo
  python -m m2mkd_jax.export runs/vmoe_digits vmoe.onnx --format=onnx --pixels

exit codes: 0 done; 2 the input is wrong (one line on stderr, nothing is written)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from m2mkd_jax.command_line import Parser, run_module

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _platforms(text: str) -> tuple[str, ...]:
    """The value of --platforms."""
    names = tuple(text.split(","))
    for name in names:
        if name not in PLATFORMS:
            raise argparse.ArgumentTypeError(f'"{name}" is none of {", ".join(PLATFORMS)}')
    return names


def parser() -> Parser:
    """The command's arguments."""
    found = Parser("export", __doc__)
    found.add_argument("checkpoint", metavar="CKPT", help="the weights")
    found.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    found.add_argument("--format", choices=FORMATS, required=True, help="of the file")
    found.add_argument(
        "--batch", type=int, default=0, metavar="N", help="inputs at once (default: any number)"
    )
    found.add_argument("--tokens", type=int, default=0, metavar="N", help="of a middle module")
    found.add_argument("--pixels", action="store_true", help="take uint8 images, not normalised")
    found.add_argument(
        "--platforms",
        type=_platforms,
        default=PLATFORMS,
        metavar="NAME,...",
        help=f"of a StableHLO program (default: {','.join(PLATFORMS)})",
    )
    found.add_argument(
        "--module", type=int, metavar="I", help="only this stage of the network, counted from 0"
    )
    found.add_argument("--arch", default="", help="the network of torch weights; see convert")
    found.add_argument(
        "--overwrite", action="store_true", help="replace OUT and OUT.json if they exist"
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. `argv`: arguments, by default those of the process."""
    return run_module("export", parser(), argv)
