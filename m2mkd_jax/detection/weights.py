"""Converts a detector's weights, or its backbone's, between torch files and ours.

A file is a state dict in the published names, by itself or under "model", of a whole detector or of
its backbone; the V-MoE's blocks may be in it once more by stage. A classifier (V-MoE or ViT) is
converted into the backbone; the rest is then drawn from a seed.

Source: docs/detection.md#checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2mkd_jax.conversion import safetensors_file, torch_file, torch_layouts
from m2mkd_jax.conversion.converted import IMAGENET, Converted, Tree, Trees
from m2mkd_jax.conversion.from_torch import check_tensors, filled
from m2mkd_jax.conversion.lazy_tensor import Tensor, same_values
from m2mkd_jax.conversion.names import Entry, array_at, as_tuple, write_layout
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.detection.arch import Fields, infer_spec, read_fields
from m2mkd_jax.detection.detector import builder
from m2mkd_jax.detection.names import BACKBONE, HEADS, names
from m2mkd_jax.detection.spec import Spec, backbone_of, describe, spec_of
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import at_home
from m2mkd_jax.models import chain

# The one tree of the weights.
TREE = "detector"
_STAGE = re.compile(r"net\.stages\.(\d{1,6})\.(.+)$")
_UNUSED = {
    "cls_token": "class token: a detector has none",
    "norm.": "final norm: a detector has none",
    "head.": "classifier: a detector has none",
    "fc_norm.": "final norm: a detector has none",
    "pixel_mean": "normalisation; it is a field",
    "pixel_std": "normalisation; it is a field",
    "proposal_generator.anchor_generator.": "anchors, which are computed",
}


def read_arch_file(text: str) -> dict[str, Any] | None:
    """The content of an --arch file of a detector; None if `text` names anything else.

    Other kinds, and files that cannot be read, are left to conversion/arch_flag.py.
    """
    path = at_home(text)
    if path.suffix != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(content, dict) and str(content.get("kind", "")).startswith("detector")
    return content if known else None


def convert_detector(
    path: Path, content: Mapping[str, Any], where: str, seed: int = 0
) -> Converted:
    """Converts torch weights.

    Args:
        path: .pth, .pt or .safetensors file.
        content: of the --arch file.
        where: that file, for messages.
        seed: for what a classifier's file does not have.

    Raises:
        UserError: the file cannot be read, is of no such network, contradicts the fields, or a
            tensor is missing, unknown or of another shape.
    """
    kind = content["kind"]
    if kind not in ("detector", "detector_backbone"):
        raise UserError(f"--arch: {where}: kind {kind!r}; detector or detector_backbone")
    given = read_fields(content, where)
    if path.is_dir() or path.suffix not in torch_layouts.SUFFIXES:
        raise UserError(f"{path}: a detector is one file in {', '.join(torch_layouts.SUFFIXES)}")
    contents = torch_layouts.read_file(path)
    (container, *_), layout = contents.containers, torch_layouts.file_layout(contents)
    report = Report(str(path), dict(contents.ignored), {})
    classifier = not any(
        name.removeprefix(BACKBONE).startswith("net.") for name in container.tensors
    )
    tensors = _tensors(container.tensors, given, classifier, report)
    tensors = _without_unused(tensors, classifier, report)
    spec = infer_spec(kind, {name: t.shape for name, t in tensors.items()}, given, str(path))
    tables = names(spec)
    needed = [e.torch for e in tables if not classifier or _is_of_classifier(e.torch)]
    if missing := [name for name in needed if name not in tensors]:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f'{path}: tensor "{missing[0]}" is missing{more}')
    used = [entry for entry in tables if entry.torch in tensors]
    _check_known(tensors, {entry.torch for entry in tables}, kind, path, report)
    description = describe(spec)
    given_norm = {"mean": given.get("pixel_mean"), "std": given.get("pixel_std")}
    description["normalisation"] = {
        key: [n / 255 for n in value] if value else IMAGENET[key]
        for key, value in given_norm.items()
    }
    if not classifier:
        dtypes = {name: t.dtype for name, t in tensors.items() if t.dtype != "float32"}
        description["torch"] = {"file": layout, "dtypes": dtypes}
    tree = _tree(spec, used, tensors, path, seed, report)
    return Converted(description, Trees({TREE: lambda: tree}), report)


def _is_of_classifier(name: str) -> bool:
    """Whether a classifier's file has the tensor: the transformer without relative positions."""
    return name.startswith("net.") and ".attn.rel_pos_" not in name


def _tensors(
    stored: Mapping[str, Tensor], given: Fields, classifier: bool, report: Report
) -> dict[str, Tensor]:
    """The tensors under the names of names.py, each once; raises UserError if two copies differ."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        ours = canonical_name(name, given.get("depths"))
        if classifier:
            ours = canonical_name(f"net.{name}", given.get("depths"))
        known = found.setdefault(ours, tensor)
        if known is not tensor and not same_values(known, tensor):
            first = report.aliases[ours][0]
            raise UserError(f'{report.source}: "{first}" and "{name}" are one tensor, and differ')
        report.aliases.setdefault(ours, []).append(name)
    return found


def canonical_name(name: str, depths: list[int] | None) -> str:
    """A tensor's name in names.py; its names by stage need the blocks of each stage."""
    name = name.removeprefix(BACKBONE)
    stage = _STAGE.match(name)
    if not stage:
        return name
    inside = torch_layouts.BLOCK.match(stage[2])
    if not inside:
        return f"net.{stage[2]}"
    number = int(stage[1])
    if depths is None or number >= len(depths):
        raise UserError(f'"{name}" is named by stage: --arch must say divided_depths')
    return f"net.blocks.{int(inside[1]) + sum(depths[:number])}.{inside[2]}"


