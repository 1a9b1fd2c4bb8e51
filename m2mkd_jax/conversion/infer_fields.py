"""Fields of a network from its weights, from `--arch`, and from published variants."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from m2mkd_jax.errors import UserError


class Shapes:
    """Shapes of tensors by name, looked up with the rank that they should have.

    Args:
        shapes: name -> shape.
        where: the path, for messages.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], where: str):
        self.shapes, self.where = dict(shapes), where

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises UserError if it is missing or of another rank."""
        shape = self.shapes.get(name)
        if shape is None:
            raise UserError(f'{self.where}: tensor "{name}" is missing')
        if len(shape) != rank or 0 in shape:
            raise UserError(f'{self.where}: tensor "{name}" has shape {shape}, not {rank} axes')
        return shape

    def ending(self, suffix: str, rank: int) -> list[tuple[int, ...]]:
        """Shapes of all tensors whose name has this suffix. Raises UserError as `of` does."""
        return [self.of(name, rank) for name in self.shapes if name.endswith(suffix)]

    def numbered(self, pattern: str, what: str) -> list[list[str]]:
        """Groups tensors by a number in their names.

        Args:
            pattern: a regular expression for what precedes the number; a dot follows it.
            what: what is numbered, for messages.

        Returns:
            For each number from 0 on, what follows number and dot in the names.

        Raises:
            UserError: a number is missing.
        """
        found: dict[int, list[str]] = {}
        for name in self.shapes:
            if match := re.match(rf"{pattern}(\d{{1,6}})\.(.+)$", name):
                found.setdefault(int(match[1]), []).append(match[2])
        if sorted(found) != list(range(len(found))):
            missing = next(i for i in range(len(found)) if i not in found)
            raise UserError(f"{self.where}: {what} {missing} is missing")
        return [found[i] for i in range(len(found))]


class FieldResolver:
    """Resolves fields of a network: what the weights show, then `--arch`, then published values.

    Args:
        found: fields that the weights show.
        given: fields of `--arch`.
        overridable: fields in which `given` may differ from `found`.
        where: the path, for messages.

    Attributes:
        found: as above.
        given: as above, tuples as lists.
        published: fields assumed so far.
        notes: one line per assumed field.

    Raises:
        UserError: `given` contradicts `found`.
    """

    def __init__(
        self,
        found: Mapping[str, Any],
        given: Mapping[str, Any],
        overridable: Iterable[str],
        where: str,
    ):
        self.found, self.where = found, where
        self.given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        for field, value in self.given.items():
            if field in found and field not in overridable and found[field] != value:
                raise UserError(
                    f"{where}: --arch says {field} {value}, the weights have {found[field]}"
                )
        self.published: dict[str, Any] = {}
        self.notes: list[str] = []

    def assume(self, fields: Mapping[str, Any], variant: str) -> None:
        """Takes published values for fields that are unknown so far.

        Args:
            fields: the published values.
            variant: what they are published for, for the notes.
        """
        for field, value in fields.items():
            if not {field} & (self.found.keys() | self.given.keys() | self.published.keys()):
                self.published[field] = value
                self.notes.append(f"{field} {value}: that of {variant}")

    def get(self, *fields: str) -> dict[str, Any]:
        """The values of these fields. Raises UserError that asks for the unknown ones."""
        values = {**self.published, **self.given, **self.found}
        missing = [field for field in fields if field not in values]
        if missing:
            example = ", ".join(f'"{field}": ...' for field in missing)
            raise UserError(
                f"{self.where}: {' and '.join(missing)} cannot be read off these weights; say it "
                f"with --arch=VARIANT:DEPTHS, a config, or a JSON file {{{example}}}"
            )
        return {field: values[field] for field in fields}
