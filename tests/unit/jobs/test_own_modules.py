"""Students and teachers of one's own: the example, another teacher, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from examples.dense_students import DenseStudents
from m2mkd_jax import inference
from m2mkd_jax.config.defaults import base
from m2mkd_jax.config.values import check_values
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.models import chain, registry
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.families import Network, StudentFamily
from m2mkd_jax.phases.phase import WeightsFrom
from tests.unit.jobs import combinations
from tests.unit.jobs.combinations import FAMILIES, Memory, random_stage

HERE = "tests.unit.jobs.test_own_modules"


def refused(config: ConfigDict, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        checks.validate(config)
    assert "\n" not in str(error.value) and "config." in str(error.value)


def other_family(name: str) -> ConfigDict:
    """The tiny dense config with a class of this file as its family."""
    config = combinations.dense()
    config.family = f"{HERE}:{name}"
    return config


def own_teacher(family: str, matrix: bool = False) -> ConfigDict:
    """A tiny config with the teacher of tests/own_teacher.py."""
    config = FAMILIES[family]()
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "e2e_kd", "eval")
    config.teacher.family = "tests.own_teacher:MixerTeacher"
    config.teacher.options = {"matrix": True} if matrix else {}
    return config


def test_the_example_is_built_of_narrower_modules_between_stitches():
    config = combinations.dense()
    student = build_phase(config, "m2mkd/1").stages["student_1"]
    shapes = chain.abstract(student.build).params
    assert shapes["pre_stitch"]["kernel"].shape == (16, 8)  # teacher 16 wide, student 8
    assert shapes["post_stitch"]["kernel"].shape == (8, 16)
    network = build_phase(config, "e2e").stages
    assert not any(
        "stitch" in part for s in network.values() for part in chain.abstract(s.build).params
    )


def test_the_example_assembles_every_module_as_it_was_taught():
    family = DenseStudents(combinations.dense())
    network = family.network(WeightsFrom("assembled")).stages
    fresh = {name: random_stage(spec.build, name)["params"] for name, spec in network.items()}
    taught = [random_stage(family.student(i).stage.build, "s", i)["params"] for i in range(3)]
    params, origin = family.assemble(fresh, taught)
    assert origin == {"dense_0": "m2mkd/0", "dense_1": "m2mkd/1", "dense_2": "m2mkd/2"}
    assert params == {f"dense_{i}": student["vit"] for i, student in enumerate(taught)}


def test_weights_of_the_example_are_loaded(memory, tmp_path, monkeypatch):
    config = combinations.dense()
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e")
    memory.run(config, tmp_path)
    monkeypatch.setattr(inference, "open_weights", memory.open)
    normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
    for weights in memory.weights.values():
        weights.description["normalisation"] = normalisation
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    first, middle, network = (
        inference.load_network(tmp_path / "jobs" / job / "weights")
        for job in ("m2mkd/0", "m2mkd/1", "e2e")
    )
    assert (first.image_size, middle.width, network.classes) == (16, 16, 10)
    tokens = first(images)
    assert tokens.shape == middle(tokens).shape == (2, 5, 16)
    assert network(images).shape == (2, 10)


@pytest.mark.parametrize("family", ["nac", "vmoe", "dense"])
def test_a_teacher_that_is_no_transformer(family, memory, tmp_path):
    memory.run(own_teacher(family), tmp_path / "run")
    config = own_teacher(family)
    config.init.meta = config.init.teacher = str(tmp_path / "run")
    plan = memory.run(config, tmp_path / "given")
    assert plan.names == ["m2mkd/0", "m2mkd/1", "m2mkd/2", "e2e", "e2e_kd", "eval"]


def test_a_teacher_for_a_fixed_number_of_tokens_has_no_nac_students():
    checks.validate(own_teacher("dense", matrix=False))
    refused(own_teacher("nac", matrix=True), "config.family: m2mkd/0: meta_1 does not take")


def test_upcycling_needs_the_vision_transformer():
    config = own_teacher("vmoe")
    config.phases = ("pt", "mt", "ft", "e2e_upcycled")
    refused(config, r"config\.teacher\.family: e2e_upcycled needs the vision transformer")


def test_torch_files_cannot_be_an_own_teacher(tmp_path):
    config = own_teacher("dense")
    (tmp_path / "teacher.pth").write_bytes(b"PK")
    config.init.teacher = str(tmp_path / "teacher.pth")
    config.phases = ("m2mkd",)
    config.init.meta = str(tmp_path / "teacher.pth")
    plan = checks.validate(config)
    with pytest.raises(UserError, match=r"config\.init\.meta: torch files cannot be read into"):
        checks.check_given(config, tmp_path, [plan.job("m2mkd/0").phase])


class NoHead(StudentFamily):
    """Lacks what every family must have."""

    def student(self, index: int) -> Any: ...

    def network(self, weights: WeightsFrom) -> Any: ...


class TooWide(DenseStudents):
    """Student 1 gives tokens of its own width."""

    def student(self, index: int) -> Any:
        student = super().student(index)
        if index != 1:
            return student
        build = registry.builder(self._describe(self.config.data), "dense_1")
        return dataclasses.replace(student, stage=dataclasses.replace(student.stage, build=build))


class NoLogits(DenseStudents):
    """The network's last stage gives tokens."""

    def network(self, weights: WeightsFrom) -> Network:
        network = super().network(weights)
        stages = {n: s for n, s in network.stages.items() if n != "dense_2"}
        return dataclasses.replace(network, stages=stages, rates=network.rates[:-1])


