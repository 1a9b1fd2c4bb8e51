"""The weights of one network under canonical names, from a file or a directory of its modules."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd_jax.conversion import torch_layouts
from m2mkd_jax.conversion.lazy_tensor import Tensor, same_values
from m2mkd_jax.conversion.torch_layouts import (
    BLOCK,
    SUFFIXES,
    Contents,
    FileLayout,
    Layout,
    canonical_name,
    expert_names,
)
from m2mkd_jax.errors import UserError

_PARTS = ("readin", "mediator", "readout")


@dataclass
class TorchWeights:
    """Weights under canonical names, and the layout of the files they came in.

    Attributes:
        kind: 'vit', 'vmoe', 'nac' or 'nac_student'.
        layout: as it is saved in the description.
        depths: blocks of each stage, if the layout says; a single module's among those of all.
        module: which stage a single teacher module is.
        parts: what the students are, in order: 'readin', 'mediator', 'readout', or 'vmoe'.
        entries: plain values of the file, which may describe the network (model_name).
        ignored: name in the files -> why it is not converted.
        fixed: codes and states of NAC students; in a directory under "student_i/NAME".
        tensors: by canonical name; of students in a directory under "student_i/NAME".
        aliases: canonical name -> every name that the tensor has in the files.
    """

    kind: str
    layout: Layout
    depths: list[int] | None = None
    module: int | None = None
    parts: list[str] = field(default_factory=list)
    entries: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)

    @property
    def from_directory(self) -> bool:
        """Whether they came as a directory of modules, not as one file."""
        return "" not in self.layout["files"]


def read_torch_weights(path: Path) -> TorchWeights:
    """Opens a file, or a directory of module files, and finds out what is in it.

    Raises:
        UserError: there is nothing, or nothing known; two tensors of one name differ; or the
            modules do not belong together.
    """
    if path.is_dir():
        return _read_directory(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are files that end in {', '.join(SUFFIXES)}")
    return torch_weights_of(torch_layouts.read_file(path), path)


def torch_weights_of(contents: Contents, path: Path) -> TorchWeights:
    """The weights of one opened file.

    Args:
        contents: of the file.
        path: of the file, for messages.

    Raises:
        UserError: as `read_torch_weights`.
    """
    kind, part = _kind_of(contents, path)
    module, depths = None, None
    if kind in ("vit", "vmoe"):
        depths = torch_layouts.stage_depths(contents, path)
        module = contents.containers[0].module
    ignored = dict(contents.ignored)
    if kind != "nac_student":
        ignored |= dict.fromkeys(contents.fixed, "of a NAC student, which this is not")
    weights = TorchWeights(
        kind,
        layout={"files": {"": torch_layouts.file_layout(contents)}, "depths": depths},
        depths=depths,
        module=module,
        parts=[part] if part else [],
        entries=dict(contents.entries),
        ignored=ignored,
        fixed=dict(contents.fixed),
    )
    _add_tensors(weights, contents, path, depths)
    return weights


def _kind_of(contents: Contents, path: Path) -> tuple[str, str]:
    """See `torch_layouts.kind_of`. Raises UserError if the kind is not known."""
    kind, part = torch_layouts.kind_of(contents.containers[0].tensors)
    if not kind:
        names = ", ".join(list(contents.containers[0].tensors)[:3])
        raise UserError(
            f"{path}: no vision transformer, V-MoE, NAC or NAC student has tensors called {names}"
        )
    return kind, part


def _add_tensors(
    weights: TorchWeights,
    contents: Contents,
    path: Path,
    depths: list[int] | None,
    group: str = "",
    label: str = "",
) -> None:
    """Adds the tensors of a file to `weights.tensors` and `weights.aliases`.

    Args:
        weights: changed in place.
        contents: of the file.
        path: of the file, for messages.
        depths: blocks of each stage in the file.
        group: put before the canonical names, such as "student_0/".
        label: put before the names that the report shows, such as "FILE: ".

    Raises:
        UserError: two tensors of one name differ, or a copy of the network is not complete.
    """
    _check_copies(contents, path, depths)
    for container in contents.containers:
        for name, tensor in container.tensors.items():
            canonical = group + canonical_name(name, container.module, depths)
            shown = label + ".".join([*map(str, container.keys), name])
            parts = {canonical: tensor}
            if tensor.shape and (singles := expert_names(canonical, tensor.shape[0])):
                parts = {single: tensor.part(e) for e, single in enumerate(singles)}
            for target, part in parts.items():
                known = weights.tensors.setdefault(target, part)
                if known is not part and not same_values(known, part):
                    first = weights.aliases[target][0]
                    raise UserError(f'{path}: "{first}" and "{shown}" are one tensor, and differ')
                weights.aliases.setdefault(target, []).append(shown)


def _check_copies(contents: Contents, path: Path, depths: list[int] | None) -> None:
    """Checks that each copy of a network in one file (torch_layouts.py) is complete.

    Raises:
        UserError: a tensor of one copy is missing in another.
    """
    copies: dict[tuple[str, bool], dict[str, str]] = {}
    for container in contents.containers:
        for name in container.tensors:
            copy = (str(container.keys[:1]), name.startswith("stages."))
            shown = ".".join([*map(str, container.keys), name])
            copies.setdefault(copy, {})[canonical_name(name, container.module, depths)] = shown
    for one, other in itertools.permutations(copies.values(), 2):
        missing = [name for name in one if name not in other]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f'{path}: tensor "{missing[0]}"{more} is missing beside '
                f'"{next(iter(other.values()))}"; it is in the file as "{one[missing[0]]}" only'
            )


def _read_directory(path: Path) -> TorchWeights:
    found = torch_layouts.weight_files(path)
    files = {str(file.relative_to(path)): torch_layouts.read_file(file) for file in found}
    if not files:
        raise UserError(f"{path} holds no weights: no description.json, no {', '.join(SUFFIXES)}")
    others = [file.name for file in sorted(path.iterdir()) if file.is_file() and file not in found]
    kinds = {name: _kind_of(contents, path / name) for name, contents in files.items()}
    if len({kind for kind, _ in kinds.values()}) > 1:
        listed = ", ".join(f"{name} ({kind})" for name, (kind, _) in kinds.items())
        raise UserError(f"{path} mixes networks: {listed[:300]}")
    kind = next(iter(kinds.values()))[0]
    if kind == "nac_student":
        weights = _students(path, files, {name: part for name, (_, part) in kinds.items()}, kind)
    elif kind == "vmoe":
        weights = _students(path, files, {n: _vmoe_part(c) for n, c in files.items()}, kind)
    elif kind == "vit":
        weights = _teacher_modules(path, files)
    else:
        raise UserError(f"{path} holds {len(files)} {kind} checkpoints; give one of the files")
    for name, contents in files.items():
        weights.ignored |= {f"{name}: {key}": reason for key, reason in contents.ignored.items()}
    weights.ignored |= dict.fromkeys(others, "not a file of weights")
    return weights


def _vmoe_part(contents: Contents) -> str:
    """What a V-MoE student is, in the words for a NAC's."""
    names = [canonical_name(n, None, None) for n in contents.containers[0].tensors]
    return "readin" if "cls_token" in names else "readout" if "head.weight" in names else "mediator"


