"""docs/your-own-modules.md shows the example as it is."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DOC = ROOT / "docs" / "your-own-modules.md"
SHOWN = [ROOT / "examples" / "dense_students.py", ROOT / "tests" / "own_teacher.py"]


def test_code_in_the_walk_through_is_that_of_the_files():
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    sources = [path.read_text() for path in SHOWN]
    assert len(blocks) >= 6
    for block in blocks:
        assert any(block in source for source in sources), block


def test_the_command_is_that_of_the_example():
    command = SHOWN[0].read_text().splitlines()[2]
    assert command.startswith("python -m m2mkd_jax.main") and command in DOC.read_text()


def test_the_example_is_short():
    assert len(SHOWN[0].read_text().splitlines()) < 120
