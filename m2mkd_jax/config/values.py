"""Which values a config's numbers and tuples may have, each by itself (checks.py: together).

A rule is found by the end of a key: `lr` is a rule for `recipes.pt.lr` and all other recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import FREE, base
from m2mkd_jax.errors import UserError, did_you_mean, require

# words -> test of a number (NaN and infinity are refused before), and the keys it is for
NUMBERS: dict[str, tuple[Callable, str]] = {
    "above 0": (
        lambda v: v > 0,
        "accumulate temperature kernel_temperature ffn_capacity head_dim signature_dim eps "
        "position_dim truncation clusters components experts top_k capacity_factor "
        "repeated_augmentation evaluation.batch log_every e2e_seeds",
    ),
    "0 or more": (
        lambda v: v >= 0,
        "lr lr_per min_lr warmup_lr weight_decay clip mixup cutmix stop_within "
        "importance_weight load_weight regulariser.weight evaluation.every checkpoint_minutes "
        "train_images test_images shift noise code_noise group_images hinge "
        "stitch_dim",
    ),
    # Seeds of 0, 1, ... are added, and jax, numpy and scikit-learn take 32 bits.
    "from 0 to 2^31": (lambda v: 0 <= v <= 2**31, "seed"),
    "-1 or more": (lambda v: v >= -1, "workers"),
    "from 0 to 1": (
        lambda v: 0 <= v <= 1,
        "switch_prob mix_prob alpha p_in p_out damaged_share",
    ),
    "from 0 to below 1": (lambda v: 0 <= v < 1, "smoothing drop_path ema momentum"),
}
# the same for every entry of a tuple
TUPLES: dict[str, tuple[Callable, str]] = {
    "whole numbers above 0": (lambda v: type(v) is int and v > 0, "depths meta_depths"),
    "whole numbers from 0": (lambda v: type(v) is int and v >= 0, "tokenizer_depths moe_pos"),
    "numbers": (lambda v: _finite(v), "mean"),
    "numbers above 0": (lambda v: _finite(v) and v > 0, "std"),
    "names": (lambda v: type(v) is str, "phases renditions"),
}
CHANNELS = ("mean", "std")  # one number for each of three


def _finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _rule(rules: dict, key: str):
    for words, (allowed, names) in rules.items():
        if any(f".{key}".endswith(f".{name}") for name in names.split()):
            return words, allowed
    return None, lambda v: True


def check_value(key: str, value, default) -> None:
    """Raises UserError where config.`key` has not its default's type, or cannot have this value."""
    if key == "nac.truncation" and value is None:
        return
    if type(value) is not type(default) and not (type(default) is float and type(value) is int):
        raise UserError(f"config.{key} must be {type(default).__name__}, not {value!r}")
    if type(value) in (int, float):
        words, allowed = _rule(NUMBERS, key)
        if not (_finite(value) and allowed(value)):
            raise UserError(f"config.{key} is {value}; it must be {words or 'a finite number'}")
    if type(value) is tuple:
        words, allowed = _rule(TUPLES, key)
        if not all(allowed(entry) for entry in value):
            raise UserError(f"config.{key} is {value}; its entries must be {words}")
        if key.split(".")[-1] in CHANNELS and len(value) != 3:
            raise UserError(f"config.{key} is {value}; it needs 3 numbers, one for each channel")


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every key (a.b.c) of a config with its value; a free group of keys is one value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key not in FREE:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_key(key: str, known: Collection[str] = ()) -> None:
    """Raises UserError where `key` (a.b.c) is no key of `base()`, nor below a free one of it."""
    known = known or [name for name, _ in leaves(base())]
    if key in known or any(key.startswith(f"{k}.") for k in known if k.split(".")[-1] in FREE):
        return
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        raise UserError(f"config.{key} is a group of keys; set one, such as config.{below[0]}")
    hint = did_you_mean(key, known, "every key is listed in docs/config.md")
    raise UserError(f"config.{key} is unknown; {hint}")


def check_values(config: ConfigDict) -> None:
    """Raises UserError for a key that is unknown or not there, and for an impossible value."""
    known, given = dict(leaves(base(config.family))), dict(leaves(config))
    for key in (*given, *known):
        check_key(key, known)
        require(key in given, f"config.{key} is missing; start from m2mkd_jax.config.base()")
        check_value(key, given[key], known[key])
