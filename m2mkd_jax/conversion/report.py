"""What a conversion did, as a table: every tensor used or ignored, every array filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.conversion.names import Entry
from m2mkd_jax.errors import printable

Place = tuple[tuple[str, ...], Any]  # an array's path, and an index along its stacked axes


@dataclass(frozen=True)
class Row:
    """One line: a name, type and shape, and where it went."""

    name: str
    facts: str
    target: str
    place: Place | None = None
    student: int = 0
    parameters: int = 0
    bytes: int = 0


class Report:
    """Collects rows while trees are made, and prints them.

    Attributes:
        source: a path.
        ignored: name in the source -> why it was left behind.
        aliases: name in the network -> all names in the source.
        notes: what was decided without the weights.
        loaded, fresh: of a network assembled from students: its tensor -> the student's, and those
            that no student brings.
    """

    def __init__(self, source: str, ignored: dict[str, str], aliases: dict[str, list[str]]):
        self.source = source
        self.ignored, self.aliases = ignored, aliases
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.loaded: dict[str, str] = {}
        self.fresh: list[str] = []

    def shown(self, name: str) -> str:
        """A tensor's name as it stands in the source."""
        return self.aliases.get(name, [name])[0]

    def rename(self, names: Mapping[str, str]) -> None:
        self.aliases = {names.get(n, n): shown for n, shown in self.aliases.items()}

    def ignore(self, name: str, reason: str) -> None:
        for shown in self.aliases.pop(name, [name]):
            self.ignored[shown] = reason

    def used(self, entry: Entry, tensor: Tensor, tree: str) -> None:
        """A tensor is in its place in a tree."""
        first, *others = self.aliases.get(entry.torch, [entry.torch])
        facts = f"{tensor.dtype} {list(tensor.shape)}"
        count = int(np.prod(tensor.shape))
        student = int(tree.rpartition("_")[2]) if tree.startswith("student_") else 0
        self.rows.append(
            Row(
                first,
                facts,
                f"-> {_array(tree, entry.path, entry.index)}",
                (entry.path, entry.index),
                student,
                count,
                count * np.dtype(tensor.dtype).itemsize,
            )
        )
        self.rows += [Row(other, "", f"is {first}") for other in others]

    def wrote(self, entry: Entry, name: str, array: np.ndarray, tree: str) -> None:
        """An array, or a slice of one, became a tensor."""
        facts = f"{array.dtype.name} {list(array.shape)}"
        name_here = _array(tree, entry.path, entry.index)
        place = (entry.path, entry.index)
        self.rows.append(Row(name_here, facts, f"-> {name}", place, 0, array.size, array.nbytes))

    def assembled(
        self, targets: Mapping[Place, str], kept: Iterable[Place], students: int, seed: int
    ) -> None:
        """The rows so far say where tensors went in their students; now: where in the network.

        Args:
            targets: place in the network -> the published name of that tensor.
            kept: those that no student replaced.
            students: how many there were.
            seed: what the rest was drawn from.
        """
        rows, self.rows = self.rows, []
        kept = set(kept)
        for row in rows:
            place = _in_network(row.place, row.student, students) if row.place else None
            if row.place is None:  # another name of the row before
                if self.rows and self.rows[-1].name == row.target.removeprefix("is "):
                    self.rows.append(row)
            elif place not in targets:
                self.ignored[row.name] = "a stitch: no part of the network"
            elif place in kept:
                self.ignored[row.name] = "of another size or task: fresh in the network"
            else:
                self.loaded[targets[place]] = row.name
                target = f"-> {_array('nac', *place)}"
                self.rows.append(
                    Row(row.name, row.facts, target, place, 0, row.parameters, row.bytes)
                )
        self.fresh = [name for place, name in targets.items() if place in kept]
        self.notes.append(f"fresh, from seed {seed}: {', '.join(self.fresh)}")

    def totals(self) -> dict[str, int]:
        used = [row for row in self.rows if row.place]
        return {
            "tensors": len(used),
            "aliases": len(self.rows) - len(used),
            "ignored": len(self.ignored),
            "parameters": sum(row.parameters for row in used),
            "bytes": sum(row.bytes for row in used),
        }

    def facts(self) -> dict[str, Any]:
        """For the description that is saved with the weights."""
        lists = {"ignored": self.ignored, "notes": self.notes}
        lists |= {"loaded": self.loaded, "fresh": self.fresh} if self.loaded else {}
        return {"source": self.source, **self.totals(), **lists}

    def lines(self) -> list[str]:
        rows = [(row.name, row.facts, row.target) for row in self.rows]
        rows += [(name, "", f"ignored: {why}") for name, why in self.ignored.items()]
        rows = [tuple(printable(part[:300]) for part in row) for row in rows]
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        lines += [f"note: {note}" for note in self.notes]
        totals = self.totals()
        return [
            *lines,
            f"{totals['tensors']} tensors used, {totals['aliases']} more names of them, "
            f"{totals['ignored']} entries ignored; every array filled, every shape checked; "
            f"{totals['parameters']:,} parameters, {totals['bytes']:,} bytes",
        ]


def _array(tree: str, path: tuple[str, ...], index: Any) -> str:
    places = () if index is None else index if isinstance(index, tuple) else (index,)
    return f"{tree}/{'/'.join(path)}{''.join(f'[{i}]' for i in places)}"


def _in_network(place: Place, student: int, students: int) -> Place | None:
    """A student's array as a NAC's; None for what a NAC does not have."""
    (head, *rest), index = place
    if student == 0:
        return place if head in ("tokenizer", "read_in") else None
    if student == students - 1:
        head = {"layer": "read_out", "pooling": "pooling"}.get(head)
        return ((head, *rest), index) if head else None
    return (("propagators", *rest), student - 1) if head == "layer" else None
