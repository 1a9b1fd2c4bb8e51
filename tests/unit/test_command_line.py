"""--help and --version of the small commands, and signals that end them."""

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import m2mkd_jax
from m2mkd_jax import command_line, convert, export, predict, push
from m2mkd_jax.arguments import BROKEN_PIPE, Arguments, refuse_repeated
from m2mkd_jax.checkpoint.files import write_json
from m2mkd_jax.errors import UserError
from tests.data_files import write_folders

ROOT = Path(__file__).parents[2]
COMMANDS = {"convert": convert, "export": export, "predict": predict, "push": push}
OPTIONS = {
    "convert": ("SRC", "DST", "--arch", "--image_size", "--seed", "--overwrite"),
    "predict": (
        *("CKPT", "IMAGE", "--labels", "--npz", "--npz_in", "--module", "--arch"),
        *("--draw", "--json", "--csv", "--features", "--attention", "--top", "--batch"),
        *("--workers", "--device", "--precision", "--quiet"),
    ),
    "export": (
        *("CKPT", "OUT", "--format", "--batch", "--tokens", "--pixels", "--platforms"),
        *("--module", "--arch", "--overwrite"),
    ),
    "push": (*("CKPT", "REPOSITORY", "--license", "--private", "--message", "--out", "--arch"),),
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


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--csv=a", "x.png", "--csv=b"], "--csv"),
        (["--top", "3", "--top", "-3"], "--top"),
        (["--config.seed=1", "-config.seed=1"], "--config.seed"),
        (["--dry_run", "--nodry_run"], "--nodry_run"),
        (["--noconfig.nac.geglu", "--config.nac.geglu=True"], "--config.nac.geglu"),
    ],
)
def test_flags_are_given_once(arguments, flag):
    with pytest.raises(UserError) as error:
        refuse_repeated(arguments)
    assert str(error.value) == f"{flag} is given twice; give it once"


def test_flags_that_only_look_alike_are_others():
    refuse_repeated(["--top", "-3", "--batch", "-3", "--", "--top", "--top"])
    refuse_repeated(["--npz=a", "--npz_in=a", "--no_analysis", "--config.a.b=1", "--config.a.c=1"])


@pytest.mark.parametrize("name", ["convert", "export", "predict", "push", "report", "data.check"])
def test_every_command_refuses_a_flag_given_twice(name, capsys):
    package = import_module(f"m2mkd_jax.{'report.__main__' if name == 'report' else name}")
    assert package.main(["a", "b", "--out=1", "--out=2"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("--out is given twice; give it once\n") and said.count("\n") == 1


def test_a_home_directory_is_meant_anywhere_in_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Arguments()
    parser.add_argument("given", nargs="*")
    for flag in ("--json", "--message", "--out"):
        parser.add_argument(flag)
    found = parser.parse_args(
        ["~/a.png", "b~/c", "--json=~/d", "--message=about ~/e", "--out", "~/f"]
    )
    assert found.given == ["/home/me/a.png", "b~/c"]
    assert (found.json, found.out) == ("/home/me/d", "/home/me/f")
    assert found.message == "about ~/e"


def test_a_file_that_cannot_be_replaced_is_named(tmp_path, capsys):
    """Not the file beside it that was written first."""
    (tmp_path / "summary.json").mkdir()
    assert command_line.run("report", lambda: write_json(tmp_path / "summary.json", {})) == 2
    said = capsys.readouterr().err
    assert said == f"m2mkd_jax.report: {tmp_path}/summary.json: Is a directory\n"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


INTERRUPTED = """
import gc, os, signal, sys
from m2mkd_jax.command_line import run

def stop(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.{signal})

def command():
    try:
        if {swallowed}:  # Python drops what is raised there
            gc.callbacks.append(stop)
            gc.collect()
        else:
            stop()
        while True:
            signal.pause()
    except Exception:
        sys.exit("taken for an error")
    finally:
        print("tidied up", flush=True)

run("predict", command)
"""


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_command_after_it_has_tidied_up(name, swallowed):
    code = INTERRUPTED.format(signal=name, swallowed=swallowed)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -getattr(signal, name), done.stderr
    assert done.stdout == "tidied up\n"
    assert done.stderr == ""


def test_nobody_who_reads_is_no_error_of_data_check(tmp_path):
    """As with `| head -0`."""
    write_folders(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "m2mkd_jax.data.check", str(tmp_path), "--quick"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == BROKEN_PIPE and "Error" not in done.stderr, done.stderr


def test_help_and_version_load_no_jax():
    """jax takes seconds to import."""
    code = """
import contextlib, io, sys
from importlib import import_module
for name in ("main", "convert", "export", "predict", "push", "report.__main__"):
    for flag in ("--help", "--version"):
        module = import_module(f"m2mkd_jax.{name}")
        command, arguments = (module.start, []) if name == "main" else (module.main, [[flag]])
        sys.argv = [name, flag]
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            command(*arguments)
        assert text.getvalue(), name
        assert "jax" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_too_little_memory_is_one_line(capsys):
    def command():
        raise MemoryError("Unable to allocate 37.3 GiB")

    assert command_line.run("convert", command) == 2
    said = capsys.readouterr().err
    assert said.startswith("m2mkd_jax.convert: the memory does not suffice (Unable to allocate")
    assert said.count("\n") == 1
