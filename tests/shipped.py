"""Shipped configs as tests take them, and changed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.config.files import read_config, shipped_configs

ROOT = Path(__file__).resolve().parents[1]


def load(name: str, *argument: str) -> ConfigDict:
    """A shipped config by name."""
    return read_config(str(shipped_configs()[name]), argument)


def digits() -> ConfigDict:
    return load("nac_digits")


def change(key: str, value: Any) -> Callable[[ConfigDict], None]:
    """What sets a key (a.b.c) of a config, be it known, locked or of another type."""

    def apply(config: ConfigDict) -> None:
        with config.unlocked(), config.ignore_type():
            node = config
            *path, last = key.split(".")
            for name in path:
                node = node[name]
            node[last] = value

    return apply
