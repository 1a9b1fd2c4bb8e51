"""Images per second per core of the published training augmentation, from JPEG files.

    python -m benchmarks.input [--images=192] [--rounds=5] [--workers]

The input pipeline against a straightforward version with Pillow: the same files, the same random
numbers, the same operations (crop, bicubic resize, flip, RandAugment, and in the Pillow version
normalising and erasing too, which here happen on the device), in turn in one process on one thread.
CPU seconds are counted, so that a busy machine does not change the ratio much.
--workers: batches per second of wall time with one and two worker processes instead.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base
from m2mkd_jax.data import augment, rand_augment
from m2mkd_jax.data.encoded_source import EncodedImageSource
from m2mkd_jax.data.formats.folder import FolderFiles
from m2mkd_jax.data.image_ops import FILL
from m2mkd_jax.data.pipeline import train_batches

# Wanted size: (width, height) of the files, JPEG quality. ImageNet's typical file, and
# Tiny-ImageNet's.
CASES = {224: ((500, 375), 95), 64: ((64, 64), 90)}
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
BICUBIC = Image.Resampling.BICUBIC


def write_files(root: Path, count: int, size: tuple[int, int], quality: int) -> EncodedImageSource:
    """Pieces of two photographs as JPEG files."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng, names = np.random.default_rng(0), []
    for number in range(count):
        left, top = rng.integers(0, 140), rng.integers(0, 52)
        box = (left, top, left + 500, top + 375)
        piece = photographs[number % 2].crop(box).resize(size, BICUBIC)
        piece.save(root / f"{number}.jpg", quality=quality)
        names.append(f"{number}.jpg".encode())
    return EncodedImageSource(FolderFiles(root, np.array(names)), np.zeros(count, np.int32), ("x",))


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=FILL)


def solarize_add(image: Image.Image, amount: int) -> Image.Image:
    table = [min(255, level + amount) if level < 128 else level for level in range(256)]
    return image.point(table * 3)


PILLOW = {
    "AutoContrast": lambda im, _: ImageOps.autocontrast(im),
    "Equalize": lambda im, _: ImageOps.equalize(im),
    "Invert": lambda im, _: ImageOps.invert(im),
    "Rotate": lambda im, v: im.rotate(v, BICUBIC, fillcolor=FILL),
    # No bits, at magnitude 10, is what newer versions of Pillow refuse.
    "Posterize": lambda im, v: ImageOps.posterize(im, v) if v else im.point([0] * 768),
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": solarize_add,
    "Color": lambda im, v: ImageEnhance.Color(im).enhance(v),
    "Contrast": lambda im, v: ImageEnhance.Contrast(im).enhance(v),
    "Brightness": lambda im, v: ImageEnhance.Brightness(im).enhance(v),
    "Sharpness": lambda im, v: ImageEnhance.Sharpness(im).enhance(v),
    "ShearX": lambda im, v: affine(im, 1, v, 0, 0, 1, 0),
    "ShearY": lambda im, v: affine(im, 1, 0, 0, v, 1, 0),
    "TranslateX": lambda im, v: affine(im, 1, 0, v * im.width, 0, 1, 0),
    "TranslateY": lambda im, v: affine(im, 1, 0, 0, 0, 1, v * im.height),
}


def with_pillow(
    source: EncodedImageSource, indices, augmentation: augment.Augmentation, draws, size: int, erase
) -> tuple[np.ndarray, np.ndarray]:
    """The straightforward version: uint8 images, and what a training step would be handed."""
    rng = np.random.default_rng(0)
    pixels, batch = [], []
    for i, index in enumerate(indices):
        with open(source.name(index), "rb") as file:
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
        top, left, height, width = augment.crop_box(
            image.height, image.width, draws.crop[i], draws.place[i], augmentation.scale
        )
        image = image.crop((left, top, left + width, top + height)).resize((size, size), BICUBIC)
        if draws.flip[i] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, value in rand_augment.operations(augmentation.policy, draws.choices[i]):
            image = PILLOW[name](image, value)
        pixels.append(np.asarray(image))
        values = (pixels[-1].astype(np.float32) / 255 - MEAN) / STD
        if rng.random() < erase:
            area, side = rng.uniform(0.02, 0.33) * size**2, np.exp(rng.uniform(-1.2, 1.2) / 2)
            height, width = (min(size - 1, round(area**0.5 * s)) for s in (side, 1 / side))
            top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
            values[top : top + height, left : left + width] = rng.standard_normal(
                (height, width, 3), np.float32
            )
        batch.append(values)
    return np.stack(pixels), np.stack(batch)


def compare(size: int, images: int, rounds: int, repeats: int) -> None:
    (shape, quality), data = CASES[size], base().data
    presets.published_augmentation(data)
    data.image_size = size
    augmentation = augment.Augmentation.from_config(data)
    with tempfile.TemporaryDirectory() as root:
        source = write_files(Path(root), images, shape, quality)
        indices = np.repeat(np.random.default_rng(1).permutation(images), repeats)[:images]
        draws = augment.Draws.of(np.random.default_rng(2), images, augmentation.layers)
        seconds: dict[str, list[float]] = {"ours": [], "pillow": []}
        for number in range(rounds + 1):  # the first warms up
            for name in seconds:
                began = time.process_time()
                if name == "ours":
                    ours = augment.training_images(
                        source.reader(), indices, augmentation, draws, size
                    )
                else:
                    theirs, _ = with_pillow(
                        source, indices, augmentation, draws, size, data.augment.erase
                    )
                if number:
                    seconds[name].append(time.process_time() - began)
    apart = np.abs(ours.astype(int) - theirs).mean()
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["pillow"], strict=True)]
    rate = {name: images / statistics.median(values) for name, values in seconds.items()}
    print(
        f"{size} px, each image {repeats} time(s): {rate['ours']:.0f} images/s per core, "
        f"Pillow {rate['pillow']:.0f}: {statistics.median(ratios):.2f} times "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds); "
        f"the images are {apart:.2f} levels apart"
    )


def compare_workers(size: int, images: int, rounds: int) -> None:
    """Wall time of batches with one and two worker processes."""
    (shape, quality), data = CASES[size], base().data
    presets.published_augmentation(data)
    data.image_size, batch, steps = size, 32, 80
    with tempfile.TemporaryDirectory() as root:
        source = write_files(Path(root), max(images, 256), shape, quality)
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for data.workers in rates:
                batches = train_batches(
                    source, data, batch_size=batch, total_steps=steps + 12, seed=0
                )
                for _ in range(10):  # workers start, and fill their buffers
                    next(batches)
                began = time.perf_counter()
                for _ in range(steps):
                    next(batches)
                rates[data.workers].append(batch * steps / (time.perf_counter() - began))
                batches.close()
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    print(
        f"{size} px: {statistics.median(rates[1]):.0f} images/s with one worker, "
        f"{statistics.median(rates[2]):.0f} with two: {ratio:.2f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", action="store_true")
    arguments = parser.parse_args()
    if arguments.workers:
        compare_workers(224, arguments.images, arguments.rounds)
        return
    for size in CASES:
        for repeats in (3, 1):
            compare(size, arguments.images, arguments.rounds, repeats)


if __name__ == "__main__":
    main()
