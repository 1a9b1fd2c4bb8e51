"""How the published programs lay weights out in files (reference section 8).

A file holds one or more state dicts ("containers"):

    finished_checkpoint.pth   model: the whole network, each tensor as blocks.N... and once more as
                              stages.i.blocks.j...; model_stages[i]: stage i, as blocks.j...
    split teacher module      block_state_dict: stage block_index of divided_depths, as blocks.j...
    student, NAC              model
    plain ViT                 model, or the tensors themselves

and a source is one file, or a directory of modules. Here every name becomes the one it has in the
whole network ("canonical"), and the layout is kept, so that the way back gives the same files.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd_jax.conversion import safetensors_file, torch_file
from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.errors import UserError

SUFFIXES = (*torch_file.SUFFIXES, safetensors_file.SUFFIX)
WEIGHT_KEYS = ("model", "state_dict", "block_state_dict")
_AVERAGES = ("model_ema", "state_dict_ema")
_WRAPPERS = ("module.", "_orig_mod.")
EXTRA = ("codes", "states")  # of a NAC student, as this program writes them
_REASONS = {
    "optimizer": "optimizer state",
    "lr_scheduler": "state of the learning rate schedule",
    "scaler": "state of the loss scaling",
    **dict.fromkeys(_AVERAGES, "an average of the weights; the weights themselves are converted"),
}
_STAGE = re.compile(r"stages\.(\d{1,6})\.(.+)$")
BLOCK = re.compile(r"blocks\.(\d{1,6})\.(.+)$")
_STITCH = re.compile(r"blocks\.\d{1,6}\.(pre|post)_stitch\.")
_EXPERTS = re.compile(r"(.*\.moe\.experts)\.((?:htoh4|h4toh)\.(?:weight|bias))$")


@dataclass
class Container:
    """One state dict of a file.

    Attributes:
        keys: where it is in the file: ("model",), ("model_stages", 0), () for the file itself.
        tensors: by name, without `prefix`.
        module: the stage whose first block is called blocks.0 here; None: the whole network's.
    """

    keys: tuple
    tensors: dict[str, Tensor]
    prefix: str = ""
    module: int | None = None


@dataclass
class Contents:
    """What one file holds: weights, plain values that are kept, and what is left behind and why."""

    containers: list[Container]
    entries: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)  # a student's codes and states


def kind_of(names: Iterable[str]) -> tuple[str, str]:
    """(kind, part): what network has tensors of these names. ("", "") if none of ours."""
    names = list(names)
    has = lambda *words: any(word in name for name in names for word in words)  # noqa: E731
    if any(name.startswith("latent_graphs.") for name in names):
        return "nac", ""
    if "pre_stitch.weight" in names or "post_stitch.weight" in names:
        part = "readin" if has("read_in.") else "readout" if has("to_logits") else "mediator"
        return "nac_student", part
    if has(".moe.", ".pre_stitch.", ".post_stitch."):
        return "vmoe", "vmoe"
    return ("vit", "") if has("blocks.", "patch_embed.") else ("", "")


def has_weights(path: Path) -> bool:
    """Whether `path` is a file of weights, or a directory of such files; nothing is opened."""
    if path.is_dir():
        return bool(weight_files(path))
    return path.is_file() and path.suffix in SUFFIXES


def weight_files(directory: Path) -> list[Path]:
    """Module files in a directory, or where the published program leaves them below it."""
    found = [*directory.iterdir(), *directory.glob("*/finished_checkpoint.pth")]
    found = [file for file in found if file.is_file() and file.suffix in SUFFIXES]
    return sorted(found, key=_natural)


def _natural(path: Path) -> list:
    return [int(w) if w.isdecimal() else w for w in re.split(r"(\d+)", str(path))]


def read_file(path: Path) -> Contents:
    """Opens one file.

    Raises:
        UserError: it cannot be read, or has no weights where the layouts above have them.
    """
    if path.suffix == safetensors_file.SUFFIX:
        tensors, metadata = safetensors_file.read_safetensors(path)
        entries = {key: _json(value) for key, value in metadata.items() if key != "format"}
        return _flat(tensors, entries, path)
    return contents_of(torch_file.read_torch(path), path)


def contents_of(content: Any, path: Path) -> Contents:
    """What an unpickled file holds. Raises UserError as `read_file` does."""
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint or state dict")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _flat(dict(content), {}, path)
    return _checkpoint(dict(content), path)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _flat(tensors: dict, entries: dict, path: Path) -> Contents:
    """Tensors by name and nothing around them."""
    extra = {name: tensors.pop(name) for name in EXTRA if name in tensors}
    index = entries.get("block_index")
    index = index if type(index) is int else None
    kept = {name: value for name, value in entries.items() if _plain(value)}
    return Contents([_container((), tensors, path, index)], kept, extra=extra)


def _checkpoint(content: dict, path: Path) -> Contents:
    def having(keys: tuple[str, ...]) -> list[str]:
        return [key for key in keys if isinstance(content.get(key), dict) and content[key]]

    present = having(WEIGHT_KEYS) or having(_AVERAGES)
    if len(present) != 1:
        listed = ", ".join(list(content)[:12]) or "nothing"
        raise UserError(
            f"{path} has {'no weights' if not present else 'weights twice'}: one of "
            f"{', '.join(WEIGHT_KEYS)} should be in it; it has {listed}"
        )
    key = present[0]
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
        if name in EXTRA and isinstance(value, Tensor):
            contents.extra[name] = value
        elif name not in _REASONS and _plain(value):
            contents.entries[name] = value
        else:
            contents.ignored[name] = _REASONS.get(name, "not weights")
    return contents


def _container(keys: tuple, tensors: Any, path: Path, module: int | None = None) -> Container:
    where = ".".join(map(str, keys)) or "the file"
    if not isinstance(tensors, dict) or not all(isinstance(n, str) for n in tensors):
        raise UserError(f"{path}: {where} is no state dict")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f'{path}: "{name}" in {where} is a {type(value).__name__}, no tensor')
    # What torch's data-parallel and compiling wrappers put before every name.
    prefix = ""
    wrapped = lambda word: all(name.startswith(prefix + word) for name in tensors)  # noqa: E731
    while tensors and (found := [word for word in _WRAPPERS if wrapped(word)]):
        prefix += found[0]
    return Container(keys, {n.removeprefix(prefix): t for n, t in tensors.items()}, prefix, module)


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 100 and all(_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float | bool)


def record(contents: Contents) -> dict:
    """The layout of one file as JSON."""
    containers = [
        {"keys": list(c.keys), "prefix": c.prefix, "module": c.module, "names": list(c.tensors)}
        for c in contents.containers
    ]
    return {"containers": containers, "entries": contents.entries}


def stage_depths(contents: Contents, path: Path) -> list[int] | None:
    """Blocks of each stage: as the file says, and as its names count them."""
    said = contents.entries.get("divided_depths")
    counted: dict[int, set[int]] = {}
    for container in contents.containers:
        for name in container.tensors:
            stage, inside = _split_stage(name, container.module)
            block = BLOCK.match(inside)
            if stage is not None:
                counted.setdefault(stage, set()).update({int(block[1])} if block else ())
    found = {stage: len(blocks) for stage, blocks in counted.items()}
    if said is not None and not (
        isinstance(said, list) and said and all(type(d) is int and d >= 0 for d in said)
    ):
        raise UserError(f"{path}: divided_depths is {said!r}, not a list of depths")
    if not found and said is None:
        return None
    if said is None and sorted(found) != list(range(len(found))):
        raise UserError(f"{path}: stages {sorted(found)[:20]} are not all from 0 on")
    depths = said if said is not None else [found[i] for i in range(len(found))]
    for stage, count in found.items():
        if not 0 <= stage < len(depths):
            raise UserError(f"{path}: there is no module {stage} in the depths {depths}")
        if depths[stage] != count:
            raise UserError(f"{path}: module {stage} has {count} blocks; the depths are {depths}")
    return depths


def _split_stage(name: str, module: int | None) -> tuple[int | None, str]:
    match = _STAGE.match(name)
    return (int(match[1]), match[2]) if match else (module, name)


def canonical(name: str, module: int | None, depths: list[int] | None) -> str:
    """A tensor's name in the whole network."""
    stage, inside = _split_stage(name, module)
    block = BLOCK.match(inside)
    if stage is None or not block or depths is None:
        return inside
    return f"blocks.{int(block[1]) + sum(depths[:stage])}.{block[2]}"


