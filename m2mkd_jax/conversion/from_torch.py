"""Converts weights from the published layouts into our trees.

A tree is filled tensor by tensor, each dropped from memory once it is copied, and written before
the next tree is begun, so that memory stays near the size of the largest stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2mkd_jax.conversion import google_npz
from m2mkd_jax.conversion.arch_flag import check_fields, read_arch
from m2mkd_jax.conversion.assemble_nac import assembled_nac
from m2mkd_jax.conversion.converted import IMAGENET, Converted, Tree, Trees
from m2mkd_jax.conversion.foreign_vit import adapt_foreign_vit
from m2mkd_jax.conversion.infer import infer_description
from m2mkd_jax.conversion.lazy_tensor import Tensor, same_values
from m2mkd_jax.conversion.name_tables import name_table
from m2mkd_jax.conversion.names import Entry, array_at, as_tuple, read_layout
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.conversion.resize_positions import resize_positions
from m2mkd_jax.conversion.stated_fields import stated_fields, stated_normalisation
from m2mkd_jax.conversion.torch_layouts import assembled_name, is_stitch
from m2mkd_jax.conversion.torch_weights import TorchWeights, read_torch_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, registry
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.nac.spec import NACSpec


def convert_from_torch(path: Path, arch: str = "", image_size: int = 0, seed: int = 0) -> Converted:
    """Converts torch weights. The files are opened; their values are read when trees are made.

    Args:
        path: .pth, .pt or .safetensors file, a directory of such files, or Google's .npz or .index.
        arch: the value of `--arch`; "" infers the network from the weights alone.
        image_size: resize the position embedding for images of this size; 0: the size that `arch`
            states or the weights show.
        seed: for the arrays of a NAC that its students do not have, and for a student's codes and
            states if they are not in the file (in the published files they are not).

    Raises:
        UserError: the files cannot be read or understood (`read_torch_weights`), `arch` makes no
            sense (`read_arch`) or contradicts them (`infer_description`), or a tensor is missing,
            unknown, or of another shape than the network's.
    """
    weights = read_weights(path)
    blocks = sum(weights.depths) if weights.depths else None
    given = read_arch(arch, weights.kind, blocks) if arch else {}
    if image_size:
        given = given | check_fields({"image_size": image_size}, "--image_size")
    return convert_torch_weights(weights, given, path, seed)


def read_weights(path: Path) -> TorchWeights:
    """Opens torch or safetensors files, or one of Google's. Raises UserError as they do."""
    if path.suffix in google_npz.SUFFIXES and path.is_file():
        return google_npz.read_google(path)
    return read_torch_weights(path)


def convert_torch_weights(
    weights: TorchWeights, given: Mapping[str, Any], path: Path, seed: int = 0
) -> Converted:
    """`convert_from_torch` for opened weights.

    Args:
        weights: changed in place where a tensor has no place in the network.
        given: the fields of `--arch`.
        path: of the weights, for messages.
        seed: see `convert_from_torch`.

    Raises:
        UserError: see `convert_from_torch`.
    """
    report = Report(str(path), dict(weights.ignored), dict(weights.aliases))
    if weights.kind == "vit":
        adapt_foreign_vit(weights, given, seed, report)
    given = {**stated_fields(weights.entries, path), **given}
    google = path.suffix in google_npz.SUFFIXES
    if google:
        given = {"heads": weights.entries["heads"], **given}
    description, notes = infer_description(weights, given, str(path))
    report.notes += notes
    tensors = _network_tensors(weights, description, report)
    if weights.kind in ("vit", "vmoe"):
        _resize_positions(tensors, description, report)
    usual = google_npz.NORMALISATION if google else {}
    known = stated_normalisation(weights.entries, path) or usual
    description["normalisation"] = dict(known or IMAGENET)
    if google and weights.kind == "vmoe":
        description["spec"]["router"] = "vmoe"
    # All trees are float32; the types that differ are kept for the conversion back.
    dtypes = {name: t.dtype for name, t in tensors.items() if t.dtype != "float32"}
    description["torch"] = weights.layout | {"dtypes": dtypes}
    makers = _makers(weights, description, tensors, path, seed, report)
    if (weights.kind, given.get("kind")) == ("nac_student", "nac"):
        found = assembled_nac(Trees(makers), description, given, path, seed, report)
    else:
        found = Converted(description, Trees(makers), report)
    return dataclasses.replace(found, assumed_normalisation=not known)


