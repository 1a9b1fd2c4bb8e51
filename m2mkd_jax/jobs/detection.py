"""What jobs that train or measure a detector do otherwise: batches, evaluation, pictures.

Axes: B images, H height, W width, N detections.

Source: docs/detection.md#evaluation, docs/detection.md#inference.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from m2mkd_jax.data.annotations import Scene, bitmap
from m2mkd_jax.data.damaged_images import first_sound
from m2mkd_jax.data.indices import step_generator
from m2mkd_jax.data.pipeline import BatchIterator
from m2mkd_jax.data.scene_batches import (
    DRAWS,
    eval_scenes,
    scene_indices,
    train_scenes,
    training_scene,
)
from m2mkd_jax.detection.detector import Detections
from m2mkd_jax.detection.inference import ImageDetections
from m2mkd_jax.detection.pictures import drawn, whole_masks
from m2mkd_jax.detection.training import STAGE
from m2mkd_jax.errors import require
from m2mkd_jax.evaluate.coco import KINDS, coco_results, evaluate_coco, without_images
from m2mkd_jax.files.paths import make_directory, write_bytes
from m2mkd_jax.jobs.run import Run, image_source
from m2mkd_jax.parallel import backend
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel.process import from_main, interrupted, is_main, reached, union
from m2mkd_jax.phases.detection import DetectionPhase, DetectionProgram
from m2mkd_jax.train.stops import EvaluationStopped

# Of boxes and of masks in metrics, such as eval_box_AP50.
TITLES = dict(zip(KINDS, ("box", "mask"), strict=True))
BEST = "eval_box_AP"  # the metric of the best checkpoint
PICTURES = "detections"  # folder of a job
SHOWN = 9  # scenes of images.png


def scene_stream(phase: DetectionPhase, total: int, done: int) -> BatchIterator:
    """The batches of a job after `done` of `total` steps, on the host."""
    return train_scenes(
        image_source(phase.data, "train"),
        phase.data,
        batch_size=phase.recipe.batch // phase.recipe.accumulate,
        total_steps=total,
        start_step=done,
        seed=phase.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def draw_scenes(path: Path, phase: DetectionPhase) -> None:
    """Draws the first scenes as the first step sees them, with their objects."""
    data, source = phase.data, image_source(phase.data, "train")
    micro = phase.recipe.batch // phase.recipe.accumulate
    indices = scene_indices(source, data, micro, phase.seed)
    draws = step_generator(phase.seed, 0).random((micro, DRAWS))
    tiles = []
    for index, own in list(zip(indices[0], draws, strict=True))[:SHOWN]:
        whole, _ = first_sound(source, int(index), source.read)
        scene = training_scene(whole, data, own)
        objects = ImageDetections(
            scene.boxes, np.ones(len(scene.boxes)), scene.classes, np.zeros((0, 28, 28))
        )
        masks = whole_scene_masks(scene)
        tiles.append(drawn(scene.image, objects, masks, source.class_names))
    side, columns = data.image_size, 3
    grid = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side))
    for i, tile in enumerate(tiles):
        grid.paste(tile, (i % columns * side, i // columns * side))
    _save(path, grid)


class DetectionEvaluator:
    """COCO's numbers of a detector on the test scenes, and pictures of the first of them.

    Args:
        run: the run.
        phase: of the detector.
        program: of the phase.

    Attributes:
        per_class: of the last call, AP by the names of the classes, of boxes and of masks.
        pictures: of the last call, by the number of the scene.
    """

    def __init__(self, run: Run, phase: DetectionPhase, program: DetectionProgram):
        self._mesh, section = run.mesh, run.config.detection
        self._source, self._data = image_source(phase.data, "test"), phase.data
        self._batch = -(-section.evaluation_batch // run.mesh.size) * run.mesh.size
        self._count = min(section.pictures, len(self._source))
        self._truth = self._source.truth() if is_main() else {}
        self._detect = backend.jit(
            meshes.with_mesh(run.mesh, program.detect), out_shardings=meshes.replicated(run.mesh)
        )
        self.per_class: dict[str, dict[str, float]] = {}
        self.pictures: dict[int, Image.Image] = {}

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """The numbers, such as eval_box_AP and eval_mask_AP50.

        Damaged images are left out of them; `eval_damaged` is their number, where there are any.

        Args:
            params: of the detector, on the devices.

        Raises:
            EvaluationStopped: a signal arrived.
        """
        results: list[dict[str, Any]] = []
        left_out: set[int] = set()
        batches = eval_scenes(
            self._source,
            self._data,
            batch_size=self._batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        try:
            for number, batch in enumerate(batches):
                if interrupted():
                    raise EvaluationStopped
                reached()
                original = batch.pop("original")
                found = self._detect(params, meshes.put_batch(self._mesh, batch))
                sizes = batch["size"]
                if jax.process_count() > 1:
                    sizes, original = _of_all((sizes, original))
                if is_main():
                    found = jax.device_get(found)
                    first = number * self._batch
                    left_out |= {first + int(row) for row in np.flatnonzero(original[:, 0] == 0)}
                    results += self._results(first, found, sizes, original)
            batches.note_others(union)
        finally:
            batches.close()
        numbers, per_class = from_main(self._measured(results, left_out) if is_main() else ({}, {}))
        self.per_class = per_class
        return numbers

    def _results(
        self, first: int, found: Detections, sizes: np.ndarray, original: np.ndarray
    ) -> list[dict[str, Any]]:
        """The detections of a batch in COCO's format, scene `first` being its first."""
        results = []
        for row in range(min(len(sizes), len(self._source) - first)):
            if not original[row].all():  # damaged
                continue
            height, width = (int(n) for n in original[row])
            own = image_detections(found, row, sizes[row], (height, width))
            masks = whole_masks(own, height, width)
            ids = [self._source.categories[c] for c in own.classes]
            image_id = self._source.image_id(first + row)
            results += coco_results(image_id, own.boxes, own.scores, ids, masks)
            if first + row < self._count:
                image = self._source.read(first + row).image
                self.pictures[first + row] = drawn(image, own, masks, self._source.class_names)
        return results

    def _measured(
        self, results: list[dict[str, Any]], left_out: Collection[int]
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        require(len(left_out) < len(self._source), "none of the test images can be decoded")
        truth = without_images(self._truth, {self._source.image_id(i) for i in left_out})
        numbers: dict[str, float] = {"eval_damaged": len(left_out)} if left_out else {}
        per_class: dict[str, dict[str, float]] = {}
        names = dict(zip(self._source.categories, self._source.class_names, strict=True))
        for kind, title in TITLES.items():
            found = evaluate_coco(truth, results, kind)
            numbers |= {f"eval_{title}_{name}": value for name, value in found.stats.items()}
            per_class[title] = {names[id]: value for id, value in found.per_class.items()}
        return numbers, per_class

    def save_pictures(self, directory: Path) -> None:
        """Writes the pictures of the last call to a job's directory."""
        folder = directory / PICTURES
        make_directory(folder)
        for number, picture in self.pictures.items():
            _save(folder / f"{number}.png", picture)


def _save(path: Path, picture: Image.Image) -> None:
    content = io.BytesIO()
    picture.save(content, "png")
    write_bytes(path, content.getvalue())


def _of_all(arrays: Any) -> Any:
    """The rows of all processes, in their order."""
    return multihost_utils.process_allgather(arrays, tiled=True)


def whole_scene_masks(scene: Scene) -> np.ndarray:
    """The masks of a scene's objects, (G, H, W) bool."""
    masks = [bitmap(mask, *scene.size) for mask in scene.masks]
    return np.stack(masks) if masks else np.zeros((0, *scene.size), bool)


def image_detections(
    found: Detections, row: int, size: np.ndarray, original: tuple[int, int]
) -> ImageDetections:
    """The detections of one image of a batch, boxes in the pixels of the image before resizing.

    Args:
        found: of the batch, on the host.
        row: of the image.
        size: height and width in the batch.
        original: height and width before.
    """
    factors = np.tile(np.array(original[::-1]) / size[::-1], 2)
    limits = np.tile(np.array(original[::-1], np.float64), 2)
    boxes = np.clip(np.asarray(found.boxes[row], np.float64) * factors, 0, limits)
    kept = np.asarray(found.valid[row]) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    fields = (boxes.astype(np.float32), found.scores[row], found.classes[row], found.masks[row])
    return ImageDetections(*(np.asarray(field)[kept] for field in fields))


def measure_detector(
    run: Run, phase: DetectionPhase, program: DetectionProgram, frozen: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of a finished detector; pictures go to the directory of the job eval.

    Args:
        run: the run.
        phase: whose network it is.
        program: of the phase.
        frozen: {STAGE: {"params", "fixed"}}.
    """
    evaluator = DetectionEvaluator(run, phase, program)
    metrics: dict[str, Any] = dict(evaluator(frozen[STAGE]["params"]))
    if is_main():
        evaluator.save_pictures(run.directory("eval") / phase.job)
    return metrics | {"per_class": evaluator.per_class}


def said(metrics: Mapping[str, Any]) -> str:
    """The main numbers, for people."""
    numbers = [
        f"{title} AP {metrics[f'eval_{title}_AP']:.4f} AP50 {metrics[f'eval_{title}_AP50']:.4f}"
        for title in TITLES.values()
    ]
    if damaged := metrics.get("eval_damaged"):
        numbers.append(f"without {damaged} damaged images")
    return ", ".join(numbers)
