"""The analysis pass: what the report needs the networks for, computed once and kept.

Results lie in DIR/report/analysis.json (numbers) and analysis.npz (arrays). They are computed
again when a job has finished since, or another number of images is asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m2mkd_jax import __version__
from m2mkd_jax.checkpoint.files import read_record, replace_file, write_record
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.data_checks import check_names
from m2mkd_jax.jobs.dry_run import job_costs, planned_mesh
from m2mkd_jax.jobs.run import image_source
from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.phases.build import END_TO_END, build_phase
from m2mkd_jax.phases.initial_weights import load_stages
from m2mkd_jax.phases.weight_files import read_recorded
from m2mkd_jax.report.measure import (
    Images,
    LoadedStage,
    Weights,
    measure_modules,
    run_chain,
    test_images,
)
from m2mkd_jax.report.measure_families import (
    links_of,
    measure_experts,
    measure_nac,
    prior_graph,
)
from m2mkd_jax.report.records import RunRecord

FOLDER = "report"


@dataclass
class Analysis:
    """What the pass has found.

    Attributes:
        numbers: costs by job, modules by number, class_names, images.
        arrays: by name, such as logits/e2e or nac/links.
        notes: what could not be computed, a sentence each.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def costs(self) -> Mapping[str, Mapping[str, float]]:
        """By job, flops_per_step, memory, and of kept targets flops_once."""
        return self.numbers.get("costs", {})


def analyse(run: RunRecord, images: int, say: Callable[[str], object] = print) -> Analysis:
    """The results of the pass, kept ones where they are of the same jobs.

    Args:
        run: the run.
        images: test images at the most.
        say: takes a line on what is being done.
    """
    key = _key(run, images)
    kept = read_kept(run.path, key)
    if kept is not None:
        return kept
    found = Analysis(numbers={"key": key, "images_at_most": images})
    try:
        config = run.restored
    except UserError as error:
        found.notes.append(f"Nothing was analysed: {error}.")
        return found
    say(f"{run.path}: counting FLOPs and measuring networks on {images} test images ...")
    for part in (_costs, _predictions, _modules, _circuit, _experts):
        try:
            part(run, config, images, found)
        except UserError as error:
            found.notes.append(f"{_sentence(part)}: {error}.")
    try:
        _keep(run.path, found)
    except (OSError, UserError) as error:
        found.notes.append(f"The analysis could not be kept: {error}.")
    return found


def _sentence(part: Callable[..., None]) -> str:
    return f"No {(part.__doc__ or '').partition(';')[0].rstrip('.').lower()}"


