"""The work of `python -m m2mkd_jax.predict`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.data.augment import evaluation_image
from m2mkd_jax.data.coco import read_upright
from m2mkd_jax.data.decode import decode
from m2mkd_jax.data.formats.text import read_text
from m2mkd_jax.detection.inference import (
    DetectionModel,
    ImageDetections,
    open_detection,
    read_images,
)
from m2mkd_jax.detection.pictures import detect_in_image, draw, whole_masks
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.evaluate.coco import coco_results
from m2mkd_jax.inference import Model, load

BATCH = 64
TOP = 5


def read_image(path: str, model: Model) -> np.ndarray:
    """Reads an image, resized, cropped and normalised as in evaluation.

    Args:
        path: of the image file.
        model: whose image size S, mean and standard deviation are used.

    Returns:
        (S, S, 3) float32.

    Raises:
        UserError: it cannot be read or decoded.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    pixels = evaluation_image(decode(content, path), model.image_size)
    scaled = np.asarray(pixels, np.float32) / 255
    return (scaled - np.asarray(model.mean, np.float32)) / np.asarray(model.std, np.float32)


def read_npz(path: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads the file of --npz_in.

    Returns:
        The inputs as float32, and those of `codes` and `states` that the file has.

    Raises:
        UserError: there is no such file, or it has no array of inputs.
    """
    try:
        # Opened here: np.load leaves a file open that it cannot read.
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = {
                k: file[k] for k in ("images", "tokens", "codes", "states") if k in file.files
            }
    except Exception as error:  # a broken file can cause any error in zipfile, zlib and numpy
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
    """Reads the names of the classes.

    Args:
        path: of a file with one name per line, or of a .json file with a list, or with an object
            by class number.
        classes: how many there are.

    Raises:
        UserError: it cannot be read, or has another number of names.
    """
    try:
        text = read_text(path)
        names = json.loads(text) if path.endswith(".json") else text.splitlines()
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"--labels: {path} cannot be read: {error}") from None
    if isinstance(names, dict):
        names = [names[str(i)] for i in range(len(names)) if str(i) in names]
    if not isinstance(names, list) or not all(names):
        raise UserError(f"--labels: {path} is no list of names")
    if len(names) != classes:
        raise UserError(f"--labels: {path} has {len(names)} names for {classes} classes")
    # The common lists for ImageNet have [id, name].
    return [str(name[-1] if isinstance(name, list) else name) for name in names]


def run(args: argparse.Namespace) -> None:
    """Predicts and prints. Raises UserError if the input is wrong."""
    if bool(args.images) == bool(args.npz_in):
        raise UserError("give image files, or --npz_in=FILE")
    detection = open_detection(args.checkpoint, args.arch)
    if detection is not None:
        predict_detection(detection, args)
        return
    if args.draw or args.json:
        raise UserError(f"--draw and --json are for detectors; {args.checkpoint} is none")
    model = load(args.checkpoint, args.module, arch=args.arch)
    if args.images and not model.image_size:
        raise UserError(
            f"{args.checkpoint} is a middle module and takes tokens (B, N, {model.width}); give "
            "them with --npz_in"
        )
    labels: Sequence[str] = model.class_names
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
    # A student's states are dealt over the batch: all inputs are one.
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


def predict_detection(model: DetectionModel, args: argparse.Namespace) -> None:
    """`predict` with a detector, or with the backbone of one."""
    if args.module is not None:
        raise UserError("--module: a detector is not in modules")
    if args.images and model.is_detector:
        detect_in_files(model, args)
        return
    if args.images or args.draw or args.json:
        raise UserError("image files, --draw and --json are for whole detectors; give --npz_in")
    arrays: dict[str, np.ndarray] = {}
    if model.is_detector:
        images = read_images(args.npz_in)
        if images is None:
            raise UserError(f'--npz_in: {args.npz_in} needs arrays "image_0", "image_1", ...')
        for i, found in enumerate(model.detect(images)):
            arrays |= _detection_arrays(found, i)
            best = f"{found.scores[0]:.4f}" if len(found.scores) else "none"
            print(f"{args.npz_in}[{i}]: {len(found.scores)} detections, best score {best}")
    else:
        inputs, _ = read_npz(args.npz_in)
        arrays = model.features(inputs)
        print(", ".join(f"{name} {value.shape}" for name, value in arrays.items()))
    if args.npz:
        replace_file(Path(args.npz), lambda tmp: _save(tmp, arrays))


def _detection_arrays(found: ImageDetections, index: int) -> dict[str, np.ndarray]:
    fields = ("boxes", "scores", "classes", "masks")
    return {f"{field}_{index}": getattr(found, field) for field in fields}


def detect_in_files(model: DetectionModel, args: argparse.Namespace) -> None:
    """Prints the best detections in image files; writes --draw, --json and --npz."""
    labels: Sequence[str] = model.class_names
    if args.labels:
        labels = read_labels(args.labels, model.classes)
    folder = Path(args.draw) if args.draw else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    images = [read_upright(Path(path)) for path in args.images]
    arrays: dict[str, np.ndarray] = {}
    results: list[dict[str, Any]] = []
    for i, (path, image) in enumerate(zip(args.images, images, strict=True)):
        found = detect_in_image(model, image)
        arrays |= _detection_arrays(found, i)
        shown = "  ".join(
            f"{labels[c] if labels else c} {score:.4f} [{', '.join(f'{n:.0f}' for n in box)}]"
            for c, score, box in zip(found.classes, found.scores, found.boxes[:TOP], strict=False)
        )
        print(printable(f"{path}: {len(found.scores)} detections  {shown}"))
        if not (folder or args.json):
            continue
        masks = whole_masks(found, *image.shape[:2])
        if folder:
            draw(folder / f"{i}_{Path(path).stem}.png", image, found, masks, labels)
        if args.json:
            results += coco_results(i, found.boxes, found.scores, found.classes.tolist(), masks)
    if args.json:
        replace_file(Path(args.json), lambda tmp: _write_text(tmp, json.dumps(results)))
    if args.npz:
        replace_file(Path(args.npz), lambda tmp: _save(tmp, arrays))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with open(path, "wb") as file:  # numpy appends .npz to a path, but not to an open file
        np.savez(file, **arrays)


def _print_top(names: Sequence[str], logits: np.ndarray, labels: Sequence[str]) -> None:
    """Prints a line per image; `logits` is (B, K)."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    for name, row in zip(names, probabilities, strict=True):
        best = np.argsort(-row)[:TOP]
        shown = "  ".join(f"{labels[i] if labels else i} {row[i]:.4f}" for i in best)
        print(printable(f"{name}: {shown}"))
