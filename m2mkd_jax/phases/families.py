"""Families of students and teachers: the interfaces, and the register of those that come along.

A family says how student i is built, how the network is built that is trained end to end, and how
the students' weights get into it. A teacher says the same of meta model and teacher modules. What
builds and runs phases asks these interfaces alone, never which family it is.
docs/your-own-modules.md shows how to write one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.config.family_sections import SECTIONS, import_class
from m2mkd_jax.errors import UserError, did_you_mean, require
from m2mkd_jax.phases.phase import Regulariser, StageSpec, WeightsFrom


@dataclass(frozen=True)
class Student:
    """Student module i, as it is trained between the meta model's modules.

    Attributes:
        stage: takes and gives what the meta model's module i takes and gives.
        rates: its drop-path rates there, one a block; None: no drop-path.
        describe: what is saved with its weights, see models/registry.py.
    """

    stage: StageSpec
    rates: tuple[float, ...] | None
    describe: dict[str, Any]


@dataclass(frozen=True)
class Network:
    """The network that is trained end to end.

    Attributes:
        stages: in the order in which they run, by name.
        rates: drop-path rates of every stage, one a block.
        describe: what is saved with its weights, see models/registry.py.
        regulariser: given the initial stages (merged, by name), the term that is added to the
            loss; None: there is none.
        regulariser_fitted: whether it looks at the initial stages; if not, it is given {}, and a
            step can be compiled before there are weights.
    """

    stages: dict[str, StageSpec]
    rates: tuple
    describe: dict[str, Any]
    regulariser: Callable[[Mapping[str, nnx.Module]], Regulariser] | None = None
    regulariser_fitted: bool = True


@dataclass(frozen=True)
class Reduction:
    """A trained network with parts removed.

    Attributes:
        title: what is removed, and the order in which parts go, such as "mediators, at random".
        kept: how many are left.
        stages: of the smaller network, in the order in which they run, by name.
        trees: {"params", "fixed"} by stage.
    """

    title: str
    kept: int
    stages: dict[str, StageSpec]
    trees: dict[str, dict]


class StudentFamily(Protocol):
    """Student modules, and the network that is assembled from them.

    A class derived from this one gives `modules`, `student`, `network`, `assemble` and `head`; the
    rest has defaults.

    Attributes:
        section: the config's key under which the family's own keys lie.
        config: the whole config of the run.
        modules: how many students there are: as many as the teacher has modules.
        parts: what the students are, for messages.
    """

    section: ClassVar[str] = ""
    config: ConfigDict
    modules: int
    parts: str = ""

    def __init__(self, config: ConfigDict):
        self.config = config

    @staticmethod
    def defaults() -> Mapping[str, Any]:
        """The keys of the family's section, with their defaults."""
        return {}

    def check(self, teaching: bool, devices: int) -> None:
        """Refuses a section that does not fit the rest of the config.

        Args:
            teaching: whether any phase has to do with a teacher.
            devices: how many devices the batch is cut over.

        Raises:
            UserError: one line that names the key.
        """

    @abc.abstractmethod
    def student(self, index: int) -> Student:
        """Student module `index`, counted from 0."""
        ...

    @abc.abstractmethod
    def network(self, weights: WeightsFrom) -> Network:
        """The network that is trained end to end, its stages' weights from `weights`."""
        ...

    @abc.abstractmethod
    def assemble(
        self, network: Mapping[str, dict], taught: Sequence[dict]
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """The students' parameters put into the network's.

        Args:
            network: parameters of a fresh network by stage.
            taught: parameters of all students.

        Returns:
            The network's parameters by stage, and for people where each part of them came from.
        """
        ...

    @property
    @abc.abstractmethod
    def head(self) -> tuple[str, tuple[str, ...]]:
        """The stage with the layer that gives the logits, and the path of that layer in it.

        Raises:
            UserError: the network has none.
        """
        ...

    def prepare(self, name: str, params: dict, seed: int) -> dict:
        """The parameters of a fresh stage `name`, changed where its first values are special."""
        del name, seed
        return params

    def reductions(
        self, network: Mapping[str, dict], seed: int, seen: Mapping[str, Any]
    ) -> Iterator[Reduction]:
        """The network with parts removed, to see what they are worth; by default none.

        Args:
            network: {"params", "fixed"} of a trained network by stage.
            seed: of what is removed at random.
            seen: auxiliary outputs of the network for some test images, see Program.run_with_aux.
        """
        del network, seed, seen
        return iter(())

    def check_upcycling(self) -> None:
        """Refuses the phase e2e_upcycled where there is no way from the teacher to the network.

        Raises:
            UserError: one line that says why.
        """
        raise UserError(
            f"config.phases: e2e_upcycled turns the teacher's MLPs into experts, which config."
            f'family="{self.config.family}" has none of; drop e2e_upcycled'
        )

    def upcycle(self, network: Mapping[str, dict], dense: Sequence[nnx.Module]) -> dict[str, dict]:
        """The network's parameters by stage, with the dense teacher's weights in them.

        Args:
            network: parameters of a fresh network by stage.
            dense: the teacher's modules.
        """
        raise NotImplementedError


class Teacher(Protocol):
    """The meta model and the teacher: two chains of equally many modules that fit together.

    Attributes:
        modules: how many.
        meta_depths, depths: blocks of every module, for drop-path rates that grow with depth.
    """

    modules: int
    meta_depths: tuple[int, ...]
    depths: tuple[int, ...]

    def __init__(self, config: ConfigDict): ...

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Channels of the tokens between two modules.

        Raises:
            UserError: the config describes no such network.
        """
        ...

    def check(self) -> None:
        """Refuses a config.teacher that does not fit.

        Raises:
            UserError: one line that names the key.
        """

    @abc.abstractmethod
    def meta(self, index: int, weights: WeightsFrom) -> StageSpec:
        """Module `index` of the meta model."""
        ...

    @abc.abstractmethod
    def module(self, index: int, weights: WeightsFrom) -> StageSpec:
        """Module `index` of the teacher; takes and gives what the meta model's takes and gives."""
        ...

    @abc.abstractmethod
    def describe(self, depths: Sequence[int]) -> dict[str, Any]:
        """What is saved with the weights, of the meta model (its depths) or the teacher."""
        ...


# name: the class, or where it is found
_FAMILIES: dict[str, type[StudentFamily] | str] = {
    "nac": "m2mkd_jax.phases.nac_family:NACFamily",
    "vmoe": "m2mkd_jax.phases.vmoe_family:VMoEFamily",
}


def register_family(name: str, family: type[StudentFamily]) -> None:
    """Makes a family known as config.family = `name`, and its section a part of every config.

    Raises:
        ValueError: the name is taken.
    """
    if _FAMILIES.get(name, family) is not family:
        raise ValueError(f"there is a family {name!r} already: {_FAMILIES[name]}")
    _FAMILIES[name] = family
    if family.section:
        SECTIONS.setdefault(family.section, family.defaults)


def _instance(found: Any, interface: Any, config: ConfigDict, key: str) -> Any:
    """An object of the class `found`, which config.`key` names.

    Raises:
        UserError: it is not derived from the interface, or lacks a part of it.
    """
    derived = isinstance(found, type) and interface in found.__mro__
    name, parent = getattr(found, "__name__", repr(found)), interface.__name__
    require(derived, f"config.{key}: {name} is not derived from m2mkd_jax.{parent}")
    missing = sorted(found.__abstractmethods__)
    require(not missing, f"config.{key}: {name} lacks {', '.join(missing)} of m2mkd_jax.{parent}")
    return found(config)


def students(config: ConfigDict) -> StudentFamily:
    """The family of the config's students.

    Raises:
        UserError: there is no family of that name.
    """
    name = config.family
    if name not in _FAMILIES and ":" not in name:
        hint = did_you_mean(name, _FAMILIES)
        raise UserError(
            f'config.family: "{name}" is unknown; {hint} (one of your own is given as '
            '"package.module:Class")'
        )
    family = _FAMILIES.get(name, name)
    found = import_class(family, "family") if isinstance(family, str) else family
    return _instance(found, StudentFamily, config, "family")


def teacher(config: ConfigDict) -> Teacher:
    """The config's meta model and teacher.

    Raises:
        UserError: config.teacher.family names no such class.
    """
    name = config.teacher.family or "m2mkd_jax.phases.vit_teacher:ViTTeacher"
    return _instance(import_class(name, "teacher.family"), Teacher, config, "teacher.family")
