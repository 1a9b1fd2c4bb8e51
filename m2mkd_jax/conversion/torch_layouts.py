"""How the published programs lay weights out in files.

A file holds one or more state dicts ("containers"):

    finished_checkpoint.pth   model: the whole network, each tensor as blocks.N... and once more as
                              stages.i.blocks.j...; model_stages[i]: stage i, as blocks.j...
    split teacher module      block_state_dict: stage block_index of divided_depths, as blocks.j...
    student, NAC              model
    plain ViT                 model, or the only entry that holds tensors, or the tensors themselves

Weights come as one file, or as a directory of modules. The functions here translate every name to
the canonical one, which the tensor has in the whole network, and keep the layout of the files, so
that converting back gives the same files.

The released files are listed in docs/reference.md#checkpoints.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd_jax.conversion import safetensors_file, torch_file
from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.errors import UserError

SUFFIXES = (*torch_file.SUFFIXES, safetensors_file.SUFFIX)
WEIGHT_KEYS = ("model", "state_dict", "block_state_dict")
FIXED = ("codes", "states")  # a NAC student's fixed arrays, as this program writes them
_AVERAGES = ("model_ema", "state_dict_ema")
_WRAPPERS = ("module.", "_orig_mod.")
_REASONS = {
    "optimizer": "optimizer state",
    "lr_scheduler": "state of the learning rate schedule",
    "scaler": "state of the loss scaling",
    **dict.fromkeys(_AVERAGES, "an average of the weights; the weights themselves are converted"),
}
_STAGE = re.compile(r"stages\.(\d{1,6})\.(.+)$")
BLOCK = re.compile(r"blocks\.(\d{1,6})\.(.+)$")
_STUDENT = re.compile(r"student_(\d+)/(?:blocks\.(\d{1,6})\.)?(.+)$")
_STITCH = re.compile(r"blocks\.\d{1,6}\.(pre|post)_stitch\.")
# How a name begins that no wrapper has changed, and what a wrapper put before such a one.
_ROOT = r"(?:blocks|stages|latent_graphs)\.\d|(?:patch_embed|pre_stitch|post_stitch)\.|cls_token$"
_WRAPPED = re.compile(rf"(.+?\.)(?:{_ROOT})")
_EXPERTS = re.compile(r"(.*\.moe\.experts)\.((?:htoh4|h4toh)\.(?:weight|bias))$")

# The layout of one file as JSON: {"containers": [{"keys", "prefix", "module", "names"}, ...],
# "entries": {...}}; see `Container` and `Contents`.
FileLayout = dict[str, Any]
# Of all files, by name relative to the directory, "" for a single file: {"files": {NAME:
# FileLayout}, "depths": blocks of each stage or None}.
Layout = dict[str, Any]


@dataclass
class Container:
    """One state dict of a file.

    Attributes:
        keys: where it is in the file: ("model",), ("model_stages", 0), or () for the file itself.
        tensors: by name, without `prefix`.
        prefix: what a wrapper put before every name, such as "module." or "model.".
        module: the stage whose first block is called blocks.0 in it; None for a whole network.
    """

    keys: tuple[Any, ...]
    tensors: dict[str, Tensor]
    prefix: str = ""
    module: int | None = None


@dataclass
class Contents:
    """What one file holds.

    Attributes:
        containers: its state dicts.
        entries: plain values, kept for the conversion back.
        ignored: name -> why it is not converted.
        fixed: a NAC student's codes and states.
    """

    containers: list[Container]
    entries: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)


def kind_of(names: Iterable[str]) -> tuple[str, str]:
    """The kind of network whose tensors have these names.

    Returns:
        (kind, part): kind is 'vit', 'vmoe', 'nac' or 'nac_student', "" if none of them; part is
        what a student is ('readin', 'mediator', 'readout'), 'vmoe' for a V-MoE, else "".
    """
    names = list(names)

    def any_has(*words: str) -> bool:
        return any(word in name for name in names for word in words)

    if any(name.startswith("latent_graphs.") for name in names):
        return "nac", ""
    if "pre_stitch.weight" in names or "post_stitch.weight" in names:
        if any_has("read_in."):
            return "nac_student", "readin"
        return "nac_student", "readout" if any_has("to_logits") else "mediator"
    if any_has(".moe.", ".pre_stitch.", ".post_stitch."):
        return "vmoe", "vmoe"
    return ("vit", "") if any_has("blocks.", "patch_embed.") else ("", "")


def has_weights(path: Path) -> bool:
    """Whether `path` is a file of weights or a directory of such files; opens nothing."""
    if path.is_dir():
        return bool(weight_files(path))
    return path.is_file() and path.suffix in (*SUFFIXES, ".npz", ".index")  # google_npz.py


def weight_files(directory: Path) -> list[Path]:
    """Module files in a directory, or in the subdirectories where the published program saves."""
    found = [*directory.iterdir(), *directory.glob("*/finished_checkpoint.pth")]
    found = [file for file in found if file.is_file() and file.suffix in SUFFIXES]
    return sorted(found, key=_natural_order)


def _natural_order(path: Path) -> list[str | int]:
    return [int(w) if w.isdecimal() else w for w in re.split(r"(\d+)", str(path))]


def read_file(path: Path) -> Contents:
    """Opens one file.

    Raises:
        UserError: it cannot be read, or has no weights where the layouts above have them.
    """
    if path.suffix == safetensors_file.SUFFIX:
        tensors, metadata = safetensors_file.read_safetensors(path)
        entries = {key: _json(value) for key, value in metadata.items() if key != "format"}
        return _bare_tensors(tensors, entries, path)
    return contents_of(torch_file.read_torch(path), path)


def contents_of(content: Any, path: Path) -> Contents:
    """What an unpickled file holds.

    Args:
        content: containers of plain values and `Tensor`s.
        path: of the file, for messages.

    Raises:
        UserError: there are no weights where the layouts above have them.
    """
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint or state dict")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _bare_tensors(dict(content), {}, path)
    return _checkpoint(dict(content), path)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _bare_tensors(tensors: dict[str, Tensor], entries: dict[str, Any], path: Path) -> Contents:
    """A file that is itself the state dict."""
    fixed = {name: tensors.pop(name) for name in FIXED if name in tensors}
    index = entries.get("block_index")
    index = index if type(index) is int else None
    kept = {name: value for name, value in entries.items() if _is_plain(value)}
    return Contents([_container((), tensors, path, index)], kept, fixed=fixed)


def _checkpoint(content: dict[str, Any], path: Path) -> Contents:
    """A file with the state dict, or several, under a key."""

    def present(keys: tuple[str, ...]) -> list[str]:
        return [key for key in keys if isinstance(content.get(key), dict) and content[key]]

    others = [k for k, v in content.items() if isinstance(v, dict) and _all_tensors(v)]
    found = present(WEIGHT_KEYS) or present(_AVERAGES) or others
    if len(found) != 1:
        listed = ", ".join(found or list(content)[:12]) or "nothing"
        raise UserError(
            f"{path} has {'no weights' if not found else 'weights twice'}: one of "
            f"{', '.join(WEIGHT_KEYS)} should be in it; it has {listed}"
        )
    key = found[0]
    weights, contents = content.pop(key), Contents([])
    index = content.get("block_index") if key == "block_state_dict" else None
    if key == "block_state_dict" and type(index) is not int:
        raise UserError(f"{path}: block_index is {index!r}, not the number of a module")
    contents.containers.append(_container((key,), weights, path, index))
    stages = content.get("model_stages")
    if stages:
        del content["model_stages"]
        if not isinstance(stages, list):
            raise UserError(f"{path}: model_stages is no list of state dicts")
        for i, stage in enumerate(stages):
            contents.containers.append(_container(("model_stages", i), stage, path, i))
    for name, value in content.items():
        if name in FIXED and isinstance(value, Tensor):
            contents.fixed[name] = value
        elif name not in _REASONS and _is_plain(value):
            contents.entries[name] = value
        else:
            contents.ignored[name] = _REASONS.get(name, "not weights")
    return contents


def _container(
    keys: tuple[Any, ...], tensors: Any, path: Path, module: int | None = None
) -> Container:
    where = ".".join(map(str, keys)) or "the file"
    if not isinstance(tensors, dict) or not all(isinstance(n, str) for n in tensors):
        raise UserError(f"{path}: {where} is no state dict")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f'{path}: "{name}" in {where} is a {type(value).__name__}, no tensor')
    prefix = _prefix(list(tensors))
    return Container(keys, {n.removeprefix(prefix): t for n, t in tensors.items()}, prefix, module)


def _prefix(names: list[str]) -> str:
    """What wrappers put before every name: torch's, or the module that holds the network."""
    prefix = ""
    while names:
        longer = [prefix + word for word in _WRAPPERS]
        longer = [start for start in longer if all(name.startswith(start) for name in names)]
        if not longer:
            break
        prefix = longer[0]
    inner = [name.removeprefix(prefix) for name in names]
    if any(re.match(_ROOT, name) for name in inner):
        return prefix
    wrapped = next((m[1] for name in inner if (m := _WRAPPED.match(name))), "")
    return prefix + (wrapped if all(name.startswith(wrapped) for name in inner) else "")


