"""Which jobs a config has, in what order, what each depends on, and which are done."""

from __future__ import annotations

import enum
import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import read_record, write_record
from m2mkd_jax.config import defaults
from m2mkd_jax.errors import UserError, did_you_mean
from m2mkd_jax.jobs.finished import is_inputs, read_result, run_of
from m2mkd_jax.phases.build import END_TO_END, build_phase
from m2mkd_jax.phases.families import students, teacher
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.weight_digests import changed, digests
from m2mkd_jax.phases.weight_files import INIT_FIELD, init_path, is_job_name, job_directory

# Keys by their ends that do not change what a job computes: where data lie, how they are decoded,
# what is recomputed instead of kept.
HARMLESS = ("root", "workers", "damaged_share", "remat", "fused")
# Keys by their ends that a job's inputs leave out where they have these values.
NEUTRAL: Mapping[str, Any] = {
    "validation": 0.0,
    "validation_seed": 0,
    "numeric_order": False,
    "orientation": False,
    "channels": 3,
    "image_column": "",
    "label_column": "",
    "sampler": "shuffle",
    "class_weights": "none",
    "layer_decay": 1.0,
    "freeze": (),
    "train_only": (),
    "linear_probe": False,
}
NEUTRAL_IN = {"data", "teaching_data", "recipes", "recipe"}  # groups that have such keys
# What a phase depends on and its network, once it is trained, does not.
TRAINING_ONLY = ("regulariser", "distillation", *(f"recipes.{name}" for name in defaults.RECIPES))
# Of config.evaluation, what the job eval measures beside its networks' accuracy.
FURTHER = ("corruptions", "reductions")
EPISODES = "episodes.jsonl"  # in the directory of a few-shot job
BESIDE = ("weights", "images", "run")  # in inputs.json, beside a job's inputs


class Kind(enum.Enum):
    """What running a job means."""

    TRAINING = enum.auto()
    FEW_SHOT = enum.auto()
    EVALUATION = enum.auto()


