"""What the tests of conversion share."""

from collections.abc import Callable

import pytest

from m2mkd_jax import convert
from tests.published_files import TINY, arch_flag


@pytest.fixture
def refused(tmp_path, capfd) -> Callable[..., str]:
    """Runs the convert command on a bad file; checks how it fails, and returns its line."""

    def check(source, arch=TINY, code=2) -> str:
        target = tmp_path / "out" / "weights"
        target.parent.mkdir(exist_ok=True)
        capfd.readouterr()
        flags = [arch_flag(arch, tmp_path)] if arch else []
        assert convert.main([str(source), str(target), *flags]) == code
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error, error
        assert "weights_only" not in error  # torch's advice is to load it nevertheless
        assert not list(target.parent.iterdir())
        return error

    return check
