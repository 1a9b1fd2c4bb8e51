"""Weights of one network, in canonical names: from a file, or from a directory of its modules."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd_jax.conversion import torch_layouts
from m2mkd_jax.conversion.lazy_tensor import Tensor, same
from m2mkd_jax.conversion.torch_layouts import BLOCK, SUFFIXES, Contents, canonical, expert_names
from m2mkd_jax.errors import UserError

_PARTS = ("readin", "mediator", "readout")


@dataclass
class TorchWeights:
    """Weights in canonical names, and the layout they came in.

    Attributes:
        kind: 'vit', 'vmoe', 'nac' or 'nac_student'.
        tensors: canonical name -> tensor. Of students in a directory: "student_i/NAME".
        aliases: canonical name -> every other name it had, for the report.
        depths: blocks of each stage, where the layout says; a lone module's among those of all.
        module: which stage a lone teacher module is.
        parts: what the students are, in order: 'readin', 'mediator', 'readout', or 'vmoe'.
        words: plain values that may describe the network (model_name).
        layout: as written into the description.
    """

    kind: str
    tensors: dict[str, Tensor]
    aliases: dict[str, list[str]]
    ignored: dict[str, str]
    depths: list[int] | None
    module: int | None
    parts: list[str]
    words: dict[str, Any]
    layout: dict
    extra: dict[str, Tensor]


def read_torch_weights(path: Path) -> TorchWeights:
    """Opens a file, or a directory of module files, and finds out what is in it.

    Raises:
        UserError: nothing there, nothing known, two tensors of one name that differ, or modules
            that do not belong together.
    """
    if path.is_dir():
        return _directory(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are files that end in {', '.join(SUFFIXES)}")
    return source_of(torch_layouts.read_file(path), path)


def source_of(contents: Contents, path: Path) -> TorchWeights:
    """The weights of one file. Raises UserError as `read_torch_weights` does."""
    kind, part = _known(contents, path)
    module, depths = None, None
    if kind in ("vit", "vmoe"):
        depths = torch_layouts.stage_depths(contents, path)
        module = contents.containers[0].module
    ignored = dict(contents.ignored)
    if kind != "nac_student":
        ignored |= dict.fromkeys(contents.extra, "of a NAC student, which this is not")
    source = TorchWeights(
        kind,
        {},
        {},
        ignored,
        depths,
        module,
        [part] if part else [],
        dict(contents.entries),
        {"files": {"": torch_layouts.record(contents)}, "depths": depths},
        dict(contents.extra),
    )
    _gather(source, contents, path, depths)
    return source


def _known(contents: Contents, path: Path) -> tuple[str, str]:
    kind, part = torch_layouts.kind_of(contents.containers[0].tensors)
    if not kind:
        names = ", ".join(list(contents.containers[0].tensors)[:3])
        raise UserError(
            f"{path}: no vision transformer, V-MoE, NAC or NAC student has tensors called {names}"
        )
    return kind, part


def _gather(
    source: TorchWeights,
    contents: Contents,
    path: Path,
    depths: list[int] | None,
    group: str = "",
    label: str = "",
) -> None:
    _complete(contents, path, depths)
    for container in contents.containers:
        for name, tensor in container.tensors.items():
            whole = group + canonical(name, container.module, depths)
            shown = label + ".".join([*map(str, container.keys), name])
            parts = {whole: tensor}
            if tensor.shape and (singles := expert_names(whole, tensor.shape[0])):
                parts = {single: tensor[e] for e, single in enumerate(singles)}
            for target, part in parts.items():
                known = source.tensors.setdefault(target, part)
                if known is not part and not same(known, part):
                    first = source.aliases[target][0]
                    raise UserError(f'{path}: "{first}" and "{shown}" are one tensor, and differ')
                source.aliases.setdefault(target, []).append(shown)


def _complete(contents: Contents, path: Path, depths: list[int] | None) -> None:
    """A network written several times in one file (torch_layouts.py) must be whole each time."""
    copies: dict[tuple[str, bool], dict[str, str]] = {}
    for container in contents.containers:
        for name in container.tensors:
            copy = (str(container.keys[:1]), name.startswith("stages."))
            shown = ".".join([*map(str, container.keys), name])
            copies.setdefault(copy, {})[canonical(name, container.module, depths)] = shown
    for one, other in itertools.permutations(copies.values(), 2):
        missing = [name for name in one if name not in other]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f'{path}: tensor "{missing[0]}"{more} is missing beside '
                f'"{next(iter(other.values()))}"; it is in the file as "{one[missing[0]]}" only'
            )


def _directory(path: Path) -> TorchWeights:
    found = torch_layouts.weight_files(path)
    files = {str(file.relative_to(path)): torch_layouts.read_file(file) for file in found}
    if not files:
        raise UserError(f"{path} holds no weights: no description.json, no {', '.join(SUFFIXES)}")
    others = [file.name for file in sorted(path.iterdir()) if file.is_file() and file not in found]
    kinds = {name: _known(contents, path / name) for name, contents in files.items()}
    if len({kind for kind, _ in kinds.values()}) > 1:
        listed = ", ".join(f"{name} ({kind})" for name, (kind, _) in kinds.items())
        raise UserError(f"{path} mixes networks: {listed[:300]}")
    kind = next(iter(kinds.values()))[0]
    if kind == "nac_student":
        source = _students(path, files, {name: part for name, (_, part) in kinds.items()}, kind)
    elif kind == "vmoe":
        source = _students(path, files, {n: _end_of(c) for n, c in files.items()}, kind)
    elif kind == "vit":
        source = _modules(path, files)
    else:
        raise UserError(f"{path} holds {len(files)} {kind} checkpoints; give one of the files")
    for name, contents in files.items():
        source.ignored |= {f"{name}: {key}": reason for key, reason in contents.ignored.items()}
    source.ignored |= dict.fromkeys(others, "not a file of weights")
    return source


def _end_of(contents: Contents) -> str:
    names = [canonical(n, None, None) for n in contents.containers[0].tensors]
    return "readin" if "cls_token" in names else "readout" if "head.weight" in names else "mediator"


def _students(path: Path, files: dict, parts: dict[str, str], kind: str) -> TorchWeights:
    """Students in their order: the one that reads images, the middle ones, the one with logits."""
    order = sorted(parts, key=lambda name: _PARTS.index(parts[name]))  # stable: by name
    counts = {part: list(parts.values()).count(part) for part in _PARTS}
    if counts["readin"] != 1 or counts["readout"] != 1:
        raise UserError(
            f"{path} holds {counts['readin']} first, {counts['mediator']} middle and "
            f"{counts['readout']} last students; one first and one last belong to a set"
        )
    _check_numbers(path, parts)
    records, depths = {}, [] if kind == "vmoe" else None
    source = TorchWeights(kind, {}, {}, {}, depths, None, [parts[n] for n in order], {}, {}, {})
    for i, name in enumerate(order):
        own = torch_layouts.stage_depths(files[name], path / name) if kind == "vmoe" else None
        if kind == "vmoe":
            own = own or [_block_count(files[name])]
            depths.append(sum(own))
        _gather(source, files[name], path / name, own, f"student_{i}/", f"{name}: ")
        records[name] = {
            **torch_layouts.record(files[name]),
            "group": f"student_{i}/",
            "depths": own,
        }
        source.extra |= {f"student_{i}/{k}": t for k, t in files[name].extra.items()}
    source.layout = {"files": records, "depths": depths}
    return source


def _check_numbers(path: Path, parts: dict[str, str]) -> None:
    """Students say nothing of their place; the numbers of files that are named alike do."""
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


def _modules(path: Path, files: dict[str, Contents]) -> TorchWeights:
    """The modules of one teacher, each split off into its own file."""
    by_index: dict[int, str] = {}
    depths, words = None, {}
    for name, contents in files.items():
        index = contents.containers[0].module
        if index is None:
            raise UserError(f"{path / name} is not a single module (it has no block_index)")
        if index in by_index:
            raise UserError(f"{path}: {by_index[index]} and {name} are both module {index}")
        by_index[index] = name
        own, words = torch_layouts.stage_depths(contents, path / name), contents.entries | words
        network, other = words.get("model_name"), contents.entries.get("model_name")
        if other not in (None, network):
            raise UserError(f"{path / name} is of a {other!r}, other modules of a {network!r}")
        if depths is not None and own != depths:
            raise UserError(f"{path / name}: divided_depths is {own}, elsewhere {depths}")
        depths = own
    missing = sorted(set(range(len(depths))) - set(by_index))
    if missing:
        raise UserError(f"{path}: module {missing[0]} of divided_depths {depths} is missing")
    records = {name: torch_layouts.record(files[name]) for _, name in sorted(by_index.items())}
    layout = {"files": records, "depths": depths}
    source = TorchWeights("vit", {}, {}, {}, depths, None, [], words, layout, {})
    for _, name in sorted(by_index.items()):
        _gather(source, files[name], path / name, depths, label=f"{name}: ")
    return source
