"""The work of `python -m m2mkd_jax.convert`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.checkpoint.replacing import why_kept
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.config.keys import in_single
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
from m2mkd_jax.files.outputs import refuse_inputs
from m2mkd_jax.files.paths import at_home
from m2mkd_jax.parallel import memory


def run(args: argparse.Namespace) -> None:
    """Does one conversion, and prints what became of every tensor.

    Raises:
        UserError: the input is wrong; nothing is left at DST.
    """
    began = time.monotonic()
    target = Path(os.path.realpath(at_home(args.target)))  # through links
    source = local_path(args.source)
    stored = find_weights(source)
    refuse_inputs(target, (source, args.arch), str(args.target))
    _check_target(target, args, into_weights=stored is None)
    if stored is None:
        _from_torch(source, target, args)
    else:
        print("\n".join(_to_torch(stored, target, args).lines()))
    peak = memory.peak_bytes() / 2**30
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
    if not all(map(in_single, given.get("std", [1]))):
        raise UserError("--std must be above 0")
    converted.description["normalisation"] |= given
    used = converted.description["normalisation"]
    stated = given or any(name.startswith("pixel_") for name in detector or ())
    # A detector's images have three; the channels of its fields are others.
    spec = converted.description["spec"] if detector is None else {}
    channels = spec.get("vit", spec).get("channels", 3)
    for name in ("mean", "std"):
        if len(used[name]) != channels:
            raise UserError(
                f"{args.source}: its images have {channels} channels; give --{name} with a number "
                "for each, by commas"
            )
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
    if reason := why_kept(target) if into_weights else _why_no_file(target):
        raise UserError(reason)


def _why_no_file(target: Path) -> str:
    """Why a torch file cannot be at a path; "": it can."""
    return f"{target} is a directory; give the path of a file" if target.is_dir() else ""