def _key(run: RunRecord, images: int) -> str:
    """Equal where the pass would find the same."""
    jobs = {name: job.result for name, job in run.jobs.items()}
    text = json.dumps([__version__, images, run.config, jobs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_analysis(run: RunRecord) -> Analysis:
    """What is kept, with a note where it is of an earlier state of the run; else nothing."""
    kept = read_kept(run.path)
    if kept is None:
        return Analysis()
    if kept.numbers.get("key") != _key(run, kept.numbers.get("images_at_most", 0)):
        kept.notes.append(
            "What the analysis has found is of an earlier state of this run; without --no_analysis "
            "it is found anew."
        )
    return kept


def read_kept(path: Path, key: str | None = None) -> Analysis | None:
    """Kept results of a run's directory; None where there are none, or of another key."""
    folder = path / FOLDER
    try:
        numbers = read_record(folder / "analysis.json")
        content = io.BytesIO((folder / "analysis.npz").read_bytes())
        with np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception:  # damaged files raise anything in zipfile, zlib and numpy
        return None
    if key is not None and numbers.get("key") != key:
        return None
    return Analysis(numbers, arrays, list(numbers.get("notes", ())))


def _keep(path: Path, found: Analysis) -> None:
    folder = path / FOLDER
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **found.arrays)
    replace_file(folder / "analysis.npz", lambda tmp: _write(tmp, out.getvalue()))
    write_record(folder / "analysis.json", found.numbers | {"notes": found.notes})


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _costs(run: RunRecord, config: ConfigDict, images: int, found: Analysis) -> None:
    """FLOPs and memory; of the jobs that have trained."""
    del images
    mesh, costs = planned_mesh(config), dict[str, dict[str, float]]()
    for job in run.jobs.values():
        if job.phase in ("fewshot", "eval") or not job.steps:
            continue
        same = f"{job.phase}" if job.phase in END_TO_END and job.index else ""
        if same in costs:
            costs[job.name] = costs[same]
            continue
        phase = build_phase(config, job.name)
        counted = job_costs(config, phase, mesh)
        batch = phase.recipe.batch // phase.recipe.accumulate
        costs[job.name] = {
            "flops_per_step": counted.training * batch,
            "memory": counted.memory,
            "flops_per_image": counted.forward,
        }
        if counted.targets:
            try:
                trained_on = len(image_source(phase.data, "train"))
            except UserError as error:
                found.notes.append(f"FLOPs of {job.name} are without its kept targets: {error}.")
                continue
            costs[job.name]["flops_once"] = counted.targets * phase.views * trained_on
    found.numbers["costs"] = costs


def _finished(run: RunRecord, name: str) -> bool:
    return name in run.jobs and run.jobs[name].status == "done"


def _predictions(run: RunRecord, config: ConfigDict, images: int, found: Analysis) -> None:
    """Predictions; of finished end-to-end networks of the first seed, else of the teacher."""
    names = [name for name in END_TO_END if _finished(run, name)]
    names = names or [name for name in ("ft", "pt") if _finished(run, name)][:1]
    weights = Weights(config, run.path)
    for name in names:
        own = _images_of(run, config, name, images)
        logits = run_chain(weights.network(name), own.normalised)
        found.arrays[f"logits/{name}"] = logits.astype(np.float32)
        found.arrays["labels"], found.numbers["split"] = own.labels, own.split
        found.numbers["class_names"] = list(own.class_names)
        if name == names[0]:
            found.numbers["main"] = name
            shown = _samples(logits, own.labels)
            found.arrays["samples"] = shown
            found.arrays["sample_images"] = own.pixels[shown]
    found.numbers["images"] = len(found.arrays.get("labels", ()))


def _images_of(run: RunRecord, config: ConfigDict, job: str, images: int) -> Images:
    """Test images of a job.

    Raises:
        UserError: they cannot be read, or are not of the classes that its weights record.
    """
    phase, recorded = build_phase(config, job), read_recorded(config, run.path, job)
    own = test_images(phase.data, images)
    origin = f"the weights in {recorded.path}"
    check_names(phase.data_key, own.class_names, recorded.class_names, origin)
    return own


def _samples(logits: np.ndarray, labels: np.ndarray, count: int = 8) -> np.ndarray:
    """Images to show: some that are right, evenly spread, and the wrong ones of most confidence."""
    right = np.flatnonzero(logits.argmax(-1) == labels)
    wrong = np.flatnonzero(logits.argmax(-1) != labels)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = (shifted / shifted.sum(-1, keepdims=True)).max(-1)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    if len(right) > count:
        right = right[np.linspace(0, len(right) - 1, count).astype(int)]
    return np.concatenate([right, wrong])


def _modules(run: RunRecord, config: ConfigDict, images: int, found: Analysis) -> None:
    """Health of the modules; of finished students, beside their teachers."""
    done = [job.index for job in run.of_phase("m2mkd") if job.status == "done"]
    if done:
        own = _images_of(run, config, "pt", images)
        found.numbers["modules_split"] = own.split
        found.numbers["modules"] = measure_modules(Weights(config, run.path), own, done)


def _network(run: RunRecord, config: ConfigDict, images: int) -> tuple[list[LoadedStage], Images]:
    """The network trained from students, or another of the first seed, and test images.

    Without a finished one there are no stages.
    """
    name = next((name for name in END_TO_END if _finished(run, name)), "")
    if not name:
        return [], Images(np.zeros(0), np.zeros(0), (), config.data)
    own = _images_of(run, config, name, images)
    return Weights(config, run.path).network(name), own


def _circuit(run: RunRecord, config: ConfigDict, images: int, found: Analysis) -> None:
    """Circuit; a NAC's links and attention, before and after training end to end."""
    if config.family != "nac":
        return
    stages, own = _network(run, config, images)
    if not stages or not isinstance(stages[0].merged, NAC):
        return
    for name, array in measure_nac(stages[0], own).items():
        found.arrays[f"nac/{name}"] = array
    nac, name = config.nac, next(name for name in END_TO_END if _finished(run, name))
    options = dict(nac.options)
    found.arrays["nac/prior"] = prior_graph(nac.prior, nac.mediator_latents, options, config.seed)
    phase = build_phase(config, name)
    initial = load_stages(config, run.path, phase)[0]["nac"]
    graph = chain.abstract(phase.stages["nac"].build).graph
    for key, array in links_of(LoadedStage(graph, initial["params"], initial["fixed"], 1)).items():
        found.arrays[f"nac/initial_{key}"] = array


def _experts(run: RunRecord, config: ConfigDict, images: int, found: Analysis) -> None:
    """Classes by expert; where a V-MoE sends the tokens of each class."""
    if config.family != "vmoe":
        return
    stages, own = _network(run, config, images)
    if stages:
        for name, array in measure_experts(stages, own).items():
            found.arrays[f"vmoe/{name}"] = array
