"""Wrong input to the command: one line, exit code 2, and nothing written."""

import subprocess

import pytest

from tests.e2e import command as commands
from tests.e2e.command import ROOT
from tests.e2e.forked import Forks

CONFIG, VMOE = (f"--config={ROOT / 'tests' / 'e2e' / name}.py" for name in ("tiny", "tiny_vmoe"))


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    env = commands.environment(tmp_path_factory)
    with Forks(env, tmp_path_factory.mktemp("forks") / "printed") as found:
        yield found


def test_a_job_whose_weights_are_missing_is_refused(forks, tmp_path):
    code, printed = forks.run(CONFIG, f"--workdir={tmp_path}", "--only=m2mkd/1")
    assert code == 2
    assert "job pt is not done" in printed and printed.count("\n") == 1
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.recipes.pt.epoch=3", 'did you mean "recipes.pt.epochs"'),
        ("--config.dta.name=x", 'config.dta.name is unknown; did you mean "data.name"'),
        ("--config.recipes.pt.lr=fast", "config.recipes.pt.lr is 'fast'; it must be a number"),
        ("--config.recipes.pt.batch=7.5", "batch"),
        ("--config.teacher.depths=(1,2)", "3 (read-in, 1 iterations, read-out)"),
        ("--config.nac.stitch_dim=24", "meta model's width 16"),
        ("--config.recipes.mt.modules.1.epochs=2", "give all modules, such as"),
        ("--only=m2mkd/3", 'no job "m2mkd/3"'),
        ("--only=m2mdk", 'did you mean "m2mkd'),
        ("--config.nac.options.m=8", "prior"),
        ("--config.vmoe.depths=(2,2)", "needs 2"),
        ("--config.vmoe.router=publisht", "one of published"),
        ("--config.mesh.expert=3", "3 does not divide 1 device"),
        # What only a later phase would meet.
        ("--config.recipes.e2e.batch=100000", "config.recipes.e2e.batch: a batch of 100000"),
        ("--config.recipes.e2e.epochs=0.01", "e2e: 0.01 epochs of 10 batches are none"),
        ("--config.init.network=/nowhere", "no weights of e2e in /nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(forks, tmp_path, flag, says):
    config = VMOE if ".vmoe." in flag or ".mesh." in flag else CONFIG
    code, printed = forks.run(config, f"--workdir={tmp_path / 'new'}", flag)
    assert code == 2 and says in printed and printed.count("\n") == 1, printed
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
def test_a_broken_config_file_is_one_line_and_exit_2(forks, tmp_path, text):
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    code, printed = forks.run(f"--config={file}", f"--workdir={tmp_path}/w")
    assert code == 2 and printed.count("\n") == 1, printed
    assert str(file) in printed or "config.data" in printed
    assert BROKEN_CONFIGS[text] in printed


def test_a_workdir_that_cannot_be_is_one_line_and_exit_2(forks, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        code, printed = forks.run(CONFIG, f"--workdir={workdir}")
        assert code == 2 and printed.count("\n") == 1, printed
        assert str(workdir) in printed
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "says"), [("--only=pt", "nobody reads its output any more"), ("--dry_run", "")]
)
def test_output_that_nobody_reads_ends_a_run_in_one_line(tmp_path_factory, tmp_path, flag, says):
    """And what only prints, as any tool before `| head`, without a word."""
    env, command = commands.environment(tmp_path_factory), commands.command("tiny", tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, flag], cwd=ROOT, env=env, text=True, **pipes) as run:
        run.stdout.close()  # as `| head` does
        said = run.stderr.read()
    assert run.returncode == 141
    assert says in said and said.count("\n") == bool(says)


def test_an_empty_flag_is_a_missing_one(forks, tmp_path):
    for blank in ("", " "):
        code, printed = forks.run(CONFIG, f"--workdir={blank}")
        assert code == 2 and "--workdir is missing" in printed
    assert not (ROOT / "config.json").exists() and not (ROOT / " ").exists()
    code, printed = forks.run("--config=", f"--workdir={tmp_path}")
    assert code == 2 and "--config is missing" in printed
