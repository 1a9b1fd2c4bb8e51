"""`predict` with a detector, or with the backbone of one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.conversion.open_weights import say_assumed
from m2mkd_jax.data.coco import read_upright
from m2mkd_jax.detection.inference import DetectionModel, ImageDetections, read_images
from m2mkd_jax.detection.pictures import detect_in_image, drawn, whole_masks
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.evaluate.coco import coco_results
from m2mkd_jax.predict import parser
from m2mkd_jax.predict.inputs import new_directory, read_labels, read_npz, save_npz

TOP = 5  # of a detector's results, printed
FOR_NETWORKS = ("csv", "features", "attention", "device", "top", "batch", "workers", "precision")


def predict_detection(model: DetectionModel, args: argparse.Namespace) -> None:
    """`predict` with a detector, or with the backbone of one."""
    if args.module is not None:
        raise UserError("--module: a detector is not in modules")
    usual = parser()
    for flag in FOR_NETWORKS:
        if getattr(args, flag) != usual.get_default(flag):
            raise UserError(f"--{flag} is not for detectors")
    if model.assumed_normalisation and model.is_detector:
        say_assumed(args.checkpoint)
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
        replace_file(Path(args.npz), lambda tmp: save_npz(tmp, arrays))


def _detection_arrays(found: ImageDetections, index: int) -> dict[str, np.ndarray]:
    fields = ("boxes", "scores", "classes", "masks")
    return {f"{field}_{index}": getattr(found, field) for field in fields}


def detect_in_files(model: DetectionModel, args: argparse.Namespace) -> None:
    """Prints the best detections in image files; writes --draw, --json and --npz."""
    labels: Sequence[str] = model.class_names
    if args.labels:
        labels = read_labels(args.labels, model.classes, model.class_names)
    images = [read_upright(Path(path)) for path in args.images]
    ids = model.category_ids or range(model.classes)
    if args.json and not model.category_ids:
        print(
            f"note: {args.checkpoint} records no ids of categories; the category_id of --json is "
            f"the number of the class, 0 to {model.classes - 1}",
            file=sys.stderr,
        )
    arrays: dict[str, np.ndarray] = {}
    results: list[dict[str, Any]] = []
    with new_directory(args.draw) as folder:
        for i, (path, image) in enumerate(zip(args.images, images, strict=True)):
            found = detect_in_image(model, image)
            arrays |= _detection_arrays(found, i)
            if not args.quiet:
                _say(path, found, labels)
            if not (folder or args.json):
                continue
            masks = whole_masks(found, *image.shape[:2])
            if folder:
                picture = drawn(image, found, masks, labels)
                picture.save(folder / f"{i}_{Path(path).stem}.png")
            if args.json:
                own = [ids[c] for c in found.classes]
                results += coco_results(i, found.boxes, found.scores, own, masks)
    if args.json:
        replace_file(Path(args.json), lambda tmp: _write_text(tmp, json.dumps(results)))
    if args.npz:
        replace_file(Path(args.npz), lambda tmp: save_npz(tmp, arrays))


def _say(path: str, found: ImageDetections, labels: Sequence[str]) -> None:
    """Prints the best detections in an image."""
    shown = "  ".join(
        f"{labels[c] if labels else c} {score:.4f} [{', '.join(f'{n:.0f}' for n in box)}]"
        for c, score, box in zip(found.classes, found.scores, found.boxes[:TOP], strict=False)
    )
    print(printable(f"{path}: {len(found.scores)} detections  {shown}"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
