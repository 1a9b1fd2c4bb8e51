"""The weights that a phase starts from: fresh ones, those of finished jobs, or `config.init`.

Where they are and how they are read: weight_files.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.trees import match_tree
from m2mkd_jax.errors import located
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.process import say
from m2mkd_jax.phases.detection import DetectionPhase, backbone_network, with_backbone
from m2mkd_jax.phases.families import students, teacher
from m2mkd_jax.phases.given_descriptions import other_fields
from m2mkd_jax.phases.other_shapes import changes, fitted, without
from m2mkd_jax.phases.phase import Phase, StageSpec, WeightsFrom
from m2mkd_jax.phases.weight_files import init_path, is_given, read_tree


def fresh_part(config: ConfigDict, weights: WeightsFrom) -> tuple[str, ...]:
    """The path of the layer that a stage with given weights has fresh; (): none."""
    if not config.init.fresh_head or not is_given(config, weights):
        return ()
    stage, path = "", tuple[str, ...]()
    if weights.kind == "init":
        stage, path = students(config).head
    elif weights.job.startswith("mt/"):
        stage, path = f"module_{teacher(config).modules - 1}", ("head",)
    return path if weights.tree == stage else ()


def load_stage(
    config: ConfigDict, workdir: Path, weights: WeightsFrom, shape: chain.SplitStage
) -> dict:
    """{"params", "fixed"} of a stage from finished weights, without what is fresh in it.

    Raises UserError as `read_tree`.
    """
    return _matched(config, weights, shape, *read_tree(config, workdir, weights))


def _matched(
    config: ConfigDict, weights: WeightsFrom, shape: chain.SplitStage, tree: dict, where: str
) -> dict:
    """`load_stage` of a tree that is read, and where it is from."""
    fresh = fresh_part(config, weights)
    expected = {"params": without(shape.params, fresh), "fixed": shape.fixed}
    expected = {name: tree for name, tree in expected.items() if tree}
    if is_given(config, weights):
        params = without(tree["params"], fresh)
        tree = {**tree, "params": fitted(params, shape.params, config.data.channels)}
    tree = match_tree(tree, expected, where)
    return {"params": tree["params"], "fixed": tree.get("fixed", {})}


def fresh_stage(
    config: ConfigDict,
    spec: StageSpec,
    name: str,
    seed: int,
    shardings: Callable[[Any], Any] | None = None,
) -> dict[str, dict]:
    """{"params", "fixed"} of a stage before any training; a NAC's mediators get their graph."""
    key = jax.random.key(seed)
    for letter in name:  # the same stage starts alike in whatever job it appears
        key = jax.random.fold_in(key, ord(letter))
    stage = chain.initialise(spec.build, key, shardings)
    params = students(config).prepare(name, stage.params, seed)
    return {"params": params, "fixed": stage.fixed}


def _assembled(
    config: ConfigDict, workdir: Path, network: dict[str, dict]
) -> tuple[dict[str, dict], dict[str, str]]:
    """The network's parameters with those of all students, and where each part came from."""
    family, taught = students(config), []
    for i in range(family.modules):
        tree, _ = read_tree(config, workdir, WeightsFrom("job", f"m2mkd/{i}", f"student_{i}"))
        taught.append(tree["params"])
    return family.assemble(network, taught)


def _upcycled(
    config: ConfigDict, workdir: Path, job: str, network: dict[str, dict]
) -> dict[str, dict]:
    """The dense teacher that `job` trained, as the network's start."""
    whole, dense = teacher(config), []
    for i in range(whole.modules):
        spec = whole.module(i, WeightsFrom("job", job, f"module_{i}"))
        shape = chain.abstract(spec.build)
        stage = load_stage(config, workdir, spec.weights, shape)
        dense.append(chain.merge(shape.graph, stage["params"], stage["fixed"]))
    return students(config).upcycle(network, dense)


def _backbone(
    config: ConfigDict, workdir: Path, phase: DetectionPhase, params: dict[str, Any]
) -> dict[str, Any]:
    """The parameters of a fresh detector with the transformer of config.detection.network."""
    network, description = backbone_network(config)
    trees = {}
    for name, spec in network.items():
        weights = WeightsFrom("job", config.detection.network, name)
        trees[name] = load_stage(config, workdir, weights, chain.abstract(spec.build))["params"]
    return with_backbone(phase.detector.backbone, params, description, trees)


