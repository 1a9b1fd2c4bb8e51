"""Every message of docs/troubleshooting.md is one that the code has."""

import re

import pytest

from tests.unit.project.texts import ROOT

CODE = "".join(path.read_text() for path in sorted((ROOT / "m2mkd_jax").rglob("*.py")))
# Strings that are continued on the next line are one.
JOINED = re.sub(r'"\s*\n\s*f?"', "", CODE)
LINES = [
    line.split("|")[1].strip()
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    if line.startswith("| `")
]


def fixed_parts(message: str) -> list[str]:
    """What of a message does not differ from case to case."""
    quoted = re.findall(r"`([^`]*)`", message)[0]
    parts = re.split(r"\b[A-Z]+\b|config\.recipes\.\S+|; did you mean.*|--workdir|\bpt\b", quoted)
    return [part.strip(" .:;=") for part in parts if len(part.strip(" .:;=")) > 3]


@pytest.mark.parametrize("message", LINES)
def test_the_message_is_in_the_code(message):
    parts = fixed_parts(message)
    assert parts
    for part in parts:
        assert part in JOINED, part
