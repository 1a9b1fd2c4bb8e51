"""The work of `python -m m2mkd_jax.predict`.

Axes: B images, K classes, D channels.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.conversion.open_weights import local_path, say_assumed
from m2mkd_jax.detection.inference import open_detection
from m2mkd_jax.errors import UserError
from m2mkd_jax.inference import Model, load_network
from m2mkd_jax.parallel import backend
from m2mkd_jax.predict import attention_pictures, results
from m2mkd_jax.predict.detections import predict_detection
from m2mkd_jax.predict.images import Batch, batches, image_files
from m2mkd_jax.predict.inputs import (
    check_outputs,
    new_directory,
    read_labels,
    read_npz,
    save_npz,
)

FOR_IMAGES = ("csv", "json", "features", "attention")


def run(args: argparse.Namespace) -> None:
    """Predicts, prints and writes.

    Raises:
        UserError: the input is wrong; nothing is written.
    """
    if bool(args.images) == bool(args.npz_in):
        raise UserError("give image files, or --npz_in=FILE")
    for flag, least in (("top", 1), ("batch", 1), ("workers", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag}={getattr(args, flag)}: give a number from {least} on")
    # A table may well lie beside the images: what is in a folder of them is looked at below.
    single = [path for path in args.images if not Path(path).is_dir()]
    check_outputs(args, [args.checkpoint, args.arch, args.labels, args.npz_in, *single])
    checkpoint = local_path(args.checkpoint)  # downloaded once
    detection = open_detection(checkpoint, args.arch)
    if detection is not None:
        predict_detection(detection, args)
        return
    if args.draw:
        raise UserError(f"--draw is for detectors; {args.checkpoint} is none")
    with _on_device(args.device):
        model = load_network(checkpoint, args.module, arch=args.arch, precision=args.precision)
        labels: Sequence[str] = model.class_names
        if args.labels:
            if not model.classes:
                raise UserError(f"--labels: {args.checkpoint} gives tokens, no classes")
            labels = read_labels(args.labels, model.classes, labels)
        if args.npz_in:
            _of_arrays(model, labels, args)
        else:
            if model.image_size and model.assumed_normalisation:
                say_assumed(args.checkpoint)
            _of_files(model, labels, args)


@contextlib.contextmanager
def _on_device(name: str | None) -> Iterator[None]:
    """Runs what is inside on the first device of a platform; None: jax's choice.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        yield
        return
    try:
        device = jax.devices(name)[0]
    except RuntimeError:
        raise UserError(f"--device={name}: jax finds none; it has {jax.devices()}") from None
    with jax.default_device(device), backend.tracing_for(name):
        yield


def _of_arrays(model: Model, labels: Sequence[str], args: argparse.Namespace) -> None:
    """Predicts for the inputs of --npz_in."""
    for flag in FOR_IMAGES:
        if getattr(args, flag):
            raise UserError(f"--{flag} is for image files; --npz writes what --npz_in gives")
    inputs, fixed = read_npz(args.npz_in)
    size = _batch_size(args.batch, model.period(fixed))
    outputs = np.concatenate(
        [np.asarray(model(inputs[i : i + size], fixed)) for i in range(0, len(inputs), size)]
    )
    if model.classes:
        names = [f"{args.npz_in}[{i}]" for i in range(len(inputs))]
        for found in results.likeliest(names, outputs, args.top):
            print(results.line(found, labels))
    else:
        print(f"{len(outputs)} outputs of shape {outputs.shape[1:]}")
    if args.npz:
        arrays = {"outputs": outputs} | ({"logits": outputs} if model.classes else {})
        replace_file(Path(args.npz), lambda tmp: save_npz(tmp, arrays))


def _batch_size(wanted: int, period: int) -> int:
    """The size of batches that give what one call of all inputs gives; see `Model.period`."""
    return max(wanted // period, 1) * period


def _of_files(model: Model, labels: Sequence[str], args: argparse.Namespace) -> None:
    """Predicts for image files and folders."""
    if not model.image_size:
        raise UserError(
            f"{args.checkpoint} is a middle module and takes tokens (B, N, {model.width}); give "
            "them with --npz_in"
        )
    if not model.classes and (args.csv or args.json):
        raise UserError(f"--csv, --json: {args.checkpoint} gives tokens, no classes")
    files = image_files(args.images)
    check_outputs(args, [file for file, _ in files])
    size = _batch_size(args.batch, model.period())
    found = Found(model, labels, args)
    progress = tqdm(total=len(files), unit="image", disable=args.quiet or len(files) < 2)
    with progress, new_directory(args.attention) as pictures:
        for batch in batches(files, model, size, args.workers):
            # A single batch is not padded: its program serves no other.
            found.add(batch, size if len(files) > size else len(batch.paths), pictures)
            progress.update(len(batch.paths))
    found.write()


class Found:
    """What the network says of all images so far.

    Args:
        model: the network.
        labels: names of its classes; (): numbers.
        args: of the command.
    """

    def __init__(self, model: Model, labels: Sequence[str], args: argparse.Namespace):
        self._model, self._labels, self._args = model, labels, args
        self._names: list[str] = []
        self._outputs: list[np.ndarray] = []
        self._features: list[np.ndarray] = []
        self._predictions: list[results.Prediction] = []

    def add(self, batch: Batch, size: int, pictures: Path | None) -> None:
        """Runs the network on a batch.

        Args:
            batch: of images.
            size: that they are padded to.
            pictures: directory of the pictures of attention; None: none are wanted.
        """
        model, args, count, first = self._model, self._args, len(batch.paths), len(self._names)
        inputs = batch.padded(size)
        outputs = np.asarray(model(inputs))[:count]
        if args.npz:
            self._outputs.append(outputs)
        if args.features:
            self._features.append(_features(model, inputs)[:count])
        if pictures is not None:
            maps = attention_pictures.attention_over_image(model, inputs)
            attention_pictures.draw(pictures, batch, maps[:count], first)
        self._names += batch.paths
        if not model.classes:
            print(f"{count} outputs of shape {outputs.shape[1:]}")
            return
        new = list(results.likeliest(batch.paths, outputs, args.top))
        self._predictions += new if args.csv or args.json else []
        for found in () if args.quiet else new:
            tqdm.write(results.line(found, self._labels))

    def write(self) -> None:
        """Writes the files that were asked for."""
        args, names = self._args, np.asarray(self._names)
        predicted, labels = self._predictions, self._labels
        if args.csv:
            replace_file(Path(args.csv), lambda tmp: results.write_csv(tmp, predicted, labels))
        if args.json:
            replace_file(Path(args.json), lambda tmp: results.write_json(tmp, predicted, labels))
        if args.npz:
            outputs = np.concatenate(self._outputs)
            arrays = {"outputs": outputs} | ({"logits": outputs} if self._model.classes else {})
            replace_file(Path(args.npz), lambda tmp: save_npz(tmp, arrays | {"images": names}))
        if args.features:
            features = {"features": np.concatenate(self._features), "images": names}
            replace_file(Path(args.features), lambda tmp: save_npz(tmp, features))


def _features(model: Model, inputs: np.ndarray) -> np.ndarray:
    """What the head sees, (B, D): the class token of a transformer, the mean final states of a NAC.

    Raises:
        UserError: the network has no head.
    """
    found = model.features(inputs)
    for name in ("class_token", "output"):
        if name in found and model.classes:
            array = np.asarray(found[name], np.float32)
            return array if array.ndim == 2 else array.mean(1)
    raise UserError("--features: this network has no head; --npz writes its tokens")
