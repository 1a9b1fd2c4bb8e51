"""A NAC with the weights of its students, assembled by the published rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2mkd_jax.conversion.converted import Converted, Tree, Trees
from m2mkd_jax.conversion.infer_nac import assembled_spec
from m2mkd_jax.conversion.names import array_at
from m2mkd_jax.conversion.names_nac import nac_names
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.models import chain, registry
from m2mkd_jax.models.nac import priors
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.students import assemble


def carried_parts(
    students: Mapping[str, Any], network: NACSpec, student_type: str
) -> tuple[bool | None, bool | None]:
    """Whether a NAC takes the positional grid and the output pooling of its students.

    The published program takes both or neither, by its option `student_type`: both for ImageNet,
    neither for Tiny-ImageNet. For the latter it expects "tinynet"; its configs say "tinyimnet", and
    then it takes the grid too, or stops if the grid does not fit. Without the option, both are
    taken if students and network are for the same task.

    Args:
        students: their fields.
        network: the NAC's fields.
        student_type: the published option, "" if it is not stated.

    Returns:
        For the grid and for the pooling: True, False, or None for "if it fits".

    Source: docs/reference.md#nac-assembly.
    """
    task = (students["image_size"], students["classes"])
    same_task = task == (network.image_size, network.classes)
    by_type: dict[str, tuple[bool | None, bool | None]] = {
        "imagenet": (True, True),
        "tinynet": (False, False),
        "tinyimnet": (None, False),
    }
    return by_type.get(student_type, (same_task, same_task))


def assembled_nac(
    students: Trees,
    description: dict[str, Any],
    given: Mapping[str, Any],
    path: Path,
    seed: int,
    report: Report,
) -> Converted:
    """A NAC with the weights of its students; the arrays that they do not have are drawn.

    Args:
        students: their trees, in order.
        description: of the set of students.
        given: the fields of `--arch`, of the NAC.
        path: of the weights, for messages.
        seed: of what is drawn.
        report: of the students; gets the places in the NAC when its tree is made.

    Raises:
        UserError: a field of the NAC is missing or does not fit the students.
    """
    spec = assembled_spec(description, given, str(path))
    known = description["normalisation"]
    network = {"kind": "nac", "spec": dataclasses.asdict(spec), "normalisation": known}
    build = registry.builder(network, "nac")
    grid, pooling = carried_parts(description["spec"], spec, given.get("student_type", ""))

    def make() -> Tree:
        fresh = jax.tree.map(np.array, chain.initialise(build, jax.random.key(seed)).params)
        prior = given.get("prior", "none")
        if prior != "none":
            options = dict(given.get("prior_options") or {})
            count, dim = spec.mediator_latents, spec.signature_dim
            signatures = priors.prior_signatures(prior, count, dim, options, seed)
            fresh["mediator_latents"]["signatures"] = np.array(signatures)
        distilled = [students[name]["params"] for name in students]
        params, _ = assemble(fresh, distilled, carry_grid=grid, carry_pooling=pooling)
        params = jax.tree.map(np.asarray, params)
        targets = {(e.path, e.index): e.torch for e in nac_names(spec)}
        # An array that no student replaced is still the same object.
        kept = {t for t in targets if array_at(params, t[0]) is array_at(fresh, t[0])}
        report.assembled(targets, kept, len(distilled), seed)
        return {"params": params}

    return Converted(network, Trees({"nac": make}), report)
