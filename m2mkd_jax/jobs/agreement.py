"""Refuses processes of a run that were started with other configs, code, flags or data."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import renditions_data
from m2mkd_jax.config.values import leaves
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import in_bucket, make_directory
from m2mkd_jax.jobs.data_checks import names_and_labels
from m2mkd_jax.jobs.plan import Kind, Plan
from m2mkd_jax.jobs.run import image_source
from m2mkd_jax.parallel.agreement import check_same, code_versions, compiler_settings
from m2mkd_jax.parallel.process import alone, from_main, is_main, union

# Keys by their ends that may differ: where data lie on a machine, and how many cores it has.
OF_THE_MACHINE = ("root", "workers")
_LONG_AGO = 3600.0  # seconds after which no process waits for a file any more
SHARED_SECONDS = 30.0  # within which a network file system shows what another machine has written


def check_same_start(config: ConfigDict, flags: dict[str, str]) -> None:
    """Compares code, environment, config and flags with those of process 0.

    Args:
        config: of the run.
        flags: values by flag.

    Raises:
        UserError: one line that says what differs, and where.
    """
    check_same(code_versions(), "install the same on all machines")
    check_same(compiler_settings(os.environ), "start all processes in the same environment")
    values = {
        f"config.{name}": _plain(value)
        for name, value in leaves(config)
        if name.rpartition(".")[2] not in OF_THE_MACHINE
    }
    check_same(values | flags, "start all processes with the same config and flags")


def check_same_directory(workdir: Path) -> None:
    """Refuses processes that have another directory than process 0, or another disk there.

    Each would wait for ever for what the others write.

    Args:
        workdir: of the run; it is made.

    Raises:
        UserError: one line that names the processes.
    """
    if is_main():
        try:
            make_directory(workdir)
        except OSError as error:
            raise UserError(f"--workdir={workdir}: {error.strerror}") from None
    if alone():
        return
    if in_bucket(workdir):
        check_same({"--workdir": str(workdir)}, "start all processes with the same flags")
        return
    name = f".seen-{secrets.token_hex(8)}"
    if is_main():
        for left in workdir.glob(".seen-*"):  # by processes that were killed in the lines below
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _LONG_AGO:
                    left.unlink()
        (workdir / name).touch()
    sign = workdir / from_main(name)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := sign.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = union(() if seen else {jax.process_index()})
    if is_main():
        sign.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"--workdir={workdir}: what process 0 writes there is not there for process(es) "
            f"{', '.join(map(str, sorted(blind)))}; give all the same directory on a disk that "
            "all machines share, or a bucket"
        )


def check_same_data(plan: Plan, todo: Iterable[str]) -> None:
    """Compares how many images the jobs have, and of which classes, with those of process 0.

    Args:
        plan: of the run.
        todo: the jobs that are to run; their images can be opened.

    Raises:
        UserError: one line that says what differs, and where.
    """
    if alone():
        return
    facts: dict[str, Any] = {}
    for job in (plan.job(name) for name in todo):
        measured = job.kind is Kind.EVALUATION
        splits = ["test"] if measured else ["train", "validation"]
        splits += ["test"] if job.kind is Kind.FEW_SHOT else []
        for phase, split in itertools.product(job.phases, splits):
            facts |= _facts(phase.data, split, f"config.{phase.data_key}")
        for name in plan.config.evaluation.renditions if measured else ():
            facts |= _facts(renditions_data(plan.config, name), "test", name)
    check_same(facts, "all processes must read the same data")


def _facts(data: ConfigDict, split: str, where: str) -> dict[str, Any]:
    """How many images there are, and of which classes, in what order."""
    source, what = image_source(data, split), f"of the {split} images of {where}"
    names, labels = (hashlib.sha256(part).hexdigest()[:12] for part in names_and_labels(source))
    return {
        f"the number {what}": len(source),
        f"the number of classes {what}": len(source.class_names),
        f"the sha256 of the class names {what}": names,
        f"the sha256 of the labels {what}, in their order,": labels,
    }


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value