def whole_name(name: str, depths: list[int]) -> str:
    """'student_2/blocks.0.x' -> 'blocks.N.x' of the assembled network."""
    match = re.match(r"student_(\d+)/(?:blocks\.(\d{1,6})\.)?(.+)$", name)
    if match[2] is None:
        return match[3]
    return f"blocks.{int(match[2]) + sum(depths[: int(match[1])])}.{match[3]}"


def is_stitch(name: str) -> bool:
    return bool(_STITCH.match(name))


def expert_names(name: str, experts: int) -> list[str] | None:
    """The names of the single experts' tensors that one of older FastMoE releases holds."""
    match = _EXPERTS.match(name)
    return [f"{match[1]}.{e}.{match[2]}" for e in range(experts)] if match else None


def published_layout(names: list[str], depths: list[int] | None) -> dict:
    """The layout that the published programs would give a network of these canonical names."""
    stages = stage_containers(names, depths) if depths else []
    whole = [f"stages.{i}.{n}" for i, stage in enumerate(stages) for n in stage["names"]] + names
    containers = [{"keys": ["model"], "prefix": "", "module": None, "names": whole}, *stages]
    return {"files": {"": {"containers": containers, "entries": {}}}, "depths": depths}


def stage_containers(names: list[str], depths: list[int]) -> list[dict]:
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