def _all_tensors(value: dict[Any, Any]) -> bool:
    return bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value, and it is short."""
    if isinstance(value, list):
        return len(value) <= 100 and all(_is_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float | bool)


def file_layout(contents: Contents) -> FileLayout:
    """The layout of one file as JSON."""
    containers = [
        {"keys": list(c.keys), "prefix": c.prefix, "module": c.module, "names": list(c.tensors)}
        for c in contents.containers
    ]
    return {"containers": containers, "entries": contents.entries}


def stage_depths(contents: Contents, path: Path) -> list[int] | None:
    """Blocks of each stage; None for weights that are not in stages.

    Raises:
        UserError: what `divided_depths` says and what the names show differ, or make no sense.
    """
    stated = contents.entries.get("divided_depths")
    blocks: dict[int, set[int]] = {}
    for container in contents.containers:
        for name in container.tensors:
            stage, inside = _split_stage(name, container.module)
            block = BLOCK.match(inside)
            if stage is not None:
                blocks.setdefault(stage, set()).update({int(block[1])} if block else ())
    counts = {stage: len(numbers) for stage, numbers in blocks.items()}
    if stated is not None and not (
        isinstance(stated, list) and stated and all(type(d) is int and d >= 0 for d in stated)
    ):
        raise UserError(f"{path}: divided_depths is {stated!r}, not a list of depths")
    if not counts and stated is None:
        return None
    if stated is None and sorted(counts) != list(range(len(counts))):
        raise UserError(f"{path}: stages {sorted(counts)[:20]} are not all from 0 on")
    depths = stated if stated is not None else [counts[i] for i in range(len(counts))]
    for stage, count in counts.items():
        if not 0 <= stage < len(depths):
            raise UserError(f"{path}: there is no module {stage} in the depths {depths}")
        if depths[stage] != count:
            raise UserError(f"{path}: module {stage} has {count} blocks; the depths are {depths}")
    return depths


def _split_stage(name: str, module: int | None) -> tuple[int | None, str]:
    match = _STAGE.match(name)
    return (int(match[1]), match[2]) if match else (module, name)


def canonical_name(name: str, module: int | None, depths: Sequence[int] | None) -> str:
    """A tensor's name in the whole network.

    Args:
        name: in its container.
        module: the container's (see `Container`).
        depths: blocks of each stage; None if the weights are not in stages.
    """
    stage, inside = _split_stage(name, module)
    block = BLOCK.match(inside)
    if stage is None or not block or depths is None:
        return inside
    return f"blocks.{int(block[1]) + sum(depths[:stage])}.{block[2]}"


def assembled_name(name: str, depths: Sequence[int]) -> str:
    """A V-MoE student's tensor in the assembled network: student_2/blocks.0.x -> blocks.N.x."""
    match = _STUDENT.match(name)
    if match is None:
        raise ValueError(f"{name} is no tensor of a student")
    student, block, inside = match.groups()
    if block is None:
        return inside
    return f"blocks.{int(block) + sum(depths[: int(student)])}.{inside}"


