"""Fixtures n_detection_* of the original, as networks of ours."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from m2mkd_jax.conversion.names import Entry
from m2mkd_jax.detection import arch, detector, names
from m2mkd_jax.detection.rpn import Objects
from m2mkd_jax.models import chain
from tests.support import FIXTURES, arrays, assert_close, facts
from tests.torch_arrays import arrays_from_torch


@dataclass
class Fixture:
    """A fixture's network, ours, with its weights.

    Attributes:
        spec, graph, params: of our network.
        table: of names.
        io: recorded arrays.
        meta: recorded facts.
    """

    spec: Any
    graph: Any
    params: dict[str, Any]
    table: list[Entry]
    io: dict[str, np.ndarray]
    meta: dict[str, Any]

    def network(self, params: Any) -> Any:
        return chain.merge(self.graph, params, {})


def state_dict(name: str) -> dict[str, np.ndarray]:
    """The tensors of model.pth, each once."""
    tensors = torch.load(FIXTURES / name / "model.pth", weights_only=True)
    tensors = {key.removeprefix("backbone."): value.numpy() for key, value in tensors.items()}
    return {key: value for key, value in tensors.items() if not key.startswith("net.stages.")}


@functools.cache
def fixture(name: str, kind: str) -> Fixture:
    tensors, meta = state_dict(name), facts(f"{name}/meta.json")
    given = arch.read_fields(meta["kwargs"], name)
    spec = arch.infer_spec(kind, {key: t.shape for key, t in tensors.items()}, given, name)
    table = names.names(spec)
    params = arrays_from_torch(table, tensors)
    part = chain.abstract(detector.builder(spec))
    assert jax.tree.map(jnp.shape, part.params) == jax.tree.map(jnp.shape, params)
    return Fixture(spec, part.graph, params, table, arrays(f"{name}/io.npz"), meta)


def head_params(table: list[Entry], tensors: dict[str, np.ndarray], part: str) -> dict[str, Any]:
    """The tree of one part of a detector, whose tensors have no prefix in the file.

    Args:
        table: of a whole detector.
        tensors: by name, without the part's prefix.
        part: 'rpn' or 'heads'.
    """
    prefix = {"rpn": names.HEADS[0], "heads": names.HEADS[1]}[part]
    own = [entry for entry in table if entry.path[0] == part]
    return arrays_from_torch(own, {prefix + name: value for name, value in tensors.items()})[part]


def run_quickly(function: Any, *arguments: Any) -> Any:
    """Runs a function compiled without optimisation, which would take longer than all else."""
    return compiled(function)(*arguments)


def compiled(function: Any) -> Any:
    """A function compiled without optimisation."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def nchw(maps: Any) -> np.ndarray:
    return np.asarray(maps).transpose(0, 3, 1, 2)


def padded_objects(io: dict[str, np.ndarray], images: int, limit: int) -> Objects:
    """The objects of every image, padded to `limit`; their masks are given otherwise."""
    boxes = np.zeros((images, limit, 4), np.float32)
    classes = np.zeros((images, limit), np.int32)
    valid = np.zeros((images, limit), bool)
    for i in range(images):
        own = io[f"gt_boxes.{i}"]
        boxes[i, : len(own)], valid[i, : len(own)] = own, True
        if f"gt_classes.{i}" in io:
            classes[i, : len(own)] = io[f"gt_classes.{i}"]
    return Objects(*(jnp.asarray(a) for a in (boxes, classes, valid)))


def priority(count: int, *drawn: np.ndarray) -> np.ndarray:
    """Priorities with which the recorded samples are drawn, in their order."""
    result = np.full(count, 1e6, np.float32)
    for index in drawn:
        result[index] = np.arange(len(index))
    return result


def check_detections(found: Any, io: dict[str, np.ndarray], prefix: str) -> None:
    """Compares detections with recorded ones: number, class and order exactly."""
    for i in range(len(found.boxes)):
        own = np.asarray(found.valid[i])
        want = {k: io[f"{prefix}{k}.{i}"] for k in ("boxes", "scores", "classes", "masks28")}
        np.testing.assert_array_equal(found.classes[i][own], want["classes"])
        assert_close(found.boxes[i][own], want["boxes"], 1e-5, f"boxes {i}")
        assert_close(found.scores[i][own], want["scores"], 1e-5, f"scores {i}")
        # Pooled with boxes that are themselves within 1e-5 of an image's side.
        assert_close(found.masks[i][own], want["masks28"], 1e-4, f"masks {i}")