@dataclass(frozen=True)
class Job:
    """One job of a run.

    Attributes:
        name: such as m2mkd/3.
        kind: what running it means.
        phases: the phase that it trains, or those whose networks it measures.
        needs: jobs whose weights it starts from or measures.
        inputs: what its result depends on: values of the config by key (`config`), and the
            fingerprints of the jobs it needs (`needs`).
    """

    name: str
    kind: Kind
    phases: tuple[Phase, ...]
    needs: tuple[str, ...]
    inputs: Mapping[str, Mapping[str, Any]]

    @property
    def phase(self) -> Phase:
        """The phase that it trains."""
        (phase,) = self.phases
        return phase

    @property
    def fingerprint(self) -> str:
        """Of `inputs`: equal for jobs with equal results."""
        text = json.dumps(self.inputs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Plan:
    """The jobs of a config; each is built once.

    Attributes:
        config: of the run.
        names: of all jobs, in the order in which they can run.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.names = _job_names(config)
        self.job = functools.cache(self._job)

    def _job(self, name: str) -> Job:
        """A job by name, also one that the run leaves out because config.init brings its weights.

        Raises:
            UserError: the config describes no such networks.
        """
        config = self.config
        if name == "eval":
            kind, needs = Kind.EVALUATION, self._measured()
            phases = tuple(self.job(needed).phase for needed in needs)
            values: dict[str, Any] = {"evaluation.sampled": config.evaluation.sampled}
            if config.evaluation.sampled or config.evaluation.reductions:  # batch by batch
                values["evaluation.batch"] = config.evaluation.batch
            values |= {p.data_key: p.data for p in phases}
            for phase in phases:  # those of this run's own networks are in their fingerprints
                if init_path(config, phase.job)[1]:
                    values |= {k: v for k, v in phase.depends_on.items() if k not in TRAINING_ONLY}
            further = {key: config.evaluation[key] for key in FURTHER}
            values |= {f"evaluation.{key}": value for key, value in further.items() if value}
        else:
            phase = build_phase(config, name)
            kind = Kind.FEW_SHOT if phase.head else Kind.TRAINING
            phases, needs, values = (phase,), phase.needs, phase.depends_on
            if phase.assembled:
                needs += tuple(f"m2mkd/{i}" for i in range(students(config).modules))
        given: dict[str, Any] = {}
        for needed in needs:
            field, path = init_path(config, needed)
            if path and kind is Kind.TRAINING:
                given[f"init.{field}"] = path
        if any(s.weights.kind == "init" for phase in phases for s in phase.stages.values()):
            given["init.network"] = config.init.network
        if config.init.fresh_head and {"init.network", "init.modules"} & given.keys():
            given["init.fresh_head"] = True
        inputs = {
            "config": _plain({**_flat(values), **given}),
            "needs": {
                needed: self.job(needed).fingerprint
                for needed in needs
                if not init_path(config, needed)[1]
            },
        }
        return Job(name, kind, phases, needs, inputs)

    def _measured(self) -> tuple[str, ...]:
        """Jobs whose networks the job 'eval' measures.

        They are those of `config.evaluation.networks`, or the end-to-end ones and detectors, or
        where the run has none all networks that `config.init` names.

        Raises:
            UserError: there is no such job.
        """
        if wanted := self.config.evaluation.networks:
            chosen = self.select(",".join(wanted), "config.evaluation.networks")
            return tuple(n for n in chosen if n.partition("/")[0] not in ("fewshot", "eval"))
        measured = (*END_TO_END, *defaults.DETECTION_PHASES)
        networks = tuple(n for n in self.names if n.partition("/")[0] in measured)
        given = (("pt", "meta"), ("ft", "teacher"), ("e2e", "network"))
        return networks or tuple(name for name, field in given if self.config.init[field])

    def select(self, only: str, flag: str = "--only") -> list[str]:
        """The jobs that `only` ("a,b") names; a phase's name selects all of its jobs.

        Args:
            only: names with commas between them; "": all jobs.
            flag: where they were given, for messages.

        Raises:
            UserError: no such job, or commas alone.
        """
        names, chosen = self.names, []
        words = [word.strip() for word in only.split(",") if word.strip()]
        if only and not words:
            raise UserError(f'{flag}: "{only}" names no job; jobs: {", ".join(names)}')
        for word in words:
            found = [n for n in names if word in (n, n.partition("/")[0])]
            if not found:
                raise UserError(f'{flag}: no job "{word}"; {self._why_not(word)}')
            chosen += found
        return [n for n in names if n in chosen] if chosen else list(names)

    def _why_not(self, word: str) -> str:
        """Why there is no job of this name, or which one was meant."""
        phase = word.partition("/")[0]
        if phase not in defaults.PHASES:
            known = [*self.names, *self.config.phases]
            return did_you_mean(word, known, f"jobs: {', '.join(self.names)}")
        if phase in unnecessary(self.config):
            given = [f for f in dict.fromkeys(INIT_FIELD.values()) if self.config.init[f]]
            fields = [f"config.init.{field}" for field in given]
            return f"{' and '.join(fields)} make it unnecessary"
        if phase not in self.config.phases:
            return f'add "{phase}" to config.phases'
        return f"jobs: {', '.join(self.names)}"

    def closure(self, names: Iterable[str]) -> list[str]:
        """The jobs, and all that they need, directly or not; needed ones first."""
        found: dict[str, None] = {}

        def add(name: str) -> None:
            if name not in found:
                for needed in self.job(name).needs:
                    if not init_path(self.config, needed)[1]:
                        add(needed)
                found[name] = None

        for name in names:
            add(name)
        return list(found)


def _job_names(config: ConfigDict) -> list[str]:
    """All jobs of a config, in the order in which they can run."""
    names = []
    for phase in defaults.PHASES:
        if phase not in config.phases or phase in unnecessary(config):
            continue
        if phase in defaults.MODULE_PHASES:
            names += [f"{phase}/{i}" for i in range(teacher(config).modules)]
        elif phase in END_TO_END:
            names += [phase] + [f"{phase}/{seed}" for seed in range(1, config.e2e_seeds)]
        elif phase in defaults.DETECTION_PHASES:
            names += [phase] + [f"{phase}/{seed}" for seed in range(1, config.detection.seeds)]
        else:
            names.append(phase)
    return names


def unnecessary(config: ConfigDict) -> set[str]:
    """Phases whose weights `config.init` brings."""
    init, skip = config.init, set()
    if init.meta:
        skip |= {"pt"}
    if init.modules:
        skip |= {"mt"} | (set() if "m2mkd" in config.phases else {"pt"})
    if init.teacher:
        skip |= {"mt", "ft"} | (set() if "m2mkd" in config.phases else {"pt"})
    if init.students or init.network:
        skip |= {"m2mkd"}
        if not {"e2e_kd", "e2e_upcycled"} & set(config.phases):
            skip |= {"pt", "mt", "ft"}
    return skip


def _flat(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"a.b.c": value} of nested groups, without the keys that do not change the result."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not is_harmless(f"{prefix}{key}", value):
            flat[f"{prefix}{key}"] = value
    return flat


def is_harmless(key: str, value: Any) -> bool:
    """Whether a value of the config does not change what a job computes."""
    *groups, last = key.split(".")
    if "options" in groups:  # of modules of one's own, whose names mean what they like
        return False
    left_out = last in NEUTRAL and value == NEUTRAL[last]
    return last in HARMLESS or (left_out and not NEUTRAL_IN.isdisjoint(groups))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(values))


def inputs_path(workdir: Path, name: str) -> Path:
    """The file that says what a job's result depends on."""
    return job_directory(workdir, name) / "inputs.json"


def write_inputs(workdir: Path, job: Job, **beside: Mapping[str, str]) -> None:
    """Keeps a job's inputs beside its results, before it starts.

    Args:
        workdir: the run's directory.
        job: that starts.
        beside: what its inputs do not tell: `weights`, digests of those that it stands on
            (`standing_on`); `images`, by the key of their section (`data_checks.image_facts`).
    """
    path = inputs_path(workdir, job.name)
    found = {name: dict(beside[name]) for name in BESIDE if beside.get(name)}
    write_record(path, {**job.inputs, **found, "run": run_of(path)})


def read_inputs(workdir: Path, name: str) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """What `write_inputs` has kept: a job's inputs, and what is beside them.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = inputs_path(workdir, name)
    record = read_record(path)
    if not is_inputs(record):
        raise UserError(
            f"{path} is damaged; --redo={name} does it and what stands on it again; or use another "
            "--workdir"
        )
    return record, {key: record.pop(key, {}) for key in BESIDE}


def standing_on(config: ConfigDict, workdir: Path, job: Job) -> dict[str, str]:
    """Digests of the weights that a job starts from or measures, as far as they are there."""
    return digests(config, workdir, job.needs, job.phases if job.kind is Kind.TRAINING else ())


def is_done(workdir: Path, name: str) -> bool:
    """Whether a job is finished. Raises UserError, before any work, where its result is damaged."""
    path = job_directory(workdir, name) / "done.json"
    return path.is_file() and bool(read_result(path, name))


def is_current(plan: Plan, workdir: Path, name: str) -> bool:
    """Whether a job is done, and if it measures networks, has measured all that are asked for."""
    if not is_done(workdir, name):
        return False
    job = plan.job(name)
    if job.kind is not Kind.EVALUATION:
        return True
    path = inputs_path(workdir, name)
    if not path.is_file():
        return False
    before, beside = read_inputs(workdir, name)
    now = standing_on(plan.config, workdir, job)
    if before != job.inputs or changed(beside["weights"], now):
        return False
    networks = read_record(job_directory(workdir, name) / "done.json").get("networks", {})
    wanted = {f"{name}_accuracy" for name in plan.config.evaluation.renditions}
    return networks.keys() == set(job.needs) and all(
        wanted <= networks[phase.job].keys()
        for phase in job.phases
        if phase.data == plan.config.data
    )


def open_jobs(plan: Plan, workdir: Path, stale: Collection[str] = ()) -> set[str]:
    """The jobs that a whole run still has to do.

    Not among them are jobs that are neither done nor needed by one that is open: their directories
    may be deleted once what they were needed for is done.

    Args:
        plan: the jobs.
        workdir: directory of the run.
        stale: jobs that start again.
    """
    dependents: dict[str, set[str]] = {}
    for name in plan.names:
        for needed in plan.job(name).needs:
            dependents.setdefault(needed, set()).add(name)
    found: set[str] = set()
    for name in reversed(plan.names):
        wanted = dependents.get(name, set())
        if name in stale or (
            not is_current(plan, workdir, name) and (not wanted or found & wanted)
        ):
            found.add(name)
    return found


def jobs_to_run(
    plan: Plan, workdir: Path, only: str = "", stale: Collection[str] = ()
) -> list[str]:
    """Those of the jobs that `only` names that are not done or stale; by default the open ones."""
    if not only:
        found = open_jobs(plan, workdir, stale)
        return [n for n in plan.names if n in found]
    chosen = plan.select(only)
    return [n for n in chosen if n in stale or not is_current(plan, workdir, n)]


def jobs_on_disk(workdir: Path) -> dict[str, dict[str, Any]]:
    """Jobs that have begun in a directory, by name, with their inputs."""
    root = workdir / "jobs"
    paths = sorted([*root.glob("*/inputs.json"), *root.glob("*/*/inputs.json")])
    names = [path.parent.relative_to(root).as_posix() for path in paths]
    return {n: read_record(root / n / "inputs.json") for n in names if is_job_name(n)}


def stale_after(workdir: Path, redone: Iterable[str]) -> list[str]:
    """The jobs that are done again, and all in the directory that stand on one of them."""
    begun, stale, grown = jobs_on_disk(workdir), list(redone), True
    while grown:
        more = [
            n
            for n, inputs in begun.items()
            if n not in stale and set(inputs.get("needs", ())) & set(stale)
        ]
        stale, grown = stale + more, bool(more)
    return stale
