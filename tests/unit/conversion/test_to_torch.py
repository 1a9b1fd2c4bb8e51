"""Weights trained here: into the published layouts and back, and as `config.init`."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch

import m2mkd_jax
from m2mkd_jax import convert
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.conversion.open_weights import open_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.initial_weights import load_stages
from m2mkd_jax.phases.weight_files import weights_directory
from tests.e2e import tiny, tiny_vmoe
from tests.published_files import load, run
from tests.support import FIXTURES

CONFIGS = {"nac": tiny.get_config, "vmoe": tiny_vmoe.get_config}
FILES = {"nac": "tiny.py", "vmoe": "tiny_vmoe.py"}


def random_stage(config, spec, name, seed, shardings=None) -> dict:
    """In place of initial_weights.fresh_stage, which compiles for seconds."""
    parts, draw = chain.abstract(spec.build), np.random.default_rng([seed, *name.encode()])
    trees = {"params": parts.params, "fixed": parts.fixed}
    return jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32), trees)


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
    monkeypatch.setattr("m2mkd_jax.phases.initial_weights.fresh_stage", random_stage)


@pytest.fixture(scope="module", params=["nac", "vmoe"])
def finished(request, tmp_path_factory):
    """A run's directory with finished weights of every job (random ones), and its config."""
    config = CONFIGS[request.param]()
    workdir = tmp_path_factory.mktemp(request.param)
    for seed, job in enumerate(j for j in Plan(config).names if j not in ("eval", "e2e_kd")):
        phase = build_phase(config, job)
        trees = {}
        for name in phase.trainable:
            stage = random_stage(config, phase.stages[name], name, seed)
            trees[name] = {key: tree for key, tree in stage.items() if tree}
        normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
        description = {**phase.describe, "job": job, "normalisation": normalisation}
        save_weights(workdir / "jobs" / job / "weights", trees, description)
    return config, workdir


JOBS = ("pt", "mt/0", "mt/1", "mt/2", "ft", "m2mkd/0", "m2mkd/1", "m2mkd/2", "e2e")


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_every_job_goes_into_torch_and_back(finished, job, suffix, tmp_path):
    config, workdir = finished
    file = tmp_path / f"file.{suffix}"
    run(convert, workdir / "jobs" / job, file)
    arch = FIXTURES.parent / "e2e" / FILES[config.family]
    if config.family == "vmoe" and job.startswith("m2mkd"):
        # A config describes the network; a published student says itself what it is, but heads.
        arch = tmp_path / "arch.json"
        arch.write_text('{"kind": "vmoe", "heads": 2}')
    run(convert, file, tmp_path / "again", f"--arch={arch}")
    # The order of stages is that of the trees' names in both.
    first, second = (
        open_weights(path).trees for path in (workdir / "jobs" / job, tmp_path / "again")
    )
    assert len(first) == len(second)
    before, after = (
        [np.asarray(a) for name in trees for a in jax.tree.leaves(trees[name])]
        for trees in (first, second)
    )
    assert len(before) == len(after) > 0
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_the_layouts_are_the_published_ones(finished, tmp_path):
    config, workdir = finished
    contents = {}
    for job in ("ft", "mt/1", "m2mkd/0", "m2mkd/1", "e2e"):
        file = tmp_path / "file.pth"
        run(convert, workdir / "jobs" / job, file, "--overwrite")
        contents[job] = load(file)
    whole, module = contents["ft"], contents["mt/1"]
    assert len(whole["model_stages"]) == 3
    assert torch.equal(
        whole["model"]["stages.1.blocks.0.norm1.bias"], whole["model"]["blocks.1.norm1.bias"]
    )
    stored = whole["model"]["blocks.1.norm1.bias"].untyped_storage().data_ptr()
    assert whole["model_stages"][1]["blocks.0.norm1.bias"].untyped_storage().data_ptr() == stored
    assert (module["block_index"], module["divided_depths"]) == (1, [1, 2, 1])
    assert {name.split(".")[1] for name in module["block_state_dict"]} == {"0", "1"}
    student = contents["m2mkd/1"]
    if config.family == "nac":
        assert "pre_stitch.weight" in student["model"] and "codes" in student
        assert "latent_graphs.0.read_out.ffn.ffn.0.scale_gain" in contents["e2e"]["model"]
    else:
        assert len(student["model_stages"]) == 1
        assert {"stages.0.blocks.0.pre_stitch.ln.weight", "blocks.0.post_stitch.fc.bias"} <= set(
            student["model"]
        )
        experts = contents["e2e"]["model"]["blocks.2.moe.experts.3.htoh4.weight"]
        assert experts.shape == (1, 64, 16)


def test_load_finds_the_network_of_a_run(finished):
    config, workdir = finished
    model = m2mkd_jax.load(workdir)
    assert model.description["job"] == "e2e"
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    assert np.isfinite(model(x)).all() and model(x).shape == (2, 10)
    assert (model(x) == m2mkd_jax.load(workdir / "jobs" / "e2e" / "weights")(x)).all()
    if config.family == "nac":
        student = m2mkd_jax.load(workdir / "jobs" / "m2mkd/0")
        assert student(x).shape == (2, 1, 16)