def is_stitch(name: str) -> bool:
    """Whether a tensor belongs to a stitch of a V-MoE."""
    return bool(_STITCH.match(name))


def expert_names(name: str, experts: int) -> list[str]:
    """The names of the single experts in a tensor of all of them, as older FastMoE releases write.

    Args:
        name: of the tensor; [] if it is not one of all experts.
        experts: how many there are.
    """
    match = _EXPERTS.match(name)
    return [f"{match[1]}.{e}.{match[2]}" for e in range(experts)] if match else []


def published_layout(names: list[str], depths: list[int] | None) -> Layout:
    """The layout that the published programs give a network of these canonical names."""
    stages = stage_containers(names, depths) if depths else []
    whole = [f"stages.{i}.{n}" for i, stage in enumerate(stages) for n in stage["names"]] + names
    containers = [{"keys": ["model"], "prefix": "", "module": None, "names": whole}, *stages]
    return {"files": {"": {"containers": containers, "entries": {}}}, "depths": depths}


def stage_containers(names: list[str], depths: list[int]) -> list[dict[str, Any]]:
    """`model_stages` of a network of these canonical names."""
    ends = list(itertools.accumulate(depths))
    stages: list[list[str]] = [[] for _ in depths]
    for name in names:
        block = BLOCK.match(name)
        if block:
            stage = next(i for i, end in enumerate(ends) if int(block[1]) < end)
            inside = f"blocks.{int(block[1]) - ends[stage] + depths[stage]}.{block[2]}"
            stages[stage].append(inside)
        else:
            stages[-1 if name.startswith(("norm.", "head.")) else 0].append(name)
    return [
        {"keys": ["model_stages", i], "prefix": "", "module": i, "names": inside}
        for i, inside in enumerate(stages)
    ]
