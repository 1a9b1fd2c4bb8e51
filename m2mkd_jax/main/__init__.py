"""m2mkd --config=CONFIG --workdir=DIR [--config.KEY=VALUE ...]: the phases of a config, in order.

`python -m m2mkd_jax.main` is the same command.

Exit codes: 0 done; 2 the input is wrong (one line on stderr); 3 preempted, state saved, run the
same command again; 4 another process of the run is lost, or a bucket does not answer; 141 nobody
reads the output any more; anything else is a bug.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module

import m2mkd_jax


def start() -> None:
    """Entry point of the command; --help and --version load no jax."""
    import_module("m2mkd_jax.streams").open_missing()
    # Until the command runs, Ctrl-C ends it without a stack of half-done imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = {argument.lstrip("-") for argument in sys.argv[1:] if argument.startswith("-")}
    if words & {"help", "helpshort", "h", "?"}:
        print(import_module("m2mkd_jax.main.flags").usage())
        return
    if "version" in words:
        print(f"m2mkd_jax {m2mkd_jax.__version__}")
        return
    import_module("m2mkd_jax.parallel.huge_pages").start_again()
    import_module("m2mkd_jax.main.command").start()
