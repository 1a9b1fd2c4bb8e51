"""Checks of a config's keys one by one: known, present, of the right type, in range."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import all_keys
from m2mkd_jax.config.keys import FREE, Key, flatten, in_single
from m2mkd_jax.errors import UserError, did_you_mean, is_finite, require


def check_value(name: str, value: Any, key: Key) -> None:
    """Refuses a value of another type than its key's, or out of its range.

    Args:
        name: a.b.c, for messages.
        value: as the config gives it.
        key: what the value is for.

    Raises:
        UserError: one line that names the key.
    """
    if key.optional and value is None:
        return
    if isinstance(key.default, dict):
        require(isinstance(value, ConfigDict), f"config.{name} must be a dict, not {value!r}")
        return
    wanted = type(key.default)
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise UserError(f"config.{name} must be {wanted.__name__}, not {value!r}")
    words = key.range.words if key.range else "a finite number"
    allows = key.range.allows if key.range else lambda v: True
    rounded = in_single(value)
    both = lambda v: allows(v) and allows(in_single(v))  # host and device compute with it
    if type(value) in (int, float) and not (is_finite(rounded) and both(value)):
        raise UserError(f"config.{name} is {_said(value, rounded)}; it must be {words}")
    if type(value) is str and not allows(value):
        raise UserError(f"config.{name} is {value!r}; it must be {words}")
    if type(value) is tuple:
        if not all(both(entry) for entry in value):
            raise UserError(f"config.{name} is {value}; its entries must be {words}")
        if key.length and len(value) != key.length:
            raise UserError(f"config.{name} is {value}; it needs {key.length} numbers")


def _said(value: Any, rounded: Any) -> str:
    """A number for a message, and the bound that single precision makes of it, if it does."""
    edge = rounded in (0, 1, math.inf, -math.inf) and value != rounded
    return f"{value}, which is {rounded} in single precision" if edge else f"{value}"


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key (a.b.c) of a config with its value; a group with free subkeys is one value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key not in FREE:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_key(key: str, known: Collection[str] = ()) -> None:
    """Refuses a key that does not exist.

    Args:
        key: a.b.c.
        known: all keys there are; by default those of `base()`. Below a free one any may stand.

    Raises:
        UserError: one line that names the key, and the known one that is nearest to it.
    """
    known = known or [name for name, _ in flatten(all_keys())]
    if key in known or any(key.startswith(f"{k}.") for k in known if k.split(".")[-1] in FREE):
        return
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        raise UserError(f"config.{key} is a group of keys; set one, such as config.{below[0]}")
    hint = did_you_mean(key, known, "every key is listed in docs/config.md")
    raise UserError(f"config.{key} is unknown; {hint}")


def check_values(config: ConfigDict) -> None:
    """Refuses unknown keys, missing ones, and impossible values.

    Raises:
        UserError: one line that names the key.
    """
    family = config.get("family", "nac")
    check_value("family", family, Key("nac", ""))
    known, given = dict(flatten(all_keys(family))), dict(leaves(config))
    for name in (*given, *known):
        check_key(name, known)
        require(name in given, f"config.{name} is missing; start from m2mkd_jax.config.base()")
        check_value(name, given[name], known[name])
