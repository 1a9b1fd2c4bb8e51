"""Bad configs made from the table of keys: each is refused in one line that names the key."""

import itertools
import os
import random

import pytest
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import all_keys
from m2mkd_jax.config.keys import FREE, flatten
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from tests.e2e import tiny, tiny_vmoe

SEED = int(os.environ.get("CHAOS_SEED", "0"))
COUNT = 300
FAMILIES = {"nac": tiny, "vmoe": tiny_vmoe}


def wrong_values(key, draw):
    """Values that a key cannot have: of other types, not finite, out of its range."""
    default = key.default
    others = ["x y", 1.5, 3, (1, "a"), None, {"a": 1}, -7, float("nan"), 1e400, b"x"]
    if isinstance(default, dict):
        return ["x", 3, (1,)]
    allowed = {bool: (bool,), int: (int,), float: (int, float), str: (str,), tuple: (tuple,)}
    kinds = allowed[type(default)]
    values = [v for v in others if type(v) not in kinds and not (v is None and key.optional)]
    if key.range and type(default) in (int, float):
        values += [v for v in (-1e9, -3, -1, 0, 1, 2, 10**12) if not key.range.allows(v)]
    if key.range and type(default) is str:
        values += [v for v in ("", "?") if not key.range.allows(v)]
    if type(default) is float:
        values += [float("inf"), float("nan")]
    draw.shuffle(values)
    return values


def bad_configs(family, draw):
    """(key, change of a good config), the keys in any order, again and again."""
    keys = [(name, key) for name, key in flatten(all_keys(family)) if name != "family"]
    draw.shuffle(keys)
    queues = {name: iter(wrong_values(key, draw)) for name, key in keys}
    while queues:
        for name, queue in list(queues.items()):
            value = next(queue, queues)
            if value is queues:
                del queues[name]
                continue
            yield name, value
        misspelt = draw.choice(keys)[0]
        yield misspelt[:-1] + "_" + misspelt[-1], 1


def set_key(config, name, value):
    *parents, last = name.split(".")
    node = config
    for part in parents:
        node = node[part]
    with node.ignore_type(), node.unlocked():
        node[last] = ConfigDict(value) if isinstance(value, dict) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_values_are_refused_by_their_key(family):
    draw = random.Random(SEED)
    refused = 0
    for name, value in itertools.islice(bad_configs(family, draw), COUNT // 2):
        config = FAMILIES[family].get_config()
        set_key(config, name, value)
        with pytest.raises(UserError) as error:
            checks.check_config(config)
        text = str(error.value)
        known = name.rsplit(".", 1)[0] if name.split(".")[-1] in FREE else name
        assert "\n" not in text and known in text, (name, value, text)
        refused += 1
    print(f"{family}: seed {SEED}, {refused} bad values refused")
    assert refused == COUNT // 2
