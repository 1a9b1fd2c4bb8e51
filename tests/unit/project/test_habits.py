"""Few ignored findings of linter and type checker, with reasons; one version; local hooks."""

import re
import tomllib
from pathlib import Path

import m2mkd_jax

ROOT = Path(__file__).parents[3]
CODE = ("m2mkd_jax", "configs", "benchmarks", "examples", "tests")
MOST = 14
# Written so that this file does not match itself.
IGNORE = re.compile(r"#\s*(?:no" + r"qa|type:" + r"\s*ignore|fmt:\s*(?:skip|off))\b(.*)")


def ignores(line: str) -> list[str]:
    """What follows each ignore of a line: its codes and its reason."""
    return [found[1] for found in IGNORE.finditer(line)]


def test_few_findings_are_ignored_each_with_its_reason():
    paths = [*ROOT.glob("*.py"), *(p for folder in CODE for p in (ROOT / folder).rglob("*.py"))]
    found = {
        f"{path.relative_to(ROOT)}:{number}": text
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for text in ignores(line)
    }
    assert len(found) <= MOST, found
    # Codes in brackets or after a colon, then words.
    unexplained = [
        where
        for where, text in found.items()
        if len(re.sub(r"^(\[[\w, -]+\]|: ?[A-Z]+\d+(, ?[A-Z]+\d+)*)", "", text).split()) < 2
    ]
    assert not unexplained


def test_what_counts_as_ignored():
    mark = "# no" + "qa: E501"
    assert ignores(f"x = 1  {mark} (a table)") == [": E501 (a table)"]
    assert ignores("x = 1  # a comment") == []


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "m2mkd_jax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", m2mkd_jax.__version__)


def test_hooks_are_local_and_are_those_of_make_lint():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", text) == ["local"]
    assert set(re.findall(r"language: (\S+)", text)) == {"system"}
    makefile = (ROOT / "Makefile").read_text()
    for check in ("ruff format --check", "ruff check", "mypy"):
        assert f".venv-test/bin/{check}" in text
        assert check in makefile
