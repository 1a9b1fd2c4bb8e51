"""Config files: the shipped ones by name, any other by path, and what is read from them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.arguments import at_home
from m2mkd_jax.config.values import check_key, leaves
from m2mkd_jax.errors import UserError, did_you_mean


def shipped_configs() -> dict[str, Path]:
    """The configs that come with this package, by name."""
    package = Path(__file__).resolve().parents[1]
    # setup.py puts the folder configs/ of the repository into the wheel as shipped_configs.
    installed = package / "shipped_configs"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def find_config(name: str) -> str:
    """The path of a config file.

    Args:
        name: of a shipped config, or a path: what has a slash or ends in .py.

    Raises:
        UserError: no config of this name is shipped.
    """
    if "/" in name or name.endswith(".py"):
        return os.fspath(at_home(name)) if name.startswith("~") else name
    shipped = shipped_configs()
    if name not in shipped:
        hint = did_you_mean(name, shipped)
        raise UserError(
            f'--config: no config "{name}" is shipped; {hint}; a file is named by a path with a '
            "slash or .py"
        )
    return str(shipped[name])


def read_config(path: str, argument: Sequence[str] = ()) -> ConfigDict:
    """The config that a file's get_config gives.

    config_flags runs the file as well, but hides or delays what goes wrong in it.

    Args:
        path: of a Python file that defines get_config.
        argument: nothing, or the one argument of get_config.

    Raises:
        UserError: the file fails, at the line that is named, or gives no ConfigDict.
        OSError: the file cannot be read.
    """
    try:
        found = runpy.run_path(path)
        if "get_config" not in found:
            raise UserError(f"--config={path} defines no get_config; see configs/")
        config = found["get_config"](*argument)
    except (UserError, OSError):
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        # A KeyError's text is the repr of its argument.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"--config={where}: {type(error).__name__}: {text}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() gives no ConfigDict; see configs/")
    return config


def check_overrides(arguments: Sequence[str], config: ConfigDict) -> None:
    """Refuses --config.KEY=VALUE for a key that the config does not have.

    Args:
        arguments: of the command line; what is no such flag is ignored.
        config: as its file gives it.

    Raises:
        UserError: names the whole key, and the known one that is nearest to it.
    """
    known = [key for key, _ in leaves(config)]
    for argument, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, given, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not flag.startswith("config."):
            continue
        key, index, _ = flag.removeprefix("config.").partition("[")
        check_key(key, known)
        if index:
            raise UserError(
                f"config.{key}: one entry cannot be set alone; give all of them, such as "
                f'--config.{key}="{_at(config, key)}"'
            )
        if any(part.isdecimal() for part in key.split(".")):
            raise UserError(
                f"config.{key}: numbers of modules cannot stand in a flag; give all modules, "
                "such as --config.recipes.mt.modules=\"{'0': {'epochs': 2}}\""
            )
        _check_number(key, value if given else after, _at(config, key))


def _check_number(key: str, text: str, value: Any) -> None:
    """Refuses a text for a key whose value is a number, unless absl reads it as such a one.

    Args:
        key: a.b.c.
        text: of the flag.
        value: of the key, as the config file gives it.

    Raises:
        UserError: one line that names the key, and says what it takes.
    """
    kind = type(value)
    if kind not in (int, float):
        return
    readers = (int, functools.partial(int, base=0)) if kind is int else (float,)
    for reader in readers:
        with contextlib.suppress(ValueError):
            reader(text)
            return
    what = "a whole number" if kind is int else "a number"
    hint = "; None is for config files" if text == "None" else ""
    raise UserError(f"config.{key} is {text!r}; it must be {what}, such as {value!r}{hint}")


def _at(config: ConfigDict, key: str) -> Any:
    """The value of a.b.c; a part of it that is a number has none in a flag."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part, {})
    return value.to_dict() if isinstance(value, ConfigDict) else value