def _students(
    path: Path, files: dict[str, Contents], parts: dict[str, str], kind: str
) -> TorchWeights:
    """A set of students, ordered: the one that takes images, the middle ones, the one with logits.

    Args:
        path: the directory.
        files: by name relative to it.
        parts: file name -> 'readin', 'mediator' or 'readout'.
        kind: 'nac_student' or 'vmoe'.

    Raises:
        UserError: they do not make up a set.
    """
    order = sorted(parts, key=lambda name: _PARTS.index(parts[name]))  # stable: by name
    counts = {part: list(parts.values()).count(part) for part in _PARTS}
    if counts["readin"] != 1 or counts["readout"] != 1:
        raise UserError(
            f"{path} holds {counts['readin']} first, {counts['mediator']} middle and "
            f"{counts['readout']} last students; one first and one last belong to a set"
        )
    _check_numbers(path, parts)
    layouts: dict[str, FileLayout] = {}
    depths: list[int] = []
    weights = TorchWeights(kind, {}, parts=[parts[name] for name in order])
    for i, name in enumerate(order):
        own = None
        if kind == "vmoe":
            own = torch_layouts.stage_depths(files[name], path / name)
            own = own or [_block_count(files[name])]
            depths.append(sum(own))
        group = f"student_{i}/"
        _add_tensors(weights, files[name], path / name, own, group, f"{name}: ")
        layout = torch_layouts.file_layout(files[name])
        layouts[name] = {**layout, "group": group, "depths": own}
        weights.fixed |= {group + key: tensor for key, tensor in files[name].fixed.items()}
    weights.depths = depths if kind == "vmoe" else None
    weights.layout = {"files": layouts, "depths": weights.depths}
    return weights


