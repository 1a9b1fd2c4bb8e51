"""Wrong input to the command: one line, exit code 2, and nothing written."""

import functools
import subprocess
import sys

import pytest

from tests.e2e import command as commands
from tests.e2e.command import ROOT, TIMEOUT

run = functools.partial(commands.run, "tiny")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return commands.environment(tmp_path_factory)


def test_a_job_whose_weights_are_missing_is_refused(environment, tmp_path):
    result = run(environment, tmp_path, "--only=m2mkd/1")
    assert result.returncode == 2
    assert "job pt is not done" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.recipes.pt.epoch=3", 'did you mean "recipes.pt.epochs"'),
        ("--config.dta.name=x", 'config.dta.name is unknown; did you mean "data.name"'),
        ("--config.recipes.pt.lr=fast", "could not convert string to float: 'fast'"),
        ("--config.recipes.pt.batch=7.5", "batch"),
        ("--config.teacher.depths=(1,2)", "3 (read-in, 1 iterations, read-out)"),
        ("--config.nac.stitch_dim=24", "meta model's width 16"),
        ("--config.recipes.mt.modules.1.epochs=2", "give all modules, such as"),
        ("--only=m2mkd/3", 'no job "m2mkd/3"'),
        ("--only=m2mdk", 'did you mean "m2mkd'),
        ("--config.nac.options.m=8", "prior"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(environment, tmp_path, flag, says):
    result = run(environment, tmp_path / "new", flag)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "new").exists()


BROKEN_CONFIGS = {
    "def get_config(:\n": "SyntaxError",
    "import nothing_there\n": "line 1: ModuleNotFoundError",
    "def get_config():\n    return None\n": "gives no ConfigDict",
    "from ml_collections import ConfigDict\n"
    "def get_config():\n    return ConfigDict({'data': 3})\n": "config.data is a group of keys",
    None: "No such file",
}


@pytest.mark.parametrize("text", BROKEN_CONFIGS)
def test_a_broken_config_file_is_one_line_and_exit_2(environment, tmp_path, text):
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    flags = [sys.executable, "-m", "m2mkd_jax.main", f"--config={file}", f"--workdir={tmp_path}/w"]
    result = subprocess.run(
        flags, cwd=ROOT, env=environment, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert str(file) in result.stderr or "config.data" in result.stderr
    assert BROKEN_CONFIGS[text] in result.stderr


def test_a_workdir_that_cannot_be_is_one_line_and_exit_2(environment, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run(environment, workdir)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert str(workdir) in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.recipes.e2e.batch=100000", "config.recipes.e2e.batch: a batch of 100000"),
        ("--config.recipes.e2e.epochs=0.01", "e2e: 0.01 epochs of 10 batches are none"),
        ("--config.init.network=/nowhere", "no weights of e2e in /nowhere"),
    ],
)
def test_what_only_a_later_phase_would_meet_is_refused_at_once(environment, tmp_path, flag, says):
    result = run(environment, tmp_path / "new", flag)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr
    assert not (tmp_path / "new").exists()


def test_an_empty_flag_is_a_missing_one(environment, tmp_path):
    result = run(environment, "")
    assert result.returncode == 2 and "--workdir is missing" in result.stderr
    assert not (ROOT / "config.json").exists()
    flags = [sys.executable, "-m", "m2mkd_jax.main", "--config=", f"--workdir={tmp_path}"]
    result = subprocess.run(
        flags, cwd=ROOT, env=environment, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "--config is missing" in result.stderr
