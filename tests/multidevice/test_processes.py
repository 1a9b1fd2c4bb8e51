"""Two processes of four devices through launch/local.sh agree, fail, stop and resume as one."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2mkd_jax.checkpoint.store import RunCheckpoints, load_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import agreement, pipeline, training
from m2mkd_jax.jobs.evaluation import evaluator
from m2mkd_jax.jobs.run import Run
from m2mkd_jax.jobs.setup import set_up
from m2mkd_jax.main import command
from m2mkd_jax.parallel.mesh import make_mesh
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.initial_weights import load_stages
from tests.e2e import tiny_vmoe
from tests.support import assert_trees_close

ROOT = Path(__file__).resolve().parents[2]
JOB, STEPS, TIMEOUT = "e2e_scratch", 30, 300
# Where a signal must come in time: it takes a second or two to be agreed on.
SLOWLY = "slow_or_broken_batches(seconds=0.2)"


def config_of(expert):
    """Two blocks with experts; an evaluation and a checkpoint every five steps."""
    config = tiny_vmoe.get_config()
    config.phases = (JOB,)
    config.vmoe.depths, config.vmoe.moe_pos, config.vmoe.keep_stitches = (1, 1), (0, 1), False
    config.vmoe.dispatch = "dropless"  # the capacity of a group depends on the mesh
    config.recipes.e2e.update(importance_weight=0.0, load_weight=0.0, drop_path=0.0)
    config.data.train_images = 16 * STEPS // 2
    config.evaluation.every, config.log_every = 1 / 3, 1
    config.mesh.expert = expert
    return config


def slow_or_broken_batches(seconds=0.0, good=STEPS, first=0.0):
    """Called by the config file of some runs: batches come slowly, after some an error comes."""
    original = training.train_batches

    def slowly(batches):
        time.sleep(first)
        for i, batch in enumerate(batches):
            if i == good:
                raise UserError("seven.jpg cannot be decoded")
            time.sleep(seconds)
            yield batch

    class Batches:
        def __init__(self, *args, **options):
            self.batches = original(*args, **options)
            self.slow = slowly(self.batches)

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.slow)

        def __getattr__(self, name):
            return getattr(self.batches, name)

    training.train_batches = Batches


def elsewhere():
    """Called by the config file of a process that is to have another directory than the others."""
    command._workdir = lambda given: Path(given).with_name("elsewhere")
    agreement.SHARED_SECONDS = 0.5


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Starts a run of two processes in a directory; what is still running at the end is killed."""
    here = tmp_path_factory.mktemp("launch")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "JAX_COMPILATION_CACHE_DIR": str(here / "xla"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # jax, imported here, has set it
    started = []

    def start(workdir, line="pass"):
        """line: of the config file, to change the config or this module."""
        config = here / f"config_{len(started)}.py"
        config.write_text(
            "import os\nfrom tests.multidevice.test_processes import *\n"
            "def get_config():\n    config = config_of(expert=4)\n"
            f"    {line}\n    return config\n"
        )
        process = subprocess.Popen(
            [
                ROOT / "launch" / "local.sh",
                "-n",
                "2",
                "-d",
                "4",
                "--",
                f"--config={config}",
                f"--workdir={workdir}",
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            for pid in children(process):
                os.kill(pid, signal.SIGKILL)
            process.kill()


def children(process):
    """The two processes of a run, in the order of their numbers."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def summary(workdir):
    found = json.loads((workdir / "summary.json").read_text())
    for record in found["jobs"]:
        record.pop("seconds")
    return found


def checksums(workdir):
    """Of the finished weights."""
    return json.loads((workdir / "jobs" / JOB / "weights" / "description.json").read_text())[
        "trees"
    ]


def signal_at(process, workdir, records, number):
    """Sends a signal to process 1 alone once its job has written that many records."""
    file, deadline = workdir / "jobs" / JOB / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not file.is_file() or file.read_bytes().count(b"\n") < records:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    os.kill(children(process)[1], number)
    output, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, output, errors


def saved_steps(workdir):
    return sorted(
        int(path.name)
        for path in (workdir / "jobs" / JOB / "checkpoints").iterdir()
        if path.name.isdigit()
    )


def losses(workdir):
    """Of every step."""
    records = [
        json.loads(line)
        for line in (workdir / "jobs" / JOB / "metrics.jsonl").read_text().splitlines()
    ]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """An uninterrupted run, in which process 1 comes to the first step later than Gloo waits."""
    workdir = tmp_path_factory.mktemp("whole")
    late = "if os.environ['M2MKD_PROCESS'] == '1': slow_or_broken_batches(first=35)"
    process = launch(workdir, late)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return workdir, output


def test_one_process_speaks_for_both(whole):
    workdir, output = whole
    assert output.count(f"[{JOB}] {STEPS}/{STEPS}  loss") == 1 and output.count("status") == 1
    records = [
        json.loads(line)
        for line in (workdir / "jobs" / JOB / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    (done,) = summary(workdir)["jobs"]
    assert done["metrics"]["eval_images"] == 100  # every one once, in batches of 64 over 8 devices


def test_stopped_killed_and_resumed(whole, launch, tmp_path):
    code, _, errors = signal_at(launch(tmp_path, SLOWLY), tmp_path, 3, signal.SIGTERM)
    assert code == 3, errors
    assert errors.count("run the same command again") == 1 and errors.count("\n") == 1
    (stopped,) = saved_steps(tmp_path)
    assert 3 <= stopped < STEPS
    # Past the next evaluation, which saves.
    process = launch(tmp_path, SLOWLY)
    code, output, errors = signal_at(process, tmp_path, stopped + 8, signal.SIGKILL)
    assert code == 128 + signal.SIGKILL, errors
    assert output.count(f"[{JOB}] resumed at step {stopped}/{STEPS}") == 1
    assert not (tmp_path / "jobs" / JOB / "done.json").exists()
    process = launch(tmp_path)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert f"[{JOB}] resumed at step" in output
    assert summary(tmp_path) == summary(whole[0])
    assert checksums(tmp_path) == checksums(whole[0])  # byte for byte


def test_the_evaluation_of_finished_networks_stops_too(whole, launch, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    more = f"config.phases, config.evaluation.corruptions = ({JOB!r}, 'eval'), ('all',)"
    process = launch(tmp_path, more)
    job, deadline = tmp_path / "jobs" / "eval", time.monotonic() + TIMEOUT
    while not (job / "inputs.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    os.kill(children(process)[1], signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 3, errors
    assert errors.count("stopped by a signal") == 1 and errors.count("\n") == 1
    assert not (job / "done.json").exists()


@pytest.mark.parametrize("expert", [1, 2])
def test_the_checkpoint_restores_in_one_process_on_other_meshes(whole, expert):
    workdir, _ = whole
    config, mesh = config_of(expert), make_mesh(expert=expert)
    config.mesh.fsdp = True
    phase = build_phase(config, JOB)
    run = Run(config, workdir, mesh)
    stages, _ = load_stages(config, workdir, phase)
    setup = set_up(config, phase, stages, mesh=mesh, updates_per_epoch=10)
    with contextlib.closing(RunCheckpoints(workdir / "jobs" / JOB / "checkpoints")) as checkpoints:
        step, state = checkpoints.restore_latest(setup.abstract_state)
    assert step == STEPS
    metrics = evaluator(run, setup.program, phase.data)(
        state["params"], {name: {"fixed": {}} for name in setup.params}
    )
    expected = json.loads((workdir / "jobs" / JOB / "done.json").read_text())["metrics"]
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_one_process_goes_on_on_another_mesh(whole, tmp_path, monkeypatch):
    """Its last steps are those of the two processes: each had its own share of every batch.

    The weights agree too.
    """
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    directory = tmp_path / "jobs" / JOB
    (directory / "done.json").unlink()
    *_, begun, end = saved_steps(tmp_path)
    shutil.rmtree(directory / "checkpoints" / str(end))
    (directory / "metrics.jsonl").write_text("")
    monkeypatch.setattr(pipeline, "enable_compilation_cache", lambda: None)
    pipeline.run(config_of(expert=2), tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(whole[0])[begun:], rel=1e-5)
    assert checksums(tmp_path) != checksums(whole[0])  # they were made again
    mine, theirs = (load_weights(d / "jobs" / JOB / "weights")[0] for d in (tmp_path, whole[0]))
    assert_trees_close(mine, theirs, 1e-5)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("config.vmoe.patch = 7", "image size 16 is not a multiple of the patch 7"),  # in both
        # In one, while the other waits for it in the middle of a step.
        (
            "if os.environ['M2MKD_PROCESS'] == '1': slow_or_broken_batches(good=3)",
            "seven.jpg cannot be decoded",
        ),
        (
            "config.seed = int(os.environ['M2MKD_PROCESS'])",
            "config.seed is 0 in process 0",
        ),
        (
            "if os.environ['M2MKD_PROCESS'] == '1': elsewhere()",
            "what process 0 writes there is not there for process(es) 1",
        ),
    ],
)
def test_an_error_ends_both_processes_and_is_told_once(launch, tmp_path, line, says):
    began = time.monotonic()
    process = launch(tmp_path, line)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, errors
    assert says in errors and errors.count("m2mkd_jax: ") == 1 and errors.count("\n") == 1
    assert time.monotonic() - began < 90


@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_a_process_that_fails_ends_one_that_is_busy_elsewhere(failing):
    code = f"""if True:
        import sys, time
        from m2mkd_jax.parallel import cluster, process
        cluster.start_distributed()
        if process.distributed.global_state.process_id in {list(map(int, failing))}:
            sys.exit(process.fail("no cheese", 7))
        time.sleep(100)"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "M2MKD_COORDINATOR": f"localhost:{port}",
                "M2MKD_PROCESSES": "2",
                "M2MKD_PROCESS": index,
            },
        )
        for index in "01"
    ]
    try:
        errors = "".join(process.communicate(timeout=90)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [7, 7], errors
    assert errors == "no cheese\n" and time.monotonic() - began < 60