class WrongRates(DenseStudents):
    """A drop-path rate too many for the blocks of the network's first stage."""

    def network(self, weights: WeightsFrom) -> Network:
        network = super().network(weights)
        return dataclasses.replace(network, rates=((0.1, 0.1, 0.1), *network.rates[1:]))


class WrongAssembly(DenseStudents):
    """Forgets the head."""

    def assemble(self, network: Mapping[str, dict], taught: Sequence[dict]) -> Any:
        params, origin = super().assemble(network, taught)
        return {**params, "dense_2": {"norm": params["dense_2"]["norm"]}}, origin


class NotBuilt(DenseStudents):
    """Its students raise when they are built."""

    def student(self, index: int) -> Any:
        student, build = super().student(index), _raises
        return dataclasses.replace(student, stage=dataclasses.replace(student.stage, build=build))


def _raises(rngs: nnx.Rngs) -> chain.Stage:
    raise RuntimeError("no such layer\nand more")


class TeachersNames(DenseStudents):
    """Calls its stages as the teacher's are called."""

    def network(self, weights: WeightsFrom) -> Network:
        network = super().network(weights)
        stages = {n.replace("dense", "module"): s for n, s in network.stages.items()}
        return dataclasses.replace(network, stages=stages)


class TakenSection(DenseStudents):
    """Its section has the name of other keys."""

    section = "recipes"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NoHead", "NoHead lacks assemble, head of m2mkd_jax.StudentFamily"),
        ("chain", "chain is not derived from m2mkd_jax.StudentFamily"),
        ("Nothing", "module .* has no class .Nothing."),
        ("TooWide", "m2mkd/1: student_1 does not take what meta_0 gives, .16, 5, 16"),
        ("NoLogits", "e2e: dense_1, the last, gives .16, 5, 8., not the logits .16, 10"),
        ("WrongRates", "config.family: e2e: dense_0"),
        ("WrongAssembly", "e2e: what the students are assembled to: array 'dense_2/.* is missing"),
        ("NotBuilt", "m2mkd/0: student_0 cannot be built: no such layer"),
        ("TeachersNames", "a stage of the network is called module_0, as the teacher's are"),
        ("TakenSection", 'the section of .*:TakenSection" is called "recipes"'),
    ],
)
def test_a_family_that_does_not_fit_is_refused_in_one_line(name, says):
    config = other_family(name) if name not in ("NoHead", "chain") else combinations.vmoe()
    config.family = f"{HERE}:{name}"
    config.recipes.e2e.drop_path = 0.1
    refused(config, f"config.family: .*{says}" if "config" not in says else says)


def test_a_graph_regulariser_needs_a_graph():
    config = combinations.dense()
    config.regulariser.kind = "hinge"
    refused(config, 'config.regulariser.kind is hinge; .*has no graph, only "none" fits')


def test_a_family_outside_the_package_brings_its_section(tmp_path, monkeypatch):
    """Also from the working directory, which installed commands do not search by themselves."""
    (tmp_path / "my_students.py").write_text(
        "from examples.dense_students import DenseStudents\n"
        "class Mine(DenseStudents):\n"
        "    section = 'mine'\n"
        "    @staticmethod\n"
        "    def defaults():\n"
        "        return {'depths': (), 'heads': 3}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = base("my_students:Mine")
    assert config.mine.heads == 3
    config.mine.heads = 2
    check_values(config)
    with config.unlocked():
        config.mine.head = 1
    with pytest.raises(UserError, match=r'did you mean "mine\.heads"'):
        check_values(config)


@pytest.fixture
def memory(monkeypatch) -> Memory:
    """Finished weights in memory, and stages of random numbers, which compile nothing."""
    return combinations.install(monkeypatch)
