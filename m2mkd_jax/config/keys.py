"""What a key of the config is: its default, its meaning and the values that it may have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2mkd_jax.errors import is_finite

# Groups of keys whose subkeys are free, under whatever prefix they stand.
FREE = ("modules", "options")


@dataclass(frozen=True)
class Range:
    """Which values a number, or each entry of a tuple, may have.

    Attributes:
        words: for messages and the documentation.
        allows: whether a value is one of them. Numbers are finite before this is asked.
    """

    words: str
    allows: Callable[[Any], bool]


def in_single(value: Any) -> Any:
    """A number as the networks compute with it; a float below the least normal one is 0 there."""
    if type(value) is not float:
        return value
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    return 0.0 if abs(rounded) < np.finfo(np.float32).tiny else rounded


ABOVE_0 = Range("above 0", lambda v: v > 0)
ABOVE_0_TO_1 = Range("above 0, up to 1", lambda v: 0 < v <= 1)
FROM_0 = Range("0 or more", lambda v: v >= 0)
FROM_MINUS_1 = Range("-1 or more", lambda v: v >= -1)
# jax's own heartbeats (parallel/cluster.py) wait for a day.
WATCHDOG = Range("from 1 to 10000", lambda v: 1 <= v <= 10_000)
SHARE = Range("from 0 to 1", lambda v: 0 <= v <= 1)
SHARE_OR_MINUS_1 = Range("from 0 to 1, or -1", lambda v: v == -1 or 0 <= v <= 1)
BELOW_1 = Range("from 0 to below 1", lambda v: 0 <= v < 1)
# Seeds of 0, 1, ... are added, and jax, numpy and scikit-learn take 32 bits.
SEED = Range("from 0 to 2^31", lambda v: 0 <= v <= 2**31)
# for every entry of a tuple
COUNTS = Range("whole numbers above 0", lambda v: type(v) is int and v > 0)
INDICES = Range("whole numbers from 0", lambda v: type(v) is int and v >= 0)
NUMBERS = Range("numbers", is_finite)
POSITIVE_NUMBERS = Range("numbers above 0", lambda v: is_finite(v) and v > 0)
# Of pixels from 0 to 1; those of 0 to 255 are a common mistake.
MEANS = Range("numbers from 0 to 1", lambda v: is_finite(v) and 0 <= v <= 1)
DEVIATIONS = Range("numbers above 0, up to 1", lambda v: is_finite(v) and 0 < v <= 1)
REMAT = Range("auto, always or never", lambda v: v in ("auto", "always", "never"))
SAMPLERS = Range("shuffle or balanced", lambda v: v in ("shuffle", "balanced"))
CLASS_WEIGHTS = Range("none or balanced", lambda v: v in ("none", "balanced"))
NAMES = Range("names", lambda v: type(v) is str)


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        default: also says the key's type; a dict: its subkeys are free.
        meaning: for docs/config.md and --list_keys, with the unit.
        range: which values a number, or each entry of a tuple, may have; None: all finite ones.
        length: how many entries a tuple has; 0: any number.
        optional: whether None is allowed.
    """

    default: Any
    meaning: str = ""
    range: Range | None = None
    length: int = 0
    optional: bool = False


# Groups of keys, nested. A family of one's own may give plain defaults in place of Keys.
Keys = Mapping[str, Any]


def flatten(keys: Keys, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every key (a.b.c) of nested groups, in their order."""
    for name, value in keys.items():
        if isinstance(value, Key):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and name not in FREE:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", Key(value)


def default_values(keys: Keys) -> dict[str, Any]:
    """The same groups with each key's default in its place."""
    values: dict[str, Any] = {}
    for name, value in keys.items():
        if isinstance(value, Mapping):
            values[name] = default_values(value)
        else:
            default = value.default if isinstance(value, Key) else value
            values[name] = dict(default) if isinstance(default, Mapping) else default
    return values