def check_given(config: ConfigDict, workdir: Path, phases: Iterable[Phase]) -> None:
    """Reads all that `config.init` names for some phases, each weight once, and lets it go.

    Raises:
        UserError: it is damaged, or of another shape; a late phase would say so after hours.
    """
    read, assembled = set(), not config.init.students or config.init.network
    told: list[list[str]] = []  # all stages of a network say the same
    for phase in phases:
        if isinstance(phase, DetectionPhase) and phase.needs:
            check_measured(config, workdir, config.detection.network, backbone_network(config)[0])
        for spec in phase.stages.values():
            weights = spec.weights
            if is_given(config, weights) and weights not in read:
                field = "network" if weights.kind == "init" else init_path(config, weights.job)[0]
                with located(f"config.init.{field}"):
                    shape = chain.abstract(spec.build)
                    tree, where = read_tree(config, workdir, weights)
                    _matched(config, weights, shape, tree, where)
                    lines = other_fields(config, workdir, weights)
                for change in changes(tree["params"], shape.params, config.data.channels):
                    say(f"config.init.{field}: {change}")
                for line in lines if lines not in told else ():
                    say(f"config.init.{field}: {line}")
                told.append(lines)
                read.add(weights)
        if phase.assembled and not assembled:
            network = {n: chain.abstract(phase.stages[n].build).params for n in phase.assembled}
            with located("config.init.students"):
                for i in range(students(config).modules):
                    other_fields(config, workdir, WeightsFrom("job", f"m2mkd/{i}", f"student_{i}"))
                jax.eval_shape(lambda network: _assembled(config, workdir, network)[0], network)
            assembled = True


def check_measured(
    config: ConfigDict, workdir: Path, job: str, stages: Mapping[str, StageSpec]
) -> None:
    """Reads the weights that `config.init` names for a network that is measured, and lets them go.

    Args:
        config: of the run.
        workdir: its directory.
        job: whose weights they stand for.
        stages: of the network, by the names of their trees.

    Raises:
        UserError: they are damaged, or of another shape.
    """
    field, given = init_path(config, job)
    if not given:
        return
    lines: list[str] = []
    with located(f"config.init.{field}"):
        for name, spec in stages.items():
            weights = WeightsFrom("job", job, name)
            lines = other_fields(config, workdir, weights)
            load_stage(config, workdir, weights, chain.abstract(spec.build))
    for line in lines:
        say(f"config.init.{field}: {line}")


def load_stages(
    config: ConfigDict, workdir: Path, phase: Phase, shardings: Callable | None = None
) -> tuple[dict[str, dict], dict[str, str]]:
    """{stage: {"params", "fixed"}} for every stage of a phase, and where each came from.

    Args:
        config: of the run.
        workdir: its directory.
        phase: whose stages are wanted.
        shardings: a tree of arrays or shapes -> where its arrays go (parallel/partition.py); None:
            the first device, or the host.

    Raises:
        UserError: weights are missing, damaged, or of another shape.
    """
    stages, origin = {}, {}
    for name, spec in phase.stages.items():
        if spec.weights.kind in ("job", "init"):
            stages[name] = load_stage(config, workdir, spec.weights, chain.abstract(spec.build))
            origin[name] = spec.weights.job or config.init.network
            if fresh_part(config, spec.weights):
                fresh = fresh_stage(config, spec, name, phase.seed, shardings)
                params = chain.deep_update(fresh["params"], stages[name]["params"])
                stages[name] = {**stages[name], "params": params}
                origin[name] += ", its last layer fresh"
        else:
            stages[name] = fresh_stage(config, spec, name, phase.seed, shardings)
            origin[name] = "fresh"
    if phase.assembled:
        network = {name: stages[name]["params"] for name in phase.assembled}
        taught, parts = _assembled(config, workdir, network)
        origin = {n: where for n, where in origin.items() if n not in taught} | parts
        stages |= {n: {**stages[n], "params": params} for n, params in taught.items()}
    upcycled = {n: s.weights.job for n, s in phase.stages.items() if s.weights.kind == "upcycled"}
    if upcycled:
        job = next(iter(upcycled.values()))
        network = {name: stages[name]["params"] for name in upcycled}
        dense = _upcycled(config, workdir, job, network)
        stages |= {n: {**stages[n], "params": params} for n, params in dense.items()}
        origin |= dict.fromkeys(upcycled, f"{job}, experts from its MLPs, routers fresh")
    if isinstance(phase, DetectionPhase):
        for name, job in ((n, s.weights.job) for n, s in phase.stages.items()):
            if job:
                params = _backbone(config, workdir, phase, stages[name]["params"])
                stages[name] = {**stages[name], "params": params}
                origin[name] = f"{job}, pyramid and heads fresh"
    if shardings is not None:
        stages = partition.put(stages, shardings(stages))
    return stages, origin
