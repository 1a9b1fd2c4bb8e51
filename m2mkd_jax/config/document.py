"""python -m m2mkd_jax.config.document > docs/config.md: the table of every config key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import GROUPS, all_keys
from m2mkd_jax.config.keys import Key, Keys, flatten
from m2mkd_jax.config.values import leaves

HEAD = """\
# Config keys

Made by `python -m m2mkd_jax.config.document > docs/config.md` from the tables of keys in
m2mkd_jax/config/; do not edit.

A config file starts from `m2mkd_jax.config.base()` and sets keys; on the command line
`--config.KEY=VALUE` sets one more. `m2mkd --config=CONFIG --list_keys` prints the keys of one
config with their values. Unknown keys and impossible values are refused before any work.
Tuples and dicts are quoted: `--config.teacher.depths="(2,2)"`."""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _row(name: str, key: Key) -> str:
    values = key.range.words if key.range else ""
    if key.optional:
        values += ", or None"
    default = '""' if key.default == "" else str(key.default)
    return f"| `{name}` | `{default}` | {_cell(values)} | {_cell(key.meaning)} |"


def _sections(keys: Keys, prefix: str, seen: dict[int, str]) -> Iterator[str]:
    """Sections of a group and of those in it; a group of the same keys as another refers to it."""
    title = prefix.rstrip(".")
    yield f"\n## {title}\n" if title else "\n## The run\n"
    if title in GROUPS:
        yield f"{GROUPS[title]}\n"
    if title and seen.setdefault(id(keys), title) != title:
        yield f"The keys of [{seen[id(keys)]}](#{seen[id(keys)].replace('.', '')})."
        return
    groups = {n: v for n, v in keys.items() if isinstance(v, Mapping)}
    single = {n: v for n, v in keys.items() if n not in groups}
    if single:
        yield "| key | default | values | meaning |\n|---|---|---|---|"
        yield from (_row(f"{prefix}{name}", key) for name, key in flatten(single))
    for name, group in groups.items():
        yield from _sections(group, f"{prefix}{name}.", seen)


def document() -> str:
    """The text of docs/config.md."""
    return "\n".join([HEAD, *_sections(all_keys(), "", {})]) + "\n"


def list_keys(config: ConfigDict) -> list[str]:
    """A line for every key of a config: name, value, meaning."""
    keys = dict(flatten(all_keys(config.family)))
    lines = []
    for name, value in leaves(config):
        shown = value.to_dict() if isinstance(value, ConfigDict) else value
        lines.append(f"config.{name} = {shown!r}  # {keys[name].meaning}")
    return lines


if __name__ == "__main__":
    print(document(), end="")