def _without_unused(
    tensors: dict[str, Tensor], classifier: bool, report: Report
) -> dict[str, Tensor]:
    """The tensors that have a place; what is left out is reported, with its reason."""
    kept = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("net.") if classifier else name
        reason = next((why for start, why in _UNUSED.items() if own.startswith(start)), "")
        if reason:
            report.ignore(name, reason)
        else:
            kept[name] = tensor
    moe = any(".moe." in name for name in tensors)
    rows = kept.get("net.pos_embed")
    if classifier and moe and rows is not None and len(rows.shape) == 3:
        count = rows.shape[1]
        if math.isqrt(count) ** 2 != count:
            kept["net.pos_embed"] = dataclasses.replace(
                rows,
                shape=(1, count - 1, rows.shape[2]),
                read=lambda: rows.read()[:, 1:],
                mapped=False,
            )
            report.notes.append("pos_embed: the class token's row is left out")
    return kept


def _check_known(
    tensors: Mapping[str, Tensor], known: set[str], kind: str, path: Path, report: Report
) -> None:
    """Raises UserError if a tensor has no place in the network."""
    unknown = [name for name in tensors if name not in known]
    if not unknown:
        return
    first = unknown[0]
    hint = ""
    if kind == "detector_backbone" and first.startswith(HEADS):
        hint = ': it is a whole detector; say "kind": "detector"'
    elif ".pre_stitch." in first or ".post_stitch." in first:
        hint = ": a stitch that --arch does not name"
    more = f", nor have {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise UserError(
        f'{path}: tensor "{report.shown(first)}" has no place in this network{more}{hint}'
    )


def _tree(
    spec: Spec,
    used: list[Entry],
    tensors: Mapping[str, Tensor],
    path: Path,
    seed: int,
    report: Report,
) -> Tree:
    """The parameters; arrays without tensors are drawn.

    Raises:
        UserError: a tensor is of another shape, or cannot be used.
    """
    shapes = chain.abstract(builder(spec)).params
    check_tensors(used, tensors, shapes, path, complete=len(used) == len(names(spec)))
    start = None
    if len(used) != len(names(spec)):
        start = jax.tree.map(np.array, chain.initialise(builder(spec), jax.random.key(seed)).params)
        fresh = {entry.path[0] for entry in names(spec)} - {entry.path[0] for entry in used}
        report.notes.append(f"fresh, from seed {seed}: {', '.join(sorted(fresh))}")
    return {"params": filled(used, tensors, shapes, TREE, report, start)}


def write_detector(
    source: Path, description: Mapping[str, Any], tree: Mapping[str, Any], target: Path
) -> Report:
    """Writes weights as a torch or safetensors file, in the layout that they came in.

    Weights that were not converted from torch get the published layout: all names, those of the
    blocks by stage too.

    Args:
        source: path of the weights, for the report.
        description: of the weights.
        tree: the parameters.
        target: ends in .pth, .pt or .safetensors.

    Returns:
        What was written.

    Raises:
        UserError: torch is missing, or the target cannot be written.
    """
    if target.suffix not in torch_layouts.SUFFIXES:
        raise UserError(f"{target} must end in {', '.join(torch_layouts.SUFFIXES)}")
    spec, report = spec_of(description), Report(str(source), {}, {})
    stored = description.get("torch") or {}
    dtypes, arrays = stored.get("dtypes", {}), {}
    patch, depths = backbone_of(spec).vmoe.vit.patch, list(backbone_of(spec).depths)
    for entry in names(spec):
        value = np.asarray(array_at(tree, entry.path))[as_tuple(entry.index)]
        value = write_layout(value, entry, patch)
        arrays[entry.torch] = np.array(value, dtypes.get(entry.torch, "float32"), order="C")
        report.wrote(entry, entry.torch, arrays[entry.torch], TREE)
    container = {"keys": ["model"], "prefix": "", "names": _published(spec, list(arrays))}
    layout = stored.get("file") or {"containers": [container], "entries": {}}
    (container, *_) = layout["containers"]
    found = {
        container["prefix"] + name: arrays[ours]
        for name in container["names"]
        if (ours := canonical_name(name, depths)) in arrays
    }
    if target.suffix == safetensors_file.SUFFIX:
        safetensors_file.write_safetensors(target, list(found.items()), {"format": "pt"})
    else:
        content = {container["keys"][0]: found} if container["keys"] else found
        torch_file.write_torch(target, content | layout["entries"])
    return report


def _published(spec: Spec, own: list[str]) -> list[str]:
    """The names of the published file: of a detector with "backbone.", of a V-MoE by stage too."""
    backbone = backbone_of(spec)
    prefix = BACKBONE if spec is not backbone else ""
    result, ends = [], np.cumsum(backbone.depths)
    for name in own:
        result.append(name if name.startswith(HEADS) else prefix + name)
        if not backbone.vmoe.moe_pos or not name.startswith("net."):
            continue
        stage, inside = 0, name.removeprefix("net.")
        if block := torch_layouts.BLOCK.match(inside):
            stage = int(np.searchsorted(ends, int(block[1]), side="right"))
            number = int(block[1]) - int(ends[stage]) + backbone.depths[stage]
            inside = f"blocks.{number}.{block[2]}"
        result.append(f"{prefix}net.stages.{stage}.{inside}")
    return result
