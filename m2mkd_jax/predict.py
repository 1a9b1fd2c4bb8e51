"""python -m m2mkd_jax.predict CKPT IMAGE... [--labels=FILE] [--npz=OUT] [--npz_in=IN] [--module=I]

The five likeliest classes of each image. OUT gets `outputs`, and `logits` where the network gives
logits. IN holds `images` (B, H, W, 3) float32, normalised, or for a middle module tokens
(B, N, D); for a NAC student perhaps its `codes` and `states`.

Exit codes: 0 done; 2 the input is wrong (one line on stderr).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.command_line import Parser, run
from m2mkd_jax.data.augment import evaluation_image
from m2mkd_jax.data.decode import decode
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.inference import Model, load

BATCH = 64
TOP = 5


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m m2mkd_jax.predict", __doc__)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("images", metavar="IMAGE", nargs="*")
    parser.add_argument("--labels", default="", help="names of the classes: a line each, or JSON")
    parser.add_argument("--npz", default="", help="file for the outputs")
    parser.add_argument("--npz_in", default="", help="inputs from a file instead of images")
    parser.add_argument("--module", type=int, default=None, help="only this stage of the network")
    parser.add_argument("--arch", default="", help="for torch weights; see m2mkd_jax.convert")
    return parser


def read_image(path: str, model: Model) -> np.ndarray:
    """An image file as (S, S, 3) float32, cut and normalised as in evaluation.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    pixels = evaluation_image(decode(content, path), model.image_size)
    scaled = np.asarray(pixels, np.float32) / 255
    return (scaled - np.asarray(model.mean, np.float32)) / np.asarray(model.std, np.float32)


def read_npz(path: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The inputs, and a student's codes and states if they are there.

    Raises:
        UserError: no such file, or no array of inputs in it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                k: file[k] for k in ("images", "tokens", "codes", "states") if k in file.files
            }
    except Exception as error:  # whatever a broken file provokes in zipfile, zlib and numpy
        raise UserError(f"--npz_in: {path} cannot be read: {error}") from None
    inputs = [arrays.pop(key) for key in ("images", "tokens") if key in arrays]
    if len(inputs) != 1:
        raise UserError(
            f'--npz_in: {path} needs an array "images" (of a middle module, its tokens)'
        )
    if inputs[0].dtype.kind != "f" or not len(inputs[0]):
        raise UserError(f"--npz_in: {path}: the inputs are {inputs[0].dtype}, not some floats")
    return inputs[0].astype(np.float32), arrays


def read_labels(path: str, classes: int) -> list[str]:
    """Names of the classes: one per line, or a JSON list, or a JSON object by class number.

    Raises:
        UserError: it cannot be read, or has another number of names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        names = json.loads(text) if path.endswith(".json") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--labels: {path} cannot be read: {error}") from None
    if isinstance(names, dict):
        names = [names[str(i)] for i in range(len(names)) if str(i) in names]
    if not isinstance(names, list) or not all(names):
        raise UserError(f"--labels: {path} is no list of names")
    if len(names) != classes:
        raise UserError(f"--labels: {path} has {len(names)} names for {classes} classes")
    # ImageNet's usual lists have [id, name].
    return [str(name[-1] if isinstance(name, list) else name) for name in names]


def predict(args: argparse.Namespace) -> None:
    """Raises UserError where the input is wrong."""
    if bool(args.images) == bool(args.npz_in):
        raise UserError("give image files, or --npz_in=FILE")
    model = load(args.checkpoint, args.module, arch=args.arch)
    if args.images and not model.image_size:
        raise UserError(
            f"{args.checkpoint} is a middle module and takes tokens (B, N, {model.width}); give "
            "them with --npz_in"
        )
    labels = None
    if args.labels:
        if not model.classes:
            raise UserError(f"--labels: {args.checkpoint} gives tokens, no classes")
        labels = read_labels(args.labels, model.classes)
    fixed: dict[str, np.ndarray] = {}
    if args.npz_in:
        inputs, fixed = read_npz(args.npz_in)
        names = [f"{args.npz_in}[{i}]" for i in range(len(inputs))]
    else:
        names = args.images
        inputs = np.stack([read_image(path, model) for path in names])
    # States belong to the images of one batch.
    batch = len(inputs) if fixed else BATCH
    outputs = np.concatenate(
        [np.asarray(model(inputs[i : i + batch], fixed)) for i in range(0, len(inputs), batch)]
    )
    if model.classes:
        _print_top(names, outputs, labels)
    else:
        print(f"{len(outputs)} outputs of shape {outputs.shape[1:]}")
    if args.npz:
        arrays = {"outputs": outputs} | ({"logits": outputs} if model.classes else {})
        replace_file(Path(args.npz), lambda tmp: _save(tmp, arrays))


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # a file, or numpy would append .npz to the name
        np.savez(file, **arrays)


def _print_top(names: Sequence[str], logits: np.ndarray, labels: list[str] | None) -> None:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    for name, row in zip(names, probabilities, strict=True):
        best = np.argsort(-row)[:TOP]
        shown = "  ".join(f"{labels[i] if labels else i} {row[i]:.4f}" for i in best)
        print(printable(f"{name}: {shown}"))


def main(argv: Sequence[str] | None = None) -> int:
    return run("predict", lambda: predict(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
