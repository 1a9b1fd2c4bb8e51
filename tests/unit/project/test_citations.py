"""Citations of the docs, links between them, and mentions of files lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.unit.project.texts import ROOT, markdown_files, python_files, shown

CITATION = re.compile(r"docs/([\w-]+\.md)#([\w-]+)")
# Files (glob patterns in the package) that hold published formulas, constants or layouts.
MUST_CITE = (
    "losses/*.py",
    "models/nac/*.py",
    "models/moe/*.py",
    "models/layers.py",
    "models/variants.py",
    "models/vit.py",
    "phases/program.py",
    "config/presets.py",
    "train/erasing.py",
    "train/mixing.py",
    "train/optimizer.py",
    "train/schedule.py",
    "data/augment.py",
    "data/few_shot.py",
    "data/indices.py",
    "data/rand_augment.py",
    "data/sources.py",
    "evaluate/label_spaces.py",
    "conversion/torch_layouts.py",
    "conversion/names_*.py",
)
# A section of a reference that the reader does not have.
BARE = re.compile(r"\breference,? sections? \d|\(paper \d")
PLACES = ("m2mkd_jax", "tests", "docs", "configs", "benchmarks", "launch", "examples")
FILE = re.compile(r"(?<![\w/.$-])([a-z_]\w*/[\w/.-]*\.(?:py|md|sh|ipynb))\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """Where a link into a Markdown file can lead: its explicit anchors and its headings."""
    text = path.read_text()
    explicit = re.findall(r'<a id="([\w-]+)"></a>', text)
    assert len(set(explicit)) == len(explicit), f"{shown(path)}: an anchor is there twice"
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {*explicit, *slugs}


def must_cite() -> list[Path]:
    found = []
    for pattern in MUST_CITE:
        paths = sorted((ROOT / "m2mkd_jax").glob(pattern))
        assert paths, f"nothing is {pattern}"
        found += [path for path in paths if path.name != "__init__.py"]
    return found


def exists(name: str) -> bool:
    return (ROOT / name).exists() or (ROOT / "m2mkd_jax" / name).exists()


@pytest.mark.parametrize("path", [*python_files(), *markdown_files()], ids=shown)
def test_citations_lead_somewhere(path):
    for document, anchor in CITATION.findall(path.read_text()):
        target = ROOT / "docs" / document
        assert target.is_file(), f"no docs/{document}"
        assert anchor in anchors(target), f"docs/{document} has no anchor {anchor}"


@pytest.mark.parametrize("path", must_cite(), ids=shown)
def test_what_is_published_is_cited(path):
    assert CITATION.search(path.read_text())


def test_no_citation_of_a_reference_that_is_not_here():
    texts = {shown(path): " ".join(path.read_text().split()) for path in python_files()}
    assert [name for name, text in texts.items() if BARE.search(text)] == []


@pytest.mark.parametrize("path", markdown_files(), ids=shown)
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", [*python_files(), *markdown_files()], ids=shown)
def test_files_that_are_mentioned_exist(path):
    if path.name == "CHANGELOG.md":  # tells of files that have moved
        return
    rooms = {folder.name for folder in (ROOT / "m2mkd_jax").iterdir() if folder.is_dir()}
    rooms |= {"checkpoint", "objectives"}
    for name in FILE.findall(path.read_text()):
        if name.split("/")[0] in {*PLACES, *rooms} and "NAME" not in name:
            assert exists(name), name
