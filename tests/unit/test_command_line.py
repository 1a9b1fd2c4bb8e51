"""--help and --version of the small commands."""

import pytest

import m2mkd_jax
from m2mkd_jax import convert, predict

COMMANDS = {"convert": convert, "predict": predict}
OPTIONS = {
    "convert": ("SRC", "DST", "--arch", "--image_size", "--seed", "--overwrite"),
    "predict": (
        *("CKPT", "IMAGE", "--labels", "--npz", "--npz_in", "--module", "--arch"),
        *("--draw", "--json"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name].main(["--help"])
    assert stop.value.code == 0
    usage, _, arguments = capsys.readouterr().out.partition("positional arguments:")
    assert f"python -m m2mkd_jax.{name}" in usage and "exit codes:" in usage
    lines = arguments.splitlines()
    for option in OPTIONS[name]:
        (at,) = (i for i, line in enumerate(lines) if line.split()[:1] == [option])
        # Its meaning is on the same line, or on the next where the option is long.
        assert len(lines[at].split()) > 2 or lines[at + 1].startswith(" " * 8), option


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name].main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"m2mkd_jax {m2mkd_jax.__version__}\n"
