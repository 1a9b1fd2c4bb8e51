"""--help and --version of the small commands, and signals that end them."""

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import pytest

import m2mkd_jax
from m2mkd_jax import command_line, convert, export, predict, push
from m2mkd_jax.arguments import BROKEN_PIPE, Arguments, refuse_repeated
from m2mkd_jax.checkpoint.files import write_json
from m2mkd_jax.checkpoint.store import load_weights
from m2mkd_jax.config.files import find_config
from m2mkd_jax.conversion.arch_flag import read_arch
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import as_path
from m2mkd_jax.main import command as main_command
from m2mkd_jax.parallel import compilation_cache
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
        ["~/a.png", "b~/c", "~", "--json=~/d", "--message=about ~/e", "--out", "~/f"]
    )
    assert found.given == ["/home/me/a.png", "b~/c", "/home/me"]
    assert (found.json, found.out) == ("/home/me/d", "/home/me/f")
    assert found.message == "about ~/e"


@pytest.mark.parametrize(
    "use",
    [
        lambda: Arguments().parse_args(["~nobody_here/x.png"]),
        lambda: Arguments().parse_args(["--json=~nobody_here/x"]),
        lambda: as_path("~nobody_here/x"),
        lambda: m2mkd_jax.save_weights("~nobody_here/x", {}, {}),
        lambda: m2mkd_jax.load("~nobody_here/x"),
        lambda: read_arch("~nobody_here/x.json", "vit", None),
        lambda: find_config("~nobody_here/x.py"),
    ],
)
def test_a_home_directory_of_nobody_is_one_line(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no home directory of ~nobody_here is known"):
        use()
    assert not list(tmp_path.iterdir())  # such as a directory of that name


@pytest.mark.skipif(os.name == "nt", reason="which has drives")
@pytest.mark.parametrize("path", ["C:\\runs\\a", "d:/runs"])
def test_a_drive_of_another_system_is_no_directory(path):
    with pytest.raises(UserError, match="is a path of Windows; give it as this system has it"):
        as_path(path)


@pytest.mark.parametrize("given", ["runs/*", "'runs/a'", '"runs/a"'])
def test_what_the_shell_has_left_of_a_workdir_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give the path of one directory, as it is"):
        main_command._workdir(given)
    assert main_command._workdir("o'brien") == Path("o'brien")


def test_weights_are_written_and_read_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for place in ("~/a", Path("~/b")):
        m2mkd_jax.save_weights(place, {}, {"kind": "vit"})
        assert load_weights(place)[1] == {"kind": "vit"}
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["a", "b"]
    assert not (tmp_path / "~").exists()


def test_cached_programs_are_of_one_kind_of_machine(tmp_path, monkeypatch):
    """A directory that the environment names may be shared by machines of other instructions."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "shared"))
    try:
        arguments = [str(tmp_path / "nowhere"), str(tmp_path / "out"), "--format=onnx"]
        assert export.main(arguments) == 2
        used = Path(jax.config.jax_compilation_cache_dir)
        assert used.parent == tmp_path / "shared" and used.name.startswith("jax-")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_no_home_directory_is_no_reason_not_to_run(monkeypatch, capsys):
    monkeypatch.setattr(compilation_cache.os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    try:
        assert compilation_cache.enable_compilation_cache() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "no compilation cache: ~/.cache" in capsys.readouterr().err


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


@pytest.mark.parametrize("name", ["data.check", "data.prepare", "main"])
def test_ctrl_c_while_modules_are_imported_prints_no_stack(name, tmp_path):
    code = "import signal; signal.raise_signal(signal.SIGINT)"
    (tmp_path / ("numpy.py" if name != "main" else "absl.py")).write_text(code)
    command = [sys.executable, "-m", f"m2mkd_jax.{name}", "x"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_nobody_who_reads_the_keys_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "m2mkd_jax.main", "--config=nac_digits", "--list_keys"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")


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


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("Unable to allocate 37.3 GiB"), "the memory does not suffice (Unable to all"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes.\nBuffers:"),
            "the device has no memory left for 64 bytes; if another process has this GPU too",
        ),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"), "the device has no memory left at the start;"),
    ],
)
def test_too_little_memory_is_one_line(error, says, capsys):
    """Of a device too, which a job that trains on it may have taken whole."""

    def command():
        raise error

    assert command_line.run("predict", command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"m2mkd_jax.predict: {says}") and said.count("\n") == 1
    assert "config.recipes" not in said
