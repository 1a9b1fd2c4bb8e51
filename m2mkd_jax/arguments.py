"""Arguments of a command line: each given once, ~ anywhere, a mistake told in one line."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.streams import abandon_output, open_missing, output_failed

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # of Windows
BROKEN_PIPE = 128 + 13  # as a shell shows a process that SIGPIPE ended


class Arguments(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, not several lines and an exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's. Refuses flags given twice; a home directory is meant by ~ anywhere."""
        args = sys.argv[1:] if args is None else args
        refuse_repeated(args)
        return super().parse_known_args([_at_home(argument) for argument in args], namespace)


def at_home(given: str | os.PathLike) -> Path:
    """A local path, whose ~ or ~USER at the start is a home directory.

    Raises:
        UserError: it is nobody's, or has a drive of Windows on another system; a directory of that
            name is hardly meant.
    """
    text = os.path.expanduser(given)
    if os.name != "nt" and _DRIVE.match(text):
        raise UserError(f"{text} is a path of Windows; give it as this system has it (/mnt/c/...)")
    if text.startswith("~"):
        name = text.partition("/")[0]
        raise UserError(f"{text}: no home directory of {name} is known; give the path from / on")
    return Path(text)


def _at_home(argument: str) -> str:
    """An argument, or --flag=value, whose ~ is a home directory: no shell does it after a =."""
    flag, given, value = argument.partition("=")
    if argument.startswith("--") and given:
        return f"{flag}={_at_home(value)}" if value.startswith("~") else argument
    return os.fspath(at_home(argument)) if argument.startswith("~") else argument


def refuse_repeated(arguments: Iterable[str]) -> None:
    """Refuses flags that are given twice, of which only the last would count.

    Args:
        arguments: of the command line; --noFLAG is --FLAG.

    Raises:
        UserError: names the flag.
    """
    seen: set[str] = set()
    for argument in itertools.takewhile(lambda word: word != "--", arguments):
        name = argument.partition("=")[0].lstrip("-")
        if not argument.startswith("-") or not name[:1].isalpha():
            continue
        if not seen.isdisjoint({name, f"no{name}", name.removeprefix("no")}):
            raise UserError(f"--{name} is given twice; give it once")
        seen.add(name)


def answer(command: Callable[[], int]) -> int:
    """Runs a small command that needs nothing of jax.

    Args:
        command: does everything, and returns the exit code.

    Returns:
        Its exit code; 2 after one line on stderr if the input is wrong, or a file
        cannot be read or written; BROKEN_PIPE if whoever reads the output has seen enough.
    """
    open_missing()
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"m2mkd_jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        abandon_output()
        return BROKEN_PIPE
    except OSError as error:  # a path that is too long or not readable; a full disk
        print(f"m2mkd_jax: {printable(told(error))}", file=sys.stderr)
        return 2


def told(error: OSError) -> str:
    """What an error of the system says, and of which file."""
    where = named_file(error) or ("its output cannot be written" if output_failed() else "")
    return f"{where}: {error.strerror or error}" if where else str(error.strerror or error)


def named_file(error: OSError) -> str:
    """The file that an error is about; of a rename, the name that was meant."""
    return os.fsdecode(error.filename2 or error.filename or "")