def test_a_run_without_a_network_lists_its_jobs(finished, tmp_path):
    _, workdir = finished
    shutil.copytree(workdir / "jobs" / "mt", tmp_path / "jobs" / "mt")
    with pytest.raises(UserError, match="jobs/mt/0, jobs/mt/1, jobs/mt/2"):
        m2mkd_jax.load(tmp_path)


def stage_leaves(stages: dict) -> dict:
    return {name: jax.tree.leaves(stage["params"]) for name, stage in stages.items()}


def assert_equal_stages(mine: dict, theirs: dict) -> None:
    assert mine.keys() == theirs.keys()
    for name, arrays in stage_leaves(mine).items():
        others = stage_leaves(theirs)[name]
        assert all(
            (np.asarray(a) == np.asarray(b)).all() for a, b in zip(arrays, others, strict=True)
        ), name


@pytest.mark.parametrize("form", ["torch", "safetensors", "converted"])
def test_config_init_takes_them(finished, form, tmp_path):
    """Meta, teacher, students and network from torch files, or converted ones, are those of the
    run itself."""
    config, workdir = finished
    family = config.family
    given = CONFIGS[family]()
    suffix = ".safetensors" if form == "safetensors" else ".pth"
    for field, job in (("meta", "pt"), ("teacher", "ft"), ("network", "e2e")):
        run(convert, workdir / "jobs" / job, tmp_path / f"{field}{suffix}")
        given.init[field] = str(tmp_path / f"{field}{suffix}")
    (tmp_path / "students").mkdir()
    for i in range(3):
        run(convert, workdir / f"jobs/m2mkd/{i}", tmp_path / "students" / f"student_{i}{suffix}")
    given.init.students = str(tmp_path / "students")
    if form == "converted":
        arch = f"--arch={FIXTURES.parent / 'e2e' / FILES[family]}"
        for field in ("meta", "teacher", "network"):
            run(convert, tmp_path / f"{field}.pth", tmp_path / field, arch)
            given.init[field] = str(tmp_path / field)
        flags = [arch] if family == "nac" else [f"--arch={tmp_path / 'heads.json'}"]
        students = {"kind": "vmoe", "heads": 2, "pre_stitch_pos": [1, 2], "post_stitch_pos": [0, 1]}
        (tmp_path / "heads.json").write_text(json.dumps(students))
        run(convert, tmp_path / "students", tmp_path / "set", *flags)
        given.init.students = str(tmp_path / "set")
    elsewhere = tmp_path / "another_run"
    for job in ("mt/1", "m2mkd/1"):
        expected, _ = load_stages(config, workdir, build_phase(config, job))
        found, _ = load_stages(given, elsewhere, build_phase(given, job))
        trained = {"mt/1": "module_1", "m2mkd/1": "student_1"}[job]
        for stages in (expected, found):
            stages.pop(trained)  # fresh
        assert_equal_stages(found, expected)
    network = build_phase(given, "e2e")
    found, origin = load_stages(given, elsewhere, network)
    given.init.network = ""
    assembled, _ = load_stages(given, elsewhere, build_phase(given, "e2e"))
    expected, _ = load_stages(config, workdir, build_phase(config, "e2e"))
    assert_equal_stages(assembled, expected)
    config.init.network = str(workdir)
    expected, _ = load_stages(config, workdir, build_phase(config, "e2e"))
    config.init.network = ""
    assert_equal_stages(found, expected)
    assert set(origin.values()) == {str(tmp_path / ("network" + suffix * (form != "converted")))}


def test_a_given_network_and_the_one_trained_from_it(finished, tmp_path):
    """What is measured is what this run trains, and what was given only where it trains none."""
    config, workdir = finished
    given = CONFIGS[config.family]()
    given.init.network = str(workdir)
    theirs, own = (where / "jobs" / "e2e" / "weights" for where in (workdir, tmp_path))
    with pytest.raises(UserError, match="e2e is not done"):
        weights_directory(given, tmp_path, "e2e")
    shutil.copytree(theirs, own)
    assert weights_directory(given, tmp_path, "e2e") == own
    network, origin = load_stages(given, tmp_path, build_phase(given, "e2e"))
    assert {origin[name] for name in network} == {str(workdir)}  # where it starts
    with pytest.raises(UserError, match="e2e/1 is not done"):
        weights_directory(given, tmp_path, "e2e/1")
    given.phases = ("eval",)
    assert Plan(given).job("eval").needs == ("e2e",)
    assert weights_directory(given, tmp_path, "e2e") == theirs


def test_config_init_refuses_what_does_not_fit(finished, tmp_path):
    config, workdir = finished
    given = CONFIGS[config.family]()
    run(convert, workdir / "jobs" / "pt", tmp_path / "meta.pth")
    given.init.teacher = str(tmp_path / "meta.pth")
    phase = build_phase(given, "m2mkd/1")
    given.init.meta = str(workdir)
    with pytest.raises(UserError, match=r"the config says depths.*the weights have 3"):
        load_stages(given, tmp_path, phase)
    given.init.teacher = str(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="teacher: no weights of ft in"):
        load_stages(given, tmp_path, phase)
