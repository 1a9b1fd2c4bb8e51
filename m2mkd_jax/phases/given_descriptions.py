"""Refuses weights of `config.init` whose description tells of another network than the config's.

Shapes do not tell all: a transformer of other heads has the same arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import plain
from m2mkd_jax.conversion.open_weights import description_errors
from m2mkd_jax.errors import UserError
from m2mkd_jax.phases.phase import WeightsFrom
from m2mkd_jax.phases.weight_files import described, read_description, weights_path

# Fields that shapes tell, that weights are adapted to, or that change no number.
_ELSEWHERE = {"image_size", "classes", "channels", "remat", "fused"}
# Those of which another value is a mistake, whatever the weights are used for.
_HEADS = ("heads", "head_dim")


def other_fields(config: ConfigDict, workdir: Path, weights: WeightsFrom) -> list[str]:
    """What weights that `config.init` names say otherwise than the config, a line for each field.

    Args:
        config: of the run.
        workdir: its directory.
        weights: that are given.

    Raises:
        UserError: they are of another module, kind of network, or number of heads.
    """
    initial = weights.kind == "init"
    job = "e2e" if initial else weights.job
    path = weights_path(config, workdir, job, initial)
    have, want = read_description(path), described(config, job)
    if not have:
        return []  # torch's, whose fields are the config's
    made = str(have.get("job", ""))
    if job.startswith("m2mkd/"):  # no shapes are compared before they are assembled
        if made.startswith("m2mkd/") and made != job:
            raise UserError(f"{path} holds the weights of {made}, not those of {job}")
        if have.get("kind") != want.get("kind"):
            raise UserError(
                f"{path} holds weights of the kind {have.get('kind')!r}, not {want.get('kind')!r}"
            )
    with description_errors(path):
        lines = _differing(have.get("spec", {}), want.get("spec", {}))
    for field, line in lines.items():
        if field in _HEADS:
            raise UserError(f"{path} was made with {line}: set it in the config, or use others")
    return [f"{path} was made with {line}" for line in lines.values()]


def _differing(have: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, str]:
    """The fields that both have with other values, and both values."""
    had, wanted = plain(dict(have)), plain(dict(want))
    return {
        field: f"{field} {had[field]}, and is used with {wanted[field]}"
        for field in sorted(had.keys() & wanted.keys() - _ELSEWHERE)
        if had[field] != wanted[field]
    }
