"""Errors in the user's input, and helpers for checks and messages."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any

# Least share of common letters of words that are mistaken for each other (difflib).
SIMILAR = 0.65


class UserError(Exception):
    """Wrong input: its message is one line that says what is wrong, where, and what to do.

    `main` prints the message on stderr and exits with code 2.
    """


class Lost(Exception):
    """A process that this one needs has ended, in one line; the same command goes on."""


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def is_finite(value: Any) -> bool:
    """Whether a value is an int or a float that floats can hold, neither NaN nor infinite."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def require_known(value: Any, known: Collection[str], key: str) -> None:
    """Raises UserError unless a config's value is one of the known ones.

    Args:
        value: of the key.
        known: what it may be.
        key: of the config, such as recipes.pt.optimizer.
    """
    close = closest(str(value), known)
    hint = f'did you mean "{close}"? ' if close else ""
    listed = ", ".join(known)
    require(value in known, f'config.{key}: "{value}" is unknown; {hint}known: {listed}')


def closest(word: str, known: Iterable[str]) -> str:
    """The known word that is most similar to `word`; "" if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, SIMILAR)), "")


@contextlib.contextmanager
def located(key: str) -> Iterator[None]:
    """Names `key` ("config.a.b") in the message of a UserError that is raised inside.

    A message that begins with the last part of the key ("b.c is ...") gets the parts before it, one
    that begins with "config." stays as it is.
    """
    try:
        yield
    except UserError as error:
        message, (parents, dot, last) = str(error), key.rpartition(".")
        if message.startswith("config."):
            raise
        inside = message.startswith((f"{last}.", f"{last}:", f"{last} "))
        raise UserError(f"{parents}{dot}{message}" if inside else f"{key}: {message}") from None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown word: the most similar known one.

    Args:
        word: what the user wrote.
        known: what could have been written.
        otherwise: what to say if no known word is similar; "" lists all known words.
    """
    known = list(known)
    if close := closest(word, known):
        return f'did you mean "{close}"?'
    return otherwise or f"known: {', '.join(known)}"


def show_any_name() -> None:
    """From here on, names that the terminal's encoding lacks are printed with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """`text` with line breaks and control characters escaped; names in a file may have them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
