"""The report of a conversion: every tensor that is used or ignored, and every array filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.conversion.names import ArrayPath, Entry, Index, as_tuple
from m2mkd_jax.errors import printable

Place = tuple[ArrayPath, Index]  # an array's path, and an index along its stacked axes


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the tensor or array that was converted.
        facts: type and shape, as text.
        target: where it went, as text.
        place: where it went in its tree; None in a row that lists another name of the row before.
        student: number of the student that it belongs to.
        parameters: parameter count.
        bytes: size in the source.
    """

    name: str
    facts: str
    target: str
    place: Place | None = None
    student: int = 0
    parameters: int = 0
    bytes: int = 0


class Report:
    """Collects rows while trees are made, and formats them.

    Args:
        source: path of the weights.
        ignored: name in the source -> why it is not converted.
        aliases: name in the network -> all its names in the source.

    Attributes:
        source: as above.
        ignored: as above.
        aliases: as above.
        notes: decisions that are not from the weights.
        rows: so far.
        loaded: of a network assembled from students: its tensor -> the student's tensor.
        fresh: of such a network: the tensors that no student has.
    """

    def __init__(self, source: str, ignored: dict[str, str], aliases: dict[str, list[str]]):
        self.source = source
        self.ignored, self.aliases = ignored, aliases
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.loaded: dict[str, str] = {}
        self.fresh: list[str] = []

    def shown(self, name: str) -> str:
        """A tensor's (first) name in the source."""
        return self.aliases.get(name, [name])[0]

    def rename(self, names: Mapping[str, str]) -> None:
        """Changes names in the network; `names`: old -> new."""
        self.aliases = {names.get(n, n): shown for n, shown in self.aliases.items()}

    def ignore(self, name: str, reason: str) -> None:
        """Notes that a tensor of the network is not converted."""
        for shown in self.aliases.pop(name, [name]):
            self.ignored[shown] = reason

    def used(self, entry: Entry, tensor: Tensor, tree: str) -> None:
        """Adds the rows of a tensor that was copied into a tree."""
        first, *others = self.aliases.get(entry.torch, [entry.torch])
        facts = f"{tensor.dtype} {list(tensor.shape)}"
        count = int(np.prod(tensor.shape))
        student = int(tree.rpartition("_")[2]) if tree.startswith("student_") else 0
        self.rows.append(
            Row(
                first,
                facts,
                f"-> {_array_name(tree, entry.path, entry.index)}",
                (entry.path, entry.index),
                student,
                count,
                count * np.dtype(tensor.dtype).itemsize,
            )
        )
        self.rows += [Row(other, "", f"is {first}") for other in others]

    def wrote(self, entry: Entry, name: str, array: np.ndarray, tree: str) -> None:
        """Adds the row of an array, or of a slice of one, that became the tensor `name`."""
        facts = f"{array.dtype.name} {list(array.shape)}"
        ours = _array_name(tree, entry.path, entry.index)
        place = (entry.path, entry.index)
        self.rows.append(Row(ours, facts, f"-> {name}", place, 0, array.size, array.nbytes))

    def assembled(
        self, targets: Mapping[Place, str], kept: Iterable[Place], students: int, seed: int
    ) -> None:
        """Replaces the places in the students, in the rows so far, by those in their network.

        Args:
            targets: place in the network -> the published name of that tensor.
            kept: places that no student filled.
            students: how many there were.
            seed: what those were drawn from.
        """
        rows, self.rows = self.rows, []
        kept = set(kept)
        for row in rows:
            if row.place is None:  # another name of the row before
                if self.rows and self.rows[-1].name == row.target.removeprefix("is "):
                    self.rows.append(row)
                continue
            place = _place_in_network(row.place, row.student, students)
            if place is None or place not in targets:
                self.ignored[row.name] = "a stitch: no part of the network"
            elif place in kept:
                self.ignored[row.name] = "of another size or task: fresh in the network"
            else:
                self.loaded[targets[place]] = row.name
                target = f"-> {_array_name('nac', *place)}"
                self.rows.append(
                    Row(row.name, row.facts, target, place, 0, row.parameters, row.bytes)
                )
        self.fresh = [name for place, name in targets.items() if place in kept]
        self.notes.append(f"fresh, from seed {seed}: {', '.join(self.fresh)}")

    def totals(self) -> dict[str, int]:
        """Numbers of tensors, further names, ignored entries, parameters and bytes."""
        used = [row for row in self.rows if row.place]
        return {
            "tensors": len(used),
            "aliases": len(self.rows) - len(used),
            "ignored": len(self.ignored),
            "parameters": sum(row.parameters for row in used),
            "bytes": sum(row.bytes for row in used),
        }

    def facts(self) -> dict[str, Any]:
        """What is saved in the description of the weights."""
        lists: dict[str, Any] = {"ignored": self.ignored, "notes": self.notes}
        lists |= {"loaded": self.loaded, "fresh": self.fresh} if self.loaded else {}
        return {"source": self.source, **self.totals(), **lists}

    def lines(self) -> list[str]:
        """The table as text, then the notes and the totals."""
        cells = [(row.name, row.facts, row.target) for row in self.rows]
        cells += [(name, "", f"ignored: {why}") for name, why in self.ignored.items()]
        rows = [[printable(cell[:300]) for cell in row] for row in cells]
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


def _array_name(tree: str, path: ArrayPath, index: Index) -> str:
    return f"{tree}/{'/'.join(path)}{''.join(f'[{i}]' for i in as_tuple(index))}"


def _place_in_network(place: Place, student: int, students: int) -> Place | None:
    """The place in a NAC of a student's array; None if a NAC has no such array.

    Args:
        place: in the student.
        student: its number.
        students: how many there are.
    """
    (head, *rest), index = place
    if student == 0:
        return place if head in ("tokenizer", "read_in") else None
    if student == students - 1:
        target = {"layer": "read_out", "pooling": "pooling"}.get(head)
        return ((target, *rest), index) if target else None
    return (("propagators", *rest), student - 1) if head == "layer" else None
