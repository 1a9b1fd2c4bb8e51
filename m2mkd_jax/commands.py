"""What the small commands (convert, predict) share: one-line errors and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import logging

from m2mkd_jax.errors import UserError

WRONG_INPUT = 2


class Parser(argparse.ArgumentParser):
    """argparse with its complaints as UserError instead of several lines and an exit."""

    def __init__(self, prog: str, doc: str):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=doc, formatter_class=kind, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run(name: str, command: Callable[[], None]) -> int:
    """Runs a command; 0, or 2 and one line on stderr where the input is wrong."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    try:
        command()
    except UserError as error:
        print(f"m2mkd_jax.{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    return 0
