"""What m2mkd does once it is neither --help nor --version."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # jax reads it when it is imported

import errno
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from m2mkd_jax.arguments import BROKEN_PIPE, named_file, refuse_repeated
from m2mkd_jax.config.document import list_keys
from m2mkd_jax.config.files import check_overrides, find_config, read_config
from m2mkd_jax.config.values import check_values
from m2mkd_jax.errors import Lost, UserError, printable, show_any_name
from m2mkd_jax.files.paths import as_path, storage_failure
from m2mkd_jax.interruption import heard, raising
from m2mkd_jax.jobs.dry_run import dry_run
from m2mkd_jax.jobs.pipeline import STOPPED, run
from m2mkd_jax.jobs.summary import print_summary
from m2mkd_jax.main.flags import CONFIG, DRY_RUN, EXTEND, LIST_KEYS, ONLY, REDO, WORKDIR
from m2mkd_jax.parallel import cluster, memory, process, watchdog
from m2mkd_jax.streams import abandon_output, leave_terminal, output_failed
from m2mkd_jax.train.stops import Preempted

BUG, WRONG_INPUT, PREEMPTED = 1, 2, 3
KEPT = "finished jobs and checkpoints are kept; run the same command again to go on"
# Errors of the operating system that are the user's to solve.
USER_ERRORS = (
    errno.ENOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC),  # a quota; Windows has another name for it
    errno.EFBIG,  # `ulimit -f`
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ELOOP,
    errno.ENOTEMPTY,
    getattr(errno, "ESTALE", errno.EIO),  # a network's file system
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


def _one_line(error: BaseException) -> str:
    # A KeyError's text is the repr of its argument.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return printable(" ".join(text.split())).replace("Did you mean", "did you mean")


def _refuse(error: BaseException, where: str = "") -> int:
    """Prints the line of an error on stderr; the exit code of wrong input."""
    return process.fail(f"m2mkd_jax: {where}{_one_line(error)}", WRONG_INPUT)


def _require(flag: flags.FlagHolder) -> None:
    """Refuses a flag that is not given, or blank. Raises UserError."""
    if not (flag.value and str(flag.value).strip()):
        raise UserError(f"--{flag.name} is missing; see m2mkd --help")


def _find_configs(argv: Sequence[str]) -> list[str]:
    """The arguments with --config=NAME turned into the path of that config.

    Raises:
        UserError: there is no such config, it fails, or a key is overridden that it has not.
    """
    found, config = list(argv), None
    for i, argument in enumerate(argv):
        name, given, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name != "config":
            continue
        value = value if given else "".join(argv[i + 1 : i + 2])
        if not value:
            raise UserError("--config is missing; see m2mkd --help")
        file, *argument_of_file = value.split(":", 1)
        path = find_config(file)
        config = read_config(path, argument_of_file)
        value = ":".join([path, *argument_of_file])
        if given:
            found[i] = f"--config={value}"
        else:
            found[i + 1] = value
    if config is not None:
        check_overrides(argv[1:], config)
    return found


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with every complaint as one line and exit code 2."""
    try:
        refuse_repeated(argv[1:])
        rest = flags.FLAGS(_find_configs(argv))
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}; flags start with --")
        _require(CONFIG)
        if not LIST_KEYS.value:
            _require(WORKDIR)
    except (flags.Error, UserError, KeyError, AttributeError, TypeError, ValueError) as error:
        sys.exit(_refuse(error))
    except OSError as error:
        sys.exit(_refuse(error, "--config: "))
    return rest


def _terminated(number: int) -> Preempted:
    if number == process.HANGUP:
        leave_terminal()
    return Preempted(STOPPED)


def _as_sigterm(number: int, _: Any) -> None:
    """Handles what asks one of several processes to stop; a second SIGINT ends it at once."""
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
    if number == process.HANGUP:
        leave_terminal()
    os.kill(os.getpid(), signal.SIGTERM)


def _workdir(given: str) -> Path:
    """The directory of the run.

    Raises:
        UserError: its name is not UTF-8, which Orbax needs, or it lies where no run can be, or is
            a pattern or in quotes, which the shell has left as it is.
    """
    if given.startswith(("'", '"')) or ("*" in given and not os.path.exists(given)):
        raise UserError(f"--workdir={printable(given)}: give the path of one directory, as it is")
    try:
        os.fsencode(given).decode()
    except UnicodeDecodeError:
        raise UserError(
            f"--workdir={printable(given)}: its name is not UTF-8; use another"
        ) from None
    return as_path(given)


