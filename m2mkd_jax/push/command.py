"""The work of `python -m m2mkd_jax.push`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2mkd_jax.checkpoint.trees import flatten
from m2mkd_jax.conversion.bundle import write_bundle
from m2mkd_jax.conversion.open_weights import (
    Weights,
    description_errors,
    hub_endpoint,
    open_weights,
)
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import at_home
from m2mkd_jax.push.card import model_card
from m2mkd_jax.push.training_record import read_training_record

# What the hub allows: letters, digits, "-", "_" and "." that do not begin or end a name.
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"


def run(args: argparse.Namespace) -> None:
    """Writes the files of a repository and pushes them.

    Raises:
        UserError: the input is wrong, or the hub refuses; nothing is left on this machine.
    """
    if not re.fullmatch(f"{_NAME}/{_NAME}", args.repository):
        raise UserError(f'"{args.repository}" names no repository; give OWNER/NAME')
    if args.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise UserError(f"--license={args.license}: give an identifier, such as apache-2.0 or mit")
    hub = None if args.out else _hub()
    weights = open_weights(args.checkpoint, args.arch)
    if args.out:
        folder = at_home(args.out)
        if folder.exists():
            raise UserError(f"--out: {folder} is there already; choose another")
        _write_directory(folder, weights, args)
        print(f"{args.checkpoint} -> {folder}: {_listed(folder)}")
        return
    with tempfile.TemporaryDirectory(prefix="m2mkd-push-") as name:
        folder = Path(name) / "files"
        _write_directory(folder, weights, args)
        url = _upload(hub, folder, args)
        print(f"{args.checkpoint} -> {url}: {_listed(folder)}")
    print(f'm2mkd_jax.load("hf://{args.repository}") loads it')


def _hub() -> Any:
    """huggingface_hub. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError("push needs huggingface_hub: pip install 'm2mkd_jax[hub]'") from None


def _write_directory(folder: Path, weights: Weights, args: argparse.Namespace) -> None:
    """Writes the files; the directory appears complete or not at all."""
    tmp = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        write_bundle(tmp, weights.description, weights.trees)
        record = read_training_record(at_home(args.checkpoint), weights.description)
        with description_errors(args.checkpoint):
            counts = {n: _parameters(weights.trees[n]) for n in weights.trees}
            card = model_card(args.repository, args.license, weights.description, counts, record)
        (tmp / "README.md").write_text(card, encoding="utf-8")
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _parameters(tree: dict[str, Any]) -> int:
    return sum(leaf.size for leaf in flatten(tree["params"]).values())


def _upload(hub: Any, folder: Path, args: argparse.Namespace) -> str:
    """Makes the repository if need be and commits all files at once; its address."""
    api = hub.HfApi(endpoint=hub_endpoint())
    with _hub_errors(args.repository):
        made = api.create_repo(args.repository, private=args.private or None, exist_ok=True)
        api.upload_folder(
            repo_id=args.repository,
            folder_path=folder,
            commit_message=args.message or "Weights, config and model card from m2mkd_jax.push",
        )
    return str(made)


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Reports what the hub, or the way to it, answers as a UserError."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it logs every retry; the outcome is one error
    try:
        yield
    except Exception as error:  # its own errors, those of its HTTP client, of the system
        status = getattr(getattr(error, "response", None), "status_code", 0)
        hint = ""
        if status in (401, 403):
            hint = "; log in (hf auth login, or HF_TOKEN) with a token that may write there"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repository} cannot be pushed: {reason[:200]}{hint}") from None
    finally:
        logging.disable(before)


def _listed(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in files)
