"""The texts of the project that tests read: source files and Markdown."""

from pathlib import Path

ROOT = Path(__file__).parents[3]
CODE = ("m2mkd_jax", "benchmarks", "configs", "examples", "tests")


def python_files() -> list[Path]:
    return [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]


def markdown_files() -> list[Path]:
    folders = ("docs", *CODE)
    inside = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.md"))]
    return sorted(ROOT.glob("*.md")) + inside


def shown(path: Path) -> str:
    """A path as messages name it."""
    return path.relative_to(ROOT).as_posix()