def _network_tensors(
    weights: TorchWeights, description: Mapping[str, Any], report: Report
) -> dict[str, Tensor]:
    """The tensors under the names of the network's tables; stitches that are dropped are left out.

    Args:
        weights: opened weights.
        description: of the network.
        report: gets the names and what is ignored.
    """
    tensors = dict(weights.tensors)
    if weights.kind != "vmoe":
        return tensors
    if weights.from_directory:  # the students of a directory become the whole network
        depths = weights.depths or []
        renamed = {name: assembled_name(name, depths) for name in tensors}
        tensors = {renamed[name]: tensor for name, tensor in tensors.items()}
        report.rename(renamed)
    spec = description["spec"]
    kept = set(spec["pre_stitch_pos"]), set(spec["post_stitch_pos"])
    for name in list(tensors):
        for word, blocks in zip((".pre_stitch.", ".post_stitch."), kept, strict=True):
            if is_stitch(name) and word in name and int(name.split(".")[1]) not in blocks:
                report.ignore(name, "stitch, dropped")
                del tensors[name]
    return tensors


def _resize_positions(
    tensors: dict[str, Tensor], description: Mapping[str, Any], report: Report
) -> None:
    """Resizes the position embedding in `tensors` if the network has another image size."""
    spec = registry.spec_of(description)
    vit = spec.vit if isinstance(spec, VMoESpec) else spec
    embedding = tensors.get("pos_embed")
    if isinstance(vit, NACSpec) or embedding is None or len(embedding.shape) != 3:
        return
    if embedding.shape[1] == vit.tokens:
        return
    before, side = embedding, vit.image_size // vit.patch

    def read() -> np.ndarray:
        # `array` refuses NaN and infinite values before they spread over all positions.
        try:
            return resize_positions(before.array().astype(np.float32), side).astype(before.dtype)
        except MemoryError:
            raise UserError(
                f"pos_embed: the memory does not suffice for {side} x {side} positions of images "
                f"of {vit.image_size}; give a smaller --image_size"
            ) from None

    shape = (1, vit.tokens, before.shape[2])
    tensors["pos_embed"] = dataclasses.replace(before, shape=shape, read=read, mapped=False)
    report.notes.append(
        f"pos_embed: {before.shape[1] - 1} positions resized to {vit.tokens - 1}, bicubic"
    )


def _makers(
    weights: TorchWeights,
    description: dict[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    seed: int,
    report: Report,
) -> dict[str, Callable[[], Tree]]:
    """For each tree of the network a function that makes it.

    Args:
        weights: opened weights.
        description: of the network; gets the number of a student's `states`.
        tensors: by the names of the network's tables.
        path: of the weights, for messages.
        seed: for codes and states that are not in the file.
        report: gets one row per tensor, when a tree is made.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape than the network's.
    """
    makers: dict[str, Callable[[], Tree]] = {}
    known: set[str] = set()
    grouped = weights.kind == "nac_student" and weights.from_directory
    for name in registry.tree_names(description):
        stage = chain.abstract(registry.builder(description, name))
        entries = name_table(description, name)
        group = f"{name}/" if grouped else ""
        entries = [dataclasses.replace(e, torch=group + e.torch) for e in entries]
        known |= {entry.torch for entry in entries}
        check_tensors(entries, tensors, stage.params, path)
        stored = {
            key: weights.fixed[group + key]
            for key in ("codes", "states")
            if group + key in weights.fixed
        }
        fixed = _fixed_arrays(stage.fixed, stored, name, seed, report)
        if "states" in fixed:
            description["states"] = int(fixed["states"].shape[0])
        makers[name] = _maker(name, entries, tensors, stage.params, fixed, report)
    unknown = [name for name in tensors if name not in known]
    if unknown:
        more = f", nor have {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f'{path}: tensor "{report.shown(unknown[0])}" has no place in this network{more}'
        )
    return makers


def _maker(
    name: str,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    shapes: Tree,
    fixed: Tree,
    report: Report,
) -> Callable[[], Tree]:
    def make() -> Tree:
        tree = {"params": filled(entries, tensors, shapes, name, report)}
        return tree | ({"fixed": fixed} if fixed else {})

    return make


