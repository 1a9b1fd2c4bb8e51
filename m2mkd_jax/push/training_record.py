"""What a run's directory says of how its weights were trained, for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.errors import UserError


@dataclass(frozen=True)
class TrainingRecord:
    """Of weights that a run has trained.

    Attributes:
        config: of the run; {}: the weights are not in a run's directory.
        results: of its summary.json, by title.
        accuracy_of: which images they are of, where validation images are held out; else "".
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    accuracy_of: str = ""


def read_training_record(path: Path, description: Mapping[str, Any]) -> TrainingRecord:
    """The record of the run that the weights at `path` lie in, if they do.

    Args:
        path: of the run, of one of its jobs, or of a job's weights.
        description: of the weights; those without a job were not trained here.

    Raises:
        UserError: a file of the run is damaged.
    """
    if not description.get("job"):
        return TrainingRecord()
    for directory in (path, *path.absolute().parents[:6]):
        if (directory / "config.json").is_file() and (directory / "jobs").is_dir():
            summary = directory / "summary.json"
            found = read_record(summary) if summary.is_file() else {}
            results = found.get("results", {})
            if not isinstance(results, dict):
                raise UserError(f"{summary} is damaged: its results are no object; delete it")
            return TrainingRecord(
                read_record(directory / "config.json"), results, str(found.get("accuracy_of", ""))
            )
    return TrainingRecord()
