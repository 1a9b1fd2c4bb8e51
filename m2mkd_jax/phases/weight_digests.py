"""Digests of the weights that stand for jobs, by which others in their place are noticed.

inputs.json says by the config what a job's result depends on. That alone does not tell weights of
`config.init` that were made anew under the same path, nor a job that was extended from one that was
trained at once: a job keeps the digests of what it stands on beside its inputs.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.conversion.open_weights import HUB
from m2mkd_jax.conversion.torch_layouts import weight_files
from m2mkd_jax.errors import UserError
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.weight_files import init_path, weights_path

NETWORK = "init.network"  # the name of what e2e starts from, beside those of jobs


def digests(
    config: ConfigDict, workdir: Path, needs: tuple[str, ...], phases: tuple[Phase, ...] = ()
) -> dict[str, str]:
    """Digests of the weights that a job stands on, as far as they are there.

    Args:
        config: of the run.
        workdir: its directory.
        needs: jobs whose weights, or what stands for them, it starts from or measures.
        phases: that it trains; those that start from config.init.network stand on it.

    Returns:
        By job, and `NETWORK`. Weights on the hub have their address in place of a digest.
    """
    wanted = {needed: (needed, False) for needed in needs}
    if any(s.weights.kind == "init" for phase in phases for s in phase.stages.values()):
        wanted[NETWORK] = ("e2e", True)
    found = {}
    for name, (job, initial) in wanted.items():
        given = config.init.network if initial else init_path(config, job)[1]
        if given.startswith(HUB):
            found[name] = given
            continue
        try:
            path = weights_path(config, workdir, job, initial)
        except UserError:  # not there
            continue
        found[name] = digest(path)
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of weights that have another digest than before; not those that are gone."""
    return sorted(name for name in before if now.get(name, before[name]) != before[name])


def digest(path: Path) -> str:
    """Of the arrays of a directory of weights, or of the bytes of the files."""
    if (path / "description.json").is_file():
        sums = read_record(path / "description.json").get("trees")
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
    files = weight_files(path) if path.is_dir() else [path]
    if path.suffix == ".index":  # Google's shards, which it lists
        files += sorted(path.parent.glob(f"{path.stem}.data-*"))
    whole = hashlib.sha256()
    for file in files:
        facts: Any = file.stat()
        if hasattr(facts, "st_size"):
            size, written = facts.st_size, facts.st_mtime_ns
        else:  # a file in a bucket
            size, written = facts.length, facts.mtime
        whole.update(_of_file(file, size, written).encode())
    return whole.hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _of_file(path: Path, size: int, written: float) -> str:
    """Of a file's bytes; read once as long as size and time of the last change are the same."""
    del size, written
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