def check_tensors(
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    params: Tree,
    path: Path,
    *,
    complete: bool = True,
) -> None:
    """Checks that every array has its tensors, and that their shapes fit.

    Args:
        entries: the table of a tree.
        tensors: by the names of the table.
        params: the tree's arrays, or their shapes.
        path: of the weights, for messages.
        complete: whether the table fills all arrays.

    Raises:
        UserError: a tensor is missing or of another shape, or tensors that share an array differ.
    """
    missing = [entry.torch for entry in entries if entry.torch not in tensors]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        near = next((name for name in tensors if name.endswith(f".{missing[0]}")), "")
        hint = f'; there is "{near}"' if near else ""
        raise UserError(f'{path}: tensor "{missing[0]}" is missing{more}{hint}')
    seen: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for entry in entries:
        tensor, index = tensors[entry.torch], as_tuple(entry.index)
        expected = array_at(params, entry.path).shape[len(index) :]
        if _shape_read(tensor.shape, entry.layout) != expected:
            raise UserError(
                f'{path}: tensor "{entry.torch}" has shape {tensor.shape}; in this network '
                f"{'/'.join(entry.path)} is {expected}"
            )
        first = seen.setdefault(entry.path, {}).setdefault(index, entry.torch)
        if first != entry.torch and not same_values(tensors[first], tensor):
            raise UserError(f'{path}: "{first}" and "{entry.torch}" are shared here, and differ')
    # The tables themselves leave no array unfilled.
    for array_path, indices in seen.items():
        shape = array_at(params, array_path).shape
        stacked = len(next(iter(indices)))
        assert len(indices) == int(np.prod(shape[:stacked])), array_path
    assert not complete or len(seen) == len(jax.tree.leaves(params))


def _shape_read(shape: tuple[int, ...], layout: str) -> tuple[int, ...] | None:
    """The shape of a tensor in our layout; None if its rank does not fit."""
    try:
        return read_layout(np.broadcast_to(np.float32(0), shape), layout).shape
    except (ValueError, IndexError):
        return None


def filled(
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    shapes: Tree,
    tree: str,
    report: Report,
    start: Tree | None = None,
) -> Tree:
    """The parameters of a tree.

    Args:
        entries: its table.
        tensors: by the names of the table.
        shapes: the tree's shapes.
        tree: its name, for the report.
        report: gets one row per tensor.
        start: values of the arrays that the table does not fill; changed in place.

    Raises:
        UserError: a tensor cannot be used (`Tensor.array`).
    """
    params = start or jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    for entry in entries:
        tensor = tensors[entry.torch]
        try:
            array = tensor.array()
        except UserError as error:
            file = report.shown(entry.torch).rpartition(": ")[0]  # "" unless there are several
            raise UserError(f"{report.source}: {file and file + ': '}{error}") from None
        stacked = array_at(params, entry.path)
        stacked[as_tuple(entry.index)] = read_layout(array, entry.layout)
        report.used(entry, tensor, tree)
        tensor.release(array)
    return params


def _fixed_arrays(
    shapes: Tree, stored: Mapping[str, Tensor], name: str, seed: int, report: Report
) -> Tree:
    """A student's codes and states.

    Args:
        shapes: of the arrays, by name.
        stored: those that are in the file; the others are drawn.
        name: of the student's tree.
        seed: of what is drawn.
        report: gets a note on each array.

    Raises:
        UserError: an array of the file has another shape.
    """
    fixed = {}
    for i, (key, shape) in enumerate(sorted(shapes.items())):
        if key in stored:
            fixed[key] = np.array(stored[key].array(), np.float32)
            report.notes.append(f"{name}/{key}: from the file")
            if fixed[key].shape[1:] != shape.shape[1:]:
                raise UserError(
                    f'{report.source}: "{key}" has shape {fixed[key].shape}, not {shape.shape}'
                )
            continue
        generator = np.random.default_rng([seed, i, registry.index_of(name)])
        fixed[key] = generator.standard_normal(shape.shape, np.float32)
        report.notes.append(f"{name}/{key}: not in the file; drawn from seed {seed}")
    return fixed
