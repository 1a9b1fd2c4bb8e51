"""Converts our weights into the files of the published layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.conversion import safetensors_file, torch_file, torch_layouts
from m2mkd_jax.conversion.name_tables import name_table
from m2mkd_jax.conversion.names import Entry, array_at, as_tuple, write_layout
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.conversion.stated_fields import (
    NORMALISATION,
    STATED,
    unseen_fields,
    unseen_normalisation,
)
from m2mkd_jax.conversion.torch_layouts import FileLayout, Layout
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import registry, variants
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec

Arrays = dict[str, np.ndarray]


def convert_to_torch(
    source: Path,
    description: Mapping[str, Any],
    trees: Mapping[str, Mapping[str, Any]],
    target: Path,
) -> Report:
    """Writes trained or converted weights as the torch file or files they came from.

    Weights that were not converted from torch get the published layout: `model`, with
    `model_stages` for a network in stages; a single teacher module becomes a `block_state_dict`. A
    student's codes and states, which the published files lack, are written beside `model`.

    Args:
        source: path of the weights, for the report.
        description: of the weights.
        trees: by name, read one by one.
        target: ends in .pth, .pt or .safetensors; of weights that came as a directory of modules,
            the new directory.

    Returns:
        What was written.

    Raises:
        UserError: torch is missing, the target cannot be written, or is no place for these weights.
    """
    names = registry.in_order(list(trees))
    layout = description.get("torch")
    files = layout["files"] if layout is not None else {"": {}}
    if "" in files and target.suffix not in torch_layouts.SUFFIXES:
        raise UserError(f"{target} must end in {', '.join(torch_layouts.SUFFIXES)}")
    if "" not in files and target.suffix in torch_layouts.SUFFIXES:
        raise UserError(f"{target}: these weights came as {len(files)} files; give a directory")
    grouped = description["kind"] == "nac_student" and len(names) > 1
    report = Report(str(source), {}, {})
    arrays, fixed = _named_arrays(description, trees, names, grouped, report)
    unseen = unseen_fields(description, fresh=layout is None)
    normalisation = unseen_normalisation(description)
    if layout is None:
        layout = _published_layout(description, list(arrays), grouped)
    if "" in layout["files"]:
        stated = {NORMALISATION: normalisation} if normalisation else {}
        file = _with_fields(layout["files"][""], unseen | stated)
        _write_file(file, layout["depths"], arrays, fixed, target)
    else:
        _write_directory(layout, arrays, fixed, target)
        if unseen:
            report.notes.append(f"not in these files, to be given by --arch: {unseen}")
        if normalisation:
            report.notes.append(normalisation_note(normalisation))
    return report


def normalisation_note(normalisation: Mapping[str, Any]) -> str:
    """What to say of mean and std that the files to which weights are written do not hold."""
    return (
        f"not in these files: mean {list(normalisation['mean'])}, std {list(normalisation['std'])} "
        "of the pixels; to be given by --mean and --std"
    )


def _with_fields(file: FileLayout, fields: Mapping[str, Any]) -> FileLayout:
    """The layout of a file that states these fields, if there are any, and no others."""
    entries = {name: value for name, value in file["entries"].items() if name != STATED}
    if fields:
        entries[STATED] = json.dumps(fields, sort_keys=True)
    return {**file, "entries": entries}


def _named_arrays(
    description: Mapping[str, Any],
    trees: Mapping[str, Mapping[str, Any]],
    names: list[str],
    grouped: bool,
    report: Report,
) -> tuple[Arrays, Arrays]:
    """All tensors by canonical name, and all codes and states.

    Args:
        description: of the weights.
        trees: by name.
        names: of the trees, in order.
        grouped: whether the names start with that of the tree, as in a set of students.
        report: gets one row per tensor.
    """
    arrays: Arrays = {}
    fixed: Arrays = {}
    spec = description["spec"]
    patch = spec.get("vit", spec).get("patch")
    dtypes = (description.get("torch") or {}).get("dtypes", {})
    for name in names:
        tree, group = trees[name], f"{name}/" if grouped else ""
        fixed |= {group + key: np.asarray(value) for key, value in tree.get("fixed", {}).items()}
        for entry in _name_table(description, name):
            torch_name = group + entry.torch
            value = np.asarray(array_at(tree["params"], entry.path))[as_tuple(entry.index)]
            value = write_layout(value, entry, patch)
            arrays[torch_name] = np.array(value, dtypes.get(torch_name, "float32"), order="C")
            report.wrote(entry, torch_name, arrays[torch_name], name)
    return arrays, fixed


def _name_table(description: Mapping[str, Any], tree: str) -> list[Entry]:
    """`name_table`; of a single V-MoE student, whose blocks, stitches and experts count from 0."""
    if description["kind"] != "vmoe" or "module" not in description:
        return name_table(description, tree)
    index, depths = description["module"], description["depths"]
    start, end = sum(depths[:index]), sum(depths[: index + 1])
    spec = dict(description["spec"])
    for field in ("moe_pos", "pre_stitch_pos", "post_stitch_pos"):
        spec[field] = [block - start for block in spec[field] if start <= block < end]
    first, last = registry.ends(description, index)
    alone = {"kind": "vmoe", "spec": spec, "depths": [depths[index]], "first": first, "last": last}
    return name_table(alone, "student_0")


def _published_layout(description: Mapping[str, Any], names: list[str], grouped: bool) -> Layout:
    """The layout for weights that were not converted from torch.

    Args:
        description: of the weights.
        names: canonical names of the tensors.
        grouped: whether the weights are a set of students.

    Raises:
        UserError: they are; the published layout has one file per student.
    """
    if grouped:
        raise UserError("these students were never in torch files; convert them one by one")
    spec = registry.spec_of(description)
    depths, index = description.get("depths"), description.get("module")
    if isinstance(spec, ViTSpec) and index is not None:
        container = torch_layouts.stage_containers(names, description["depths"])[index]
        container = {**container, "keys": ["block_state_dict"]}
        entries = {
            "model_name": variants.name_of(spec),
            "block_index": index,
            "divided_depths": depths,
        }
        return {"files": {"": {"containers": [container], "entries": entries}}, "depths": depths}
    if isinstance(spec, VMoESpec) and index is not None:
        depths = [description["depths"][index]]
    return torch_layouts.published_layout(names, depths)


def _write_directory(layout: Layout, arrays: Arrays, fixed: Arrays, target: Path) -> None:
    """Writes the files of a set of modules; the directory appears complete or not at all.

    Raises:
        UserError: a file cannot be written, or would be outside the directory.
    """
    tmp = target.with_name(f".{target.name}.writing")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        for name, file in layout["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{target}: a file of these weights would be {name}, outside")
            group = file.get("group", "")
            own = {k.removeprefix(group): v for k, v in fixed.items() if k.startswith(group)}
            depths = file.get("depths", layout["depths"])
            _write_file(file, depths, arrays, own, tmp / name, group, layout["depths"])
        tmp.rename(target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _write_file(
    layout: FileLayout,
    depths: list[int] | None,
    arrays: Arrays,
    fixed: Arrays,
    path: Path,
    group: str = "",
    all_depths: list[int] | None = None,
) -> None:
    """Writes one file.

    Args:
        layout: of the file.
        depths: blocks of each stage in it.
        arrays: of the network, or of all students, by canonical name.
        fixed: codes and states of this file.
        path: where to.
        group: what the names in `arrays` of this file's tensors start with, in a set of students.
        all_depths: blocks of all students.

    Raises:
        UserError: it cannot be written.
    """
    stacked: Arrays = {}

    def weights(container: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        for name in container["names"]:
            ours = group + torch_layouts.canonical_name(name, container["module"], depths)
            if group and ours not in arrays:  # the students became one network
                ours = torch_layouts.assembled_name(ours, all_depths or [])
            if ours in arrays:
                yield container["prefix"] + name, arrays[ours]
            elif not torch_layouts.is_stitch(ours):  # a dropped stitch cannot be restored
                if ours not in stacked:
                    stacked[ours] = np.concatenate(_single_experts(ours, arrays))
                yield container["prefix"] + name, stacked[ours]

    entries, containers = layout["entries"], layout["containers"]
    if path.suffix == safetensors_file.SUFFIX:
        # The format has no containers; the first one has the names of the whole network.
        metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in entries.items()}
        flat = [*weights(containers[0]), *fixed.items()]
        # Of two names of a tensor, other programs know the one without stages.
        flat.sort(key=lambda entry: entry[0].startswith("stages."))
        safetensors_file.write_safetensors(path, flat, metadata)
        return
    content: dict[str, Any] = {}
    for container in containers:
        keys, tensors = container["keys"], dict(weights(container))
        if not keys:
            content |= tensors
        elif len(keys) == 1:
            content[keys[0]] = tensors
        else:
            content.setdefault(keys[0], []).append(tensors)
    torch_file.write_torch(path, content | entries | fixed)


def _single_experts(name: str, arrays: Arrays) -> list[np.ndarray]:
    """The tensors of all experts, in the tensor of all of them that older FastMoE releases write.

    Args:
        name: of the tensor of all experts.
        arrays: by canonical name.
    """
    found: list[np.ndarray] = []
    while (single := torch_layouts.expert_names(name, len(found) + 1)[-1]) in arrays:
        found.append(arrays[single])
    return found
