"""What the small commands share: arguments, one-line errors and exit codes.

The package of a command has its arguments in __init__.py, which loads no jax, so that --help costs
little, and its work in command.py, which is imported once the arguments are known to make sense.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from absl import logging

from m2mkd_jax import __version__
from m2mkd_jax.arguments import BROKEN_PIPE, Arguments, told
from m2mkd_jax.errors import Lost, UserError, printable, show_any_name
from m2mkd_jax.files.paths import storage_failure
from m2mkd_jax.interruption import ended_by_signals
from m2mkd_jax.parallel import memory
from m2mkd_jax.streams import abandon_output, open_missing

WRONG_INPUT = 2
LONGEST = 2000  # characters of a message


class Parser(Arguments):
    """The arguments of m2mkd_jax.NAME.

    It has --help and --version, which print and exit with code 0.

    Args:
        name: of the command's module, m2mkd_jax.NAME.
        doc: what the command does.
    """

    def __init__(self, name: str, doc: str):
        super().__init__(
            f"python -m m2mkd_jax.{name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"m2mkd_jax {__version__}")


def run(name: str, command: Callable[[], None]) -> int:
    """Runs a command.

    Args:
        name: of the command, for messages.
        command: does everything.

    Returns:
        The exit code: 0, or 2 with one line on stderr if the input is wrong.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax logs every step, and stacks of its errors
    open_missing()
    show_any_name()
    try:
        with ended_by_signals():
            command()
            sys.stdout.flush()
        return 0
    except (UserError, Lost) as error:
        reason = str(error)
    except BrokenPipeError:  # whoever reads the output has seen enough
        abandon_output()
        return BROKEN_PIPE
    except OSError as error:  # a path that is too long or not readable; a full disk
        reason = told(error)
    except MemoryError as error:
        reason = f"the memory does not suffice ({error}); ask for less, or take a larger machine"
    except Exception as error:
        reason = storage_failure(error) or memory.exhausted(error, memory.IN_INFERENCE)
        if not reason:
            raise
    line = printable(" ".join(reason.split()))
    if len(line) > LONGEST:  # names in a hostile file may have any length
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"m2mkd_jax.{name}: {line}", file=sys.stderr)
    return WRONG_INPUT


def run_module(name: str, parser: Parser, argv: Sequence[str] | None) -> int:
    """Runs `run(arguments)` of m2mkd_jax.NAME.command, which is imported after they are parsed.

    Args:
        name: of the command.
        parser: of its arguments.
        argv: the arguments; None: those of the process.

    Returns:
        The exit code, as of `run`.
    """

    def command() -> None:
        arguments = parser.parse_args(argv)
        module = import_module(f"m2mkd_jax.{name}.command")
        if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # where jax alone mixes machines
            cache = import_module("m2mkd_jax.parallel.compilation_cache")
            cache.enable_compilation_cache()
        module.run(arguments)

    return run(name, command)
