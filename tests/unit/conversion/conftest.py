"""Fixtures of the tests on broken files and odd ones."""

import pytest

from m2mkd_jax import convert
from tests.published_files import arch_flag

TINY_ARCH = {"kind": "vit", "heads": 1}


@pytest.fixture
def refused(tmp_path, capfd):
    """Runs the command on a file; checks that it ends as it should, and returns its line."""

    def check(source, arch=TINY_ARCH, code=2) -> str:
        target = tmp_path / "out" / "weights"
        target.parent.mkdir(exist_ok=True)
        capfd.readouterr()
        flags = [arch_flag(arch, tmp_path)] if arch else []
        assert convert.main([str(source), str(target), *flags]) == code
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error, error
        assert "weights_only" not in error  # torch's advice is to load it all the same
        assert not list(target.parent.iterdir())
        return error

    return check
