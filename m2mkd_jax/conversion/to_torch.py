"""Our weights back into the files of the published torch_layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.conversion import safetensors_file, torch_file, torch_layouts
from m2mkd_jax.conversion.name_tables import leaf, place, table
from m2mkd_jax.conversion.names import write_layout
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import registry, variants

Arrays = dict[str, np.ndarray]


def to_torch(
    source: Path, description: Mapping[str, Any], trees: Mapping[str, dict], target: Path
) -> Report:
    """Writes trained or converted weights as the torch file or files they came from.

    Weights that never were in torch get the published layout: `model`, with `model_stages` for a
    network in stages; a lone teacher module becomes a `block_state_dict`. `target` ends in .pth,
    .pt or .safetensors; weights that came as a directory of modules go back into a new one. A
    student's codes and states, which the published files lack, stand beside `model`.

    Raises:
        UserError: torch is missing, the target cannot be written, or is no place for these weights.
    """
    names = registry.in_order(list(trees))
    layout = description.get("torch")
    files = (layout or {"files": {"": {}}})["files"]
    if "" in files and target.suffix not in torch_layouts.SUFFIXES:
        raise UserError(f"{target} must end in {', '.join(torch_layouts.SUFFIXES)}")
    if "" not in files and target.suffix in torch_layouts.SUFFIXES:
        raise UserError(f"{target}: these weights came as {len(files)} files; give a directory")
    grouped = description["kind"] == "nac_student" and len(names) > 1
    report = Report(str(source), {}, {})
    arrays, extra = _tensors(description, trees, names, grouped, report)
    if layout is None:
        layout = _published(description, list(arrays), grouped)
    if "" in layout["files"]:
        _write_file(layout["files"][""], layout["depths"], arrays, extra, target)
    else:
        _write_directory(layout, arrays, extra, target)
    return report


def _tensors(
    description: Mapping, trees: Mapping, names: list[str], grouped: bool, report: Report
) -> tuple[Arrays, Arrays]:
    """All tensors by canonical name, and all codes and states."""
    arrays: Arrays = {}
    extra: Arrays = {}
    spec = description["spec"]
    patch = spec.get("vit", spec).get("patch")
    dtypes = (description.get("torch") or {}).get("dtypes", {})
    for name in names:
        tree, group = trees[name], f"{name}/" if grouped else ""
        extra |= {group + key: np.asarray(value) for key, value in tree.get("fixed", {}).items()}
        for entry in _table(description, name):
            torch_name = group + entry.torch
            value = np.asarray(leaf(tree["params"], entry.path))[place(entry.index)]
            value = write_layout(value, entry, patch)
            arrays[torch_name] = np.array(value, dtypes.get(torch_name, "float32"), order="C")
            report.wrote(entry, torch_name, arrays[torch_name], name)
    return arrays, extra


def _table(description: Mapping, name: str) -> list:
    if description["kind"] != "vmoe" or "module" not in description:
        return table(description, name)
    # A published V-MoE student counts its blocks, stitches and experts from 0.
    index, depths = description["module"], description["depths"]
    start, end = sum(depths[:index]), sum(depths[: index + 1])
    spec = dict(description["spec"])
    for field in ("moe_pos", "pre_stitch_pos", "post_stitch_pos"):
        spec[field] = [block - start for block in spec[field] if start <= block < end]
    first, last = registry.ends(description, index)
    alone = {"kind": "vmoe", "spec": spec, "depths": [depths[index]], "first": first, "last": last}
    return table(alone, "student_0")


def _published(description: Mapping, names: list[str], grouped: bool) -> dict:
    """The layout of weights that were never in torch."""
    if grouped:
        raise UserError("these students were never in torch files; convert them one by one")
    depths, index = description.get("depths"), description.get("module")
    if description["kind"] == "vmoe" and index is not None:
        depths = [depths[index]]
    elif description["kind"] == "vit" and index is not None:
        container = torch_layouts.stage_containers(names, depths)[index] | {
            "keys": ["block_state_dict"]
        }
        entries = {
            "model_name": variants.name_of(registry.spec_of(description)),
            "block_index": index,
            "divided_depths": depths,
        }
        return {"files": {"": {"containers": [container], "entries": entries}}, "depths": depths}
    return torch_layouts.published_layout(names, depths)


def _write_directory(layout: dict, arrays: Arrays, extra: Arrays, target: Path) -> None:
    tmp = target.with_name(f".{target.name}.writing")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        for name, record in layout["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{target}: a file of these weights would be {name}, outside")
            group = record.get("group", "")
            mine = {k.removeprefix(group): v for k, v in extra.items() if k.startswith(group)}
            depths = record.get("depths", layout["depths"])
            _write_file(record, depths, arrays, mine, tmp / name, group, layout["depths"])
        tmp.rename(target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _write_file(
    record: dict,
    depths: list[int] | None,
    arrays: Arrays,
    extra: Arrays,
    path: Path,
    group: str = "",
    all_depths: list[int] | None = None,
) -> None:
    """One file. `group`: what its tensors' names start with among those of a set of students."""
    stacked: Arrays = {}

    def weights(container: dict) -> Iterator[tuple[str, np.ndarray]]:
        for name in container["names"]:
            whole = group + torch_layouts.canonical(name, container["module"], depths)
            if group and whole not in arrays:  # the students became one network
                whole = torch_layouts.whole_name(whole, all_depths)
            if whole in arrays:
                yield container["prefix"] + name, arrays[whole]
            elif not torch_layouts.is_stitch(whole):  # one that was dropped cannot be given back
                if whole not in stacked:
                    stacked[whole] = np.concatenate(_single_experts(whole, arrays))
                yield container["prefix"] + name, stacked[whole]

    entries, containers = record["entries"], record["containers"]
    if path.suffix == safetensors_file.SUFFIX:
        # It has no containers: the first one's names are those of the whole network.
        metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in entries.items()}
        flat = [*weights(containers[0]), *extra.items()]
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
    torch_file.write_torch(path, content | entries | extra)


def _single_experts(name: str, arrays: Arrays) -> list[np.ndarray]:
    """The tensors of all experts whose stack is called `name`, in older FastMoE's layout."""
    found = []
    while (single := torch_layouts.expert_names(name, len(found) + 1)[-1]) in arrays:
        found.append(arrays[single])
    return found
