"""What means "the user's input is wrong", and the words of such messages."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Wrong input: its message is one line that says what is wrong, where, and what to do.

    `main` prints the message on stderr and exits with code 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


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
    """The end of a message about an unknown word: the known word that is nearest to it.

    Args:
        word: what was given.
        known: what could have been given.
        otherwise: where nothing is near; by default all known words.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, 1)
    if close:
        return f'did you mean "{close[0]}"?'
    return otherwise or f"known: {', '.join(known)}"


def printable(text: str) -> str:
    """Without the line breaks and control characters that names in a file may have."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
