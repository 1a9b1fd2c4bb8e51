"""The installed wheel: its commands and shipped configs work in an empty directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import m2mkd_jax

ROOT = Path(__file__).resolve().parents[2]
VERSION = f"m2mkd_jax {m2mkd_jax.__version__}\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory with the wheel's contents, its commands in bin/."""
    sources, wheels, target = (tmp_path_factory.mktemp(n) for n in ("sources", "wheels", "target"))
    for name in ("m2mkd_jax", "configs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels)]
    subprocess.run([*build, str(sources)], check=True)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    return target


def run(installed: Path, cwd: Path, command: str, *arguments: str) -> subprocess.CompletedProcess:
    """A command of bin/, or with "python" the interpreter, which sees the installed files alone."""
    program = (
        [sys.executable] if command == "python" else [sys.executable, installed / "bin" / command]
    )
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
    )


def test_it_is_the_wheel_that_is_imported(installed, tmp_path):
    found = run(installed, tmp_path, "python", "-c", "import m2mkd_jax; print(m2mkd_jax.__file__)")
    assert found.stdout.strip() == str(installed / "m2mkd_jax" / "__init__.py"), found.stderr


NAMES = ("convert", "export", "predict", "push", "report")


@pytest.mark.parametrize("command", ["m2mkd", *(f"m2mkd-{name}" for name in NAMES)])
def test_help_and_version(installed, tmp_path, command):
    version = run(installed, tmp_path, command, "--version")
    assert (version.returncode, version.stdout) == (0, VERSION), version.stderr
    shown = run(installed, tmp_path, command, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: "), shown.stderr
    assert len(shown.stdout.splitlines()) < 80


def test_the_package_says_its_commands(installed, tmp_path):
    shown = run(installed, tmp_path, "python", "-m", "m2mkd_jax")
    assert shown.returncode == 0, shown.stderr
    scripts = sorted(path.name for path in (installed / "bin").glob("m2mkd*"))
    assert scripts == ["m2mkd", *(f"m2mkd-{name}" for name in NAMES)]
    assert all(f"\n  {script} " in shown.stdout for script in scripts)


def test_a_dry_run_of_a_shipped_config(installed, tmp_path):
    flags = ("--config=nac_digits", "--workdir=x", "--dry_run")
    done = run(installed, tmp_path, "m2mkd", *flags)
    assert done.returncode == 0, done.stderr
    assert "m2mkd/0" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_shipped_config_takes_its_argument(installed, tmp_path):
    flags = ("--config", "nac_tinyimnet:ring", "--config.seed=3", "--list_keys")
    done = run(installed, tmp_path, "m2mkd", *flags)
    assert done.returncode == 0, done.stderr
    assert "config.nac.prior = 'ring-of-cliques'  # graph" in done.stdout
    assert "config.seed = 3 " in done.stdout


def test_an_unknown_config_is_one_line(installed, tmp_path):
    done = run(installed, tmp_path, "m2mkd", "--config=nac_digit", "--workdir=x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'did you mean "nac_digits"?' in done.stderr
