"""python -m m2mkd_jax.main --config=configs/NAME.py --workdir=DIR [--config.a.b=VALUE ...]

Exit codes: 0 done; 2 the input is wrong (one line on stderr); 3 preempted, state saved, run the
same command again; anything else is a bug.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # jax reads it when it is imported

import errno
import runpy
import signal
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from m2mkd_jax.config.values import check_key, check_values, leaves
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.dry_run import dry_run
from m2mkd_jax.jobs.pipeline import run
from m2mkd_jax.jobs.summary import print_summary
from m2mkd_jax.parallel import cluster, process
from m2mkd_jax.train.loop import Preempted

BUG, WRONG_INPUT, PREEMPTED = 1, 2, 3
# What is the user's to put right: a path that must not or cannot be written, a full disk.
FULL = (errno.ENOSPC, errno.EDQUOT)
USERS = (
    *FULL,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file; see configs/")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run")
_ONLY = flags.DEFINE_string("only", "", "jobs to run, e.g. m2mkd/3,e2e; all by default")
_REDO = flags.DEFINE_string("redo", "", "jobs to start again, and all that stand on them")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "say what would run; needs no data")


def _one_line(error: BaseException) -> str:
    # A KeyError's text is the repr of its argument.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()).replace("Did you mean", "did you mean")


def _check_keys(argv: list[str], config: ConfigDict) -> None:
    """Raises UserError for an override of a key that no config has, naming the whole key."""
    known = [key for key, _ in leaves(config)]
    for argument in argv[1:]:
        flag = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and flag.startswith("config."):
            key = flag.removeprefix("config.").partition("[")[0]
            check_key(key, known)
            if any(part.isdigit() for part in key.split(".")):
                raise UserError(
                    f"config.{key}: numbers of modules cannot stand in a flag; give all modules, "
                    "such as --config.recipes.mt.modules=\"{'0': {'epochs': 2}}\""
                )


def _read_file(path: str, *argument: str) -> ConfigDict:
    """What a config file gives. Raises UserError, naming the line, where it cannot be run.

    config_flags would run it too, but hides or delays what goes wrong.
    """
    try:
        config = runpy.run_path(path)["get_config"](*argument)
    except UserError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"--config={where}: {type(error).__name__}: {_one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() gives no ConfigDict; see configs/")
    return config


def _require(flag: flags.FlagHolder, value) -> None:
    """Raises UserError for a flag that is not given, or empty."""
    if not value:
        raise UserError(f"--{flag.name} is missing; python -m m2mkd_jax.main --helpfull")


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with every complaint as one line and exit code 2."""
    config = None
    try:
        for i, argument in enumerate(argv):
            name, given, value = argument.lstrip("-").partition("=")
            if argument.startswith("-") and name == "config":
                value = value if given else "".join(argv[i + 1 : i + 2])
                _require(_CONFIG, value)
                config = _read_file(*value.split(":", 1))
        if config is not None:
            _check_keys(argv, config)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}; flags start with --")
        for flag in (_CONFIG, _WORKDIR):
            _require(flag, flag.value)
    except (flags.Error, UserError, KeyError, AttributeError, TypeError, ValueError) as error:
        sys.exit(process.fail(f"m2mkd_jax: {_one_line(error)}", WRONG_INPUT))
    except OSError as error:
        sys.exit(process.fail(f"m2mkd_jax: --config: {_one_line(error)}", WRONG_INPUT))
    return rest


def _terminated(number, frame) -> None:
    raise Preempted("stopped by a signal; finished jobs and checkpoints are kept")


def main(argv: list[str]) -> int:
    del argv
    # Orbax logs through absl: every step, and stacks of what it raises. What jax logs is for users.
    logging.get_absl_logger().setLevel("CRITICAL")
    if process.alone():  # several processes: jax catches it; in the loop: after the step, saved
        signal.signal(signal.SIGTERM, _terminated)
    try:
        config, workdir = _CONFIG.value, Path(_WORKDIR.value)
        check_values(config)
        if _DRY_RUN.value:
            dry_run(config, workdir, _ONLY.value, _REDO.value)
            return 0
        print_summary(run(config, workdir, _ONLY.value, _REDO.value))
    except UserError as error:
        return process.fail(f"m2mkd_jax: {_one_line(error)}", WRONG_INPUT)
    except OSError as error:
        # A write to an open file does not say to which; a full disk is that of the run.
        where = error.filename or (_WORKDIR.value if error.errno in FULL else "")
        if error.errno not in USERS or not where:
            raise
        return process.fail(f"m2mkd_jax: {where}: {error.strerror}", WRONG_INPUT)
    except Preempted as stop:
        if process.is_main():
            print(f"m2mkd_jax: {stop}; run the same command again to go on", file=sys.stderr)
        return PREEMPTED
    except (Exception, KeyboardInterrupt):
        if process.alone():
            raise
        return process.fail(traceback.format_exc(), BUG)
    return 0


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    try:
        cluster.start_distributed()
    except UserError as error:
        sys.exit(process.fail(f"m2mkd_jax: {_one_line(error)}", WRONG_INPUT))
    app.run(main, flags_parser=_parse)
