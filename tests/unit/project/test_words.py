"""Plain words: terms that were coined here do not come back; see CONTRIBUTING.md, Style."""

import re

import pytest

from tests.unit.project.texts import markdown_files, python_files, shown

# What is not written: what to write.
BANNED = {
    r"pupils?": "student",
    r"(stand|stands|standing) still": "frozen",
    r"taken[ _]apart": "split, partition",
    r"meet\(": "warm_up_collectives",
    r"no master copy": "stored in the compute dtype",
    r"longer to ask for than": "smallest parameter worth sharding",
    r"for once": "say what is special",
    r"see of themselves": "auxiliary outputs",
    r"number of numbers": "parameter count",
    r"what is (wanted|the user's to put right)": "name it",
    r"forgiving": "skips damaged checkpoints; strict",
    r"objectives/": "losses/",
    r"used to be": "say what is true",
}
# Here the words themselves are the subject.
EXCEPT = ("tests/unit/project/test_words.py", "CHANGELOG.md")


@pytest.mark.parametrize("path", [*python_files(), *markdown_files()], ids=shown)
def test_words_are_plain(path):
    if shown(path) in EXCEPT:
        return
    text = " ".join(path.read_text().split())
    found = {
        match[0]: instead
        for word, instead in BANNED.items()
        if (match := re.search(rf"\b{word}", text, re.IGNORECASE))
    }
    assert not found