def _run(config: ConfigDict, workdir: Path) -> None:
    """Does what the flags ask for. Raises UserError, OSError and Preempted."""
    check_values(config)
    if LIST_KEYS.value:
        print("\n".join(list_keys(config)))
    elif DRY_RUN.value:
        dry_run(config, workdir, ONLY.value, REDO.value, EXTEND.value)
    else:
        print_summary(run(config, workdir, ONLY.value, REDO.value, EXTEND.value))
    sys.stdout.flush()  # here somebody answers for what nobody reads


def _storage_failed(reason: str) -> int:
    """Says what a bucket answered; the exit code: another start may help, but for who may not."""
    code = WRONG_INPUT if "Forbidden" in reason else watchdog.LOST
    hint = "may it be written?" if code == WRONG_INPUT else "run the same command again"
    return process.fail(f"m2mkd_jax: {WORKDIR.value}: {printable(reason)}; {hint}", code)


def _refused(error: OSError) -> str:
    """What the system has refused, in one line; "": it may be a fault of this package."""
    where, known = named_file(error), error.errno in USER_ERRORS
    if known and not where and output_failed():
        return f"its output cannot be written: {error.strerror}; {KEPT}"
    if error.errno == errno.ENOENT and where and not Path(where).parent.is_dir():
        return f"{Path(where).parent} has vanished; restore it, and run the same command again"
    return f"{where or WORKDIR.value}: {error.strerror}" if known else ""


def main(argv: list[str]) -> int:
    """The command, once its flags are parsed.

    Args:
        argv: unused; the flags hold everything.

    Returns:
        The exit code.
    """
    del argv
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Orbax logs through absl: every step, and stacks of what it raises. What jax logs is for users.
    logging.get_absl_logger().setLevel("CRITICAL")
    for number in process.SIGNALS if process.alone() else ():
        signal.signal(number, raising(_terminated))
    # jax catches SIGTERM, and asks all processes at their next step or batch of an evaluation
    for number in () if process.alone() else process.SIGNALS[1:]:
        signal.signal(number, _as_sigterm)
    try:
        _run(CONFIG.value, _workdir(WORKDIR.value or "."))
    except UserError as error:
        return _refuse(error)
    except BrokenPipeError:  # whoever reads the output has seen enough
        abandon_output()
        if LIST_KEYS.value or DRY_RUN.value:
            return BROKEN_PIPE
        return process.fail(f"m2mkd_jax: nobody reads its output any more; {KEPT}", BROKEN_PIPE)
    except OSError as error:
        if line := storage_failure(error):
            return _storage_failed(line)
        if not (line := _refused(error)):
            raise
        return process.fail(f"m2mkd_jax: {line}", WRONG_INPUT)
    except Lost as error:
        return process.fail(f"m2mkd_jax: {error}; run the same command again", watchdog.LOST)
    except Preempted as stop:
        heard()
        if process.is_main():
            print(f"m2mkd_jax: {stop}; run the same command again to go on", file=sys.stderr)
        return PREEMPTED
    except (Exception, KeyboardInterrupt) as error:
        if line := memory.exhausted(error):
            return process.fail(f"m2mkd_jax: {line}", WRONG_INPUT)
        if line := storage_failure(error):
            return _storage_failed(line)
        if process.alone():
            raise
        if line := watchdog.blame():
            return process.fail(f"m2mkd_jax: {line}", watchdog.LOST)
        return process.fail(traceback.format_exc(), BUG)
    return 0


def start() -> None:
    """Joins the other processes of the run, parses flags, runs."""
    show_any_name()
    logging.set_verbosity(logging.WARNING)
    try:
        cluster.start_distributed()
    except UserError as error:
        sys.exit(_refuse(error))
    app.run(_to_the_end, flags_parser=_parse)


def _to_the_end(argv: list[str]) -> int:
    """Runs `main`; after an error nothing is waited for.

    Where a directory cannot be made, Orbax's threads wait for it for many minutes.
    """
    code = main(argv)
    if code in (WRONG_INPUT, watchdog.LOST):
        sys.stdout.flush()
        os._exit(code)
    return code
