"""Refuses processes of a run that were started with other configs, code, flags or data."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.config.values import leaves
from m2mkd_jax.jobs.plan import Kind, Plan
from m2mkd_jax.jobs.run import image_source
from m2mkd_jax.parallel.agreement import check_same, code_versions
from m2mkd_jax.parallel.process import alone

# Keys by their ends that may differ: where data lie on a machine, and how many cores it has.
OF_THE_MACHINE = ("root", "workers")


def check_same_start(config: ConfigDict, flags: dict[str, str]) -> None:
    """Compares code, config and flags with those of process 0.

    Args:
        config: of the run.
        flags: values by flag.

    Raises:
        UserError: one line that says what differs, and where.
    """
    check_same(code_versions(), "install the same on all machines")
    values = {
        f"config.{name}": _plain(value)
        for name, value in leaves(config)
        if name.rpartition(".")[2] not in OF_THE_MACHINE
    }
    check_same(values | flags, "start all processes with the same config and flags")


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
        splits = ("test",) if job.kind is Kind.EVALUATION else ("train", "validation")
        for phase, split in itertools.product(job.phases, splits):
            source = image_source(phase.data, split)
            names = hashlib.sha256("\n".join(source.class_names).encode("utf-8", "replace"))
            what = f"of the {split} images of config.{phase.data_key}"
            facts[f"the number {what}"] = len(source)
            facts[f"the number of classes {what}"] = len(source.class_names)
            facts[f"the sha256 of the class names {what}"] = names.hexdigest()[:12]
    check_same(facts, "all processes must read the same data")


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value
