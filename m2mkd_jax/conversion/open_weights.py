"""Opens weights of any kind: trained or converted ones, torch files, files of the hub."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.checkpoint.store import load_weights
from m2mkd_jax.conversion.bundle import CONFIG, WEIGHTS, is_bundle, read_bundle
from m2mkd_jax.conversion.from_torch import (
    convert_from_torch,
    convert_torch_weights,
    read_weights,
)
from m2mkd_jax.conversion.torch_layouts import SUFFIXES
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import at_home, file_names, in_bucket

HUB = "hf://"


@dataclass(frozen=True)
class Weights:
    """Opened weights.

    Attributes:
        description: of the network (models/registry.py).
        trees: by name; each is read when it is looked up.
    """

    description: dict[str, Any]
    trees: Mapping[str, dict[str, Any]]


class _StoredTrees(Mapping[str, dict[str, Any]]):
    """The trees of a directory of weights."""

    def __init__(self, directory: Path, names: list[str]):
        self.directory, self.names = directory, names

    def __getitem__(self, name: str) -> dict[str, Any]:
        return load_weights(self.directory, [name])[0][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def find_weights(path: Path) -> Path | None:
    """The directory of weights that a path means: itself, a job's, or that of a run's network.

    Returns:
        The directory; None if `path` has no weights that this program wrote.

    Raises:
        UserError: it is a run without a finished network, or lies in a bucket and has none.
    """
    for directory in (path, path / "weights", path / "jobs" / "e2e" / "weights"):
        if (directory / "description.json").is_file():
            return directory
    if is_bundle(path):
        return path
    if (path / "jobs").is_dir():
        root, end = path / "jobs", "weights/description.json"
        jobs = [(root / name).parent for name in file_names(root) if name.endswith(end)]
        names = ", ".join(str(p.parent.relative_to(path)) for p in jobs) or "none is finished"
        raise UserError(f"{path} is a run without a finished e2e; give one of its jobs: {names}")
    if in_bucket(path):
        raise UserError(
            f"{path} has no weights of this program; torch files are read from local paths: copy it"
        )
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
        path: a directory of weights, a job's or a run's directory, a torch or safetensors file, a
            directory of module files, or hf://OWNER/REPOSITORY[/FILE].
        arch: of torch weights, see `from_torch.convert_from_torch`.
        image_size: likewise.
        seed: likewise.
        fields: of torch weights, the fields that `arch` would state (arch_flag.py).

    Raises:
        UserError: there are no weights, or they cannot be read.
    """
    local = local_path(path)
    stored = find_weights(local)
    if stored is None:
        if fields is None:
            converted = convert_from_torch(local, arch, image_size, seed)
        else:
            converted = convert_torch_weights(read_weights(local), fields, local, seed)
        return Weights(converted.description, converted.trees)
    if is_bundle(stored):
        return Weights(*read_bundle(stored))
    _, description = load_weights(stored, [])
    names = list(read_record(stored / "description.json")["trees"])
    return Weights(description, _StoredTrees(stored, names))


@contextlib.contextmanager
def description_errors(path: str | Path) -> Iterator[None]:
    """Reports what a wrong description causes as a UserError.

    description.json says how the stages are built and in which files they were; anybody can edit
    it, so any Python error while it is used means that it does not fit the weights.

    Args:
        path: of the weights, for the message.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path}: description.json does not fit its weights ({reason})") from None


def local_path(path: str | Path) -> Path:
    """A path on this machine or in a bucket; one on the hub is downloaded first, with progress.

    Raises:
        UserError: it does not exist, huggingface_hub is missing, or the download fails.
    """
    text = str(path)
    if text.startswith(HUB):
        return _download(text)
    local = at_home(text)
    if not local.exists():
        raise UserError(f"{local} does not exist")
    return local


def hub_endpoint() -> str | None:
    """Where the hub is, if $HF_ENDPOINT says so."""
    return os.environ.get("HF_ENDPOINT") or None


def _download(url: str) -> Path:
    """Downloads a file, or a folder, of hf://OWNER/REPOSITORY/FILE; without FILE a bundle."""
    owner, _, rest = url.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository):
        raise UserError(f"{url}: give hf://OWNER/REPOSITORY, or a FILE in it after another /")
    try:
        hub: Any = importlib.import_module("huggingface_hub")  # an optional extra
    except ImportError:
        raise UserError(
            f"{url} needs huggingface_hub: pip install 'm2mkd_jax[hub]'; or download the file"
        ) from None
    name = f"{owner}/{repository}"
    where = {"endpoint": endpoint} if (endpoint := hub_endpoint()) else {}
    # It logs warnings of every retry; the outcome is the file or one error.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # It raises errors of its own, of requests and of the system: all mean that there is no file.
    try:
        if file.endswith(SUFFIXES):
            return Path(hub.hf_hub_download(name, file, **where))
        wanted = [f"{file}/*"] if file else [CONFIG, WEIGHTS]
        folder = hub.snapshot_download(name, allow_patterns=wanted, **where)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url} cannot be downloaded: {reason[:200]}") from None
    finally:
        logging.disable(before)
    if not file and not is_bundle(Path(folder)):
        raise UserError(
            f"{url} holds no weights that m2mkd_jax.push wrote; give a file, {url}/FILE, and --arch"
        )
    if not (Path(folder) / file).is_dir():
        raise UserError(f"{url}: the repository has no such folder")
    return Path(folder) / file