def _check_numbers(path: Path, parts: dict[str, str]) -> None:
    """Checks by the numbers in the files' names that no middle student is missing.

    The tensors of a student do not say which one it is.

    Raises:
        UserError: the numbers leave a gap.
    """
    alike: dict[str, dict[int, str]] = {}
    for name, part in parts.items():
        if match := re.match(r"(.*?)(\d{1,6})(\D*)$", name.removesuffix(Path(name).suffix)):
            alike.setdefault(f"{match[1]}#{match[3]}", {})[int(match[2])] = part
    for form, numbers in alike.items():
        missing = sorted(set(range(min(*numbers, 1), max(numbers))) - set(numbers))
        if len(numbers) > 1 and "mediator" in numbers.values() and missing:
            shown = form.replace("#", str(missing[0]))
            raise UserError(f"{path}: {shown} is missing, student {missing[0]} of the set")


def _block_count(contents: Contents) -> int:
    blocks = {m[1] for n in contents.containers[0].tensors if (m := BLOCK.match(n))}
    return len(blocks)


def _teacher_modules(path: Path, files: dict[str, Contents]) -> TorchWeights:
    """The modules of one teacher, each in a file of its own.

    Raises:
        UserError: they do not make up one network.
    """
    by_index: dict[int, str] = {}
    depths: list[int] = []
    entries: dict[str, Any] = {}
    for name, contents in files.items():
        index = contents.containers[0].module
        if index is None:
            raise UserError(f"{path / name} is not a single module (it has no block_index)")
        if index in by_index:
            raise UserError(f"{path}: {by_index[index]} and {name} are both module {index}")
        by_index[index] = name
        own = torch_layouts.stage_depths(contents, path / name) or []
        entries = contents.entries | entries
        network, other = entries.get("model_name"), contents.entries.get("model_name")
        if other not in (None, network):
            raise UserError(f"{path / name} is of a {other!r}, other modules of a {network!r}")
        if depths and own != depths:
            raise UserError(f"{path / name}: divided_depths is {own}, elsewhere {depths}")
        depths = own
    missing = sorted(set(range(len(depths))) - set(by_index))
    if missing:
        raise UserError(f"{path}: module {missing[0]} of divided_depths {depths} is missing")
    order = [name for _, name in sorted(by_index.items())]
    layouts = {name: torch_layouts.file_layout(files[name]) for name in order}
    layout = {"files": layouts, "depths": depths}
    weights = TorchWeights("vit", layout, depths=depths, entries=entries)
    for name in order:
        _add_tensors(weights, files[name], path / name, depths, label=f"{name}: ")
    return weights
