"""done.json and inputs.json of a job: whether they are what a job leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from m2mkd_jax.checkpoint.files import read_record, write_record
from m2mkd_jax.errors import UserError


def read_result(path: Path, name: str) -> dict[str, Any]:
    """A job's done.json.

    Args:
        path: of the file.
        name: of the job.

    Raises:
        UserError: it is damaged, is no result, or is the result of another job.
    """
    record = read_record(path)
    if not _is_result(record):
        raise UserError(f"{path} is not what a finished job leaves; delete it to run {name} again")
    if record.get("name", name) != name:
        raise UserError(
            f"{path} is the result of {record['name']}; restore it, or delete it to run {name} "
            "again"
        )
    return record


def _is_result(record: Mapping[str, Any]) -> bool:
    """Whether numbers stand where a reader takes numbers."""
    networks, episodes = record.get("networks", {}), record.get("episodes", [])
    if not isinstance(networks, dict) or not isinstance(episodes, list):
        return False
    measured = [record.get("metrics"), *networks.values()]
    numbers = [record.get(key, 0) for key in ("steps", "seconds")] + episodes
    return all(map(_are_metrics, measured)) and all(map(_is_number, numbers))


def _are_metrics(found: Any) -> bool:
    """Whether scores are numbers; a group of them, and what was not finite, may stand beside."""
    return isinstance(found, dict) and all(
        _is_number(value)
        or (isinstance(value, dict | list) and not name.endswith(("accuracy", "loss")))
        or (value is None and not name.endswith("accuracy"))
        for name, value in found.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_inputs(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of inputs.json."""
    groups = ("config", "needs", "weights", "images", "run")
    return {"config", "needs"} <= record.keys() and all(
        isinstance(record.get(key, {}), dict) for key in groups
    )


def check_same_place(directory: Path, run: str) -> None:
    """Refuses to write into the directory of a job that is not the one that began it.

    Args:
        directory: of the job.
        run: the id of `run_of` when the job was begun.

    Raises:
        UserError: it has vanished, or another run's is in its place.
    """
    path = directory / "inputs.json"
    if not path.is_file():
        raise UserError(
            f"{directory} has vanished: mount its disk again, or restore it, and run the same "
            "command again"
        )
    if run_of(path)["id"] != run:
        raise UserError(
            f"{directory} is now of another run, which was begun there since; nothing more is "
            "written into it"
        )


def write_result(directory: Path, run: str, result: Mapping[str, Any]) -> None:
    """Leaves a job's done.json. Raises UserError as `check_same_place`."""
    check_same_place(directory, run)
    write_record(directory / "done.json", result)


def run_of(path: Path) -> dict[str, str]:
    """What tells a job from the same job elsewhere, and from its start before it was deleted.

    Args:
        path: of the job's inputs.json, which keeps it while the job goes on.

    Returns:
        {"id": as a job is begun a new one}.

    Raises:
        UserError: the file is damaged.
    """
    known = read_record(path).get("run") if path.is_file() else None
    return known if isinstance(known, dict) and "id" in known else {"id": uuid4().hex}
