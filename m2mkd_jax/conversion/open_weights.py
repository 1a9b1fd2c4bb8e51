"""Weights wherever they lie: trained or converted ones, torch files, the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd_jax.checkpoint.files import read_json
from m2mkd_jax.checkpoint.store import load_weights
from m2mkd_jax.conversion.from_torch import convert, read_converted
from m2mkd_jax.conversion.torch_layouts import SUFFIXES
from m2mkd_jax.conversion.torch_weights import read_torch_weights
from m2mkd_jax.errors import UserError

HUB = "hf://"


@dataclass(frozen=True)
class Weights:
    """Trees by name, read when asked for, and what they are (models/registry.py)."""

    description: dict[str, Any]
    trees: Mapping[str, dict]


class _Stored(Mapping):
    def __init__(self, path: Path, names: list[str]):
        self.path, self.names = path, names

    def __getitem__(self, name: str) -> dict:
        return load_weights(self.path, [name])[0][name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def find_weights(path: Path) -> Path | None:
    """The directory of Orbax weights that `path` means: itself, a job's, or a run's network.

    Raises:
        UserError: a run without a finished network.
    """
    inside = [path, path / "weights", path / "jobs" / "e2e" / "weights"]
    for directory in inside:
        if (directory / "description.json").is_file():
            return directory
    if (path / "jobs").is_dir():
        jobs = sorted(p.parent for p in (path / "jobs").glob("**/weights/description.json"))
        names = ", ".join(str(p.parent.relative_to(path)) for p in jobs) or "none is finished"
        raise UserError(f"{path} is a run without a finished e2e; give one of its jobs: {names}")
    return None


def open_weights(
    path: str | Path,
    arch: str = "",
    image_size: int = 0,
    seed: int = 0,
    fields: Mapping[str, Any] | None = None,
) -> Weights:
    """Opens weights of any kind.

    Args:
        path: a directory of Orbax weights, a job, a run, a torch or safetensors file, a directory
            of module files, or hf://OWNER/REPOSITORY/FILE.
        arch, image_size, seed: for torch weights, see conversion.read_converted.
        fields: of a torch network, instead of `arch` (checkpoint/arch.py).

    Raises:
        UserError: nothing there, or it cannot be read.
    """
    local = local_path(path)
    stored = find_weights(local)
    if stored is None:
        if fields is None:
            converted = read_converted(local, arch, image_size, seed)
        else:
            converted = convert(read_torch_weights(local), dict(fields), local, seed)
        return Weights(converted.description, converted.trees)
    _, description = load_weights(stored, [])
    names = list(read_json(stored / "description.json")["trees"])
    return Weights(description, _Stored(stored, names))


def validate(path: str | Path, use: Callable[[], Any]) -> Any:
    """What `use` makes of weights. Raises UserError where their description is not theirs.

    It is a file that anybody can have edited, and says what stages there are, how they are built
    and what files they came from: whatever Python makes of nonsense in it means the same.
    """
    try:
        return use()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path}: description.json does not fit its weights ({reason})") from None


def local_path(path: str | Path) -> Path:
    """A path on this machine; what is on the hub is downloaded first, with progress.

    Raises:
        UserError: nothing is there, huggingface_hub is missing, or the download fails.
    """
    text = str(path)
    if text.startswith(HUB):
        return _download(text)
    local = Path(text).expanduser()
    if not local.exists():
        raise UserError(f"{local} does not exist")
    return local


def _download(url: str) -> Path:
    owner, _, rest = url.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{url}: give hf://OWNER/REPOSITORY/FILE")
    try:
        import huggingface_hub  # noqa: PLC0415 (an optional extra)
    except ImportError:
        raise UserError(
            f"{url} needs huggingface_hub: pip install 'm2mkd_jax[convert]'; or download the file"
        ) from None
    name = f"{owner}/{repository}"
    # It warns of every try, twice; what comes of them is the file or an error.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # The library raises its own, requests', and the system's errors: all mean no file.
    try:
        if file.endswith(SUFFIXES):
            return Path(huggingface_hub.hf_hub_download(name, file))
        folder = huggingface_hub.snapshot_download(name, allow_patterns=[f"{file}/*"])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url} cannot be downloaded: {reason[:200]}") from None
    finally:
        logging.disable(before)
    if not (Path(folder) / file).is_dir():
        raise UserError(f"{url}: the repository has no such folder")
    return Path(folder) / file
