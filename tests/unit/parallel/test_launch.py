"""The launch scripts: what they would run, what they refuse, and local.sh with a stand-in."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
FLAGS = ("--", "--config=c.py", "--workdir=my runs")


def launch(script, *words, **environment):
    return subprocess.run(
        [LAUNCH / script, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_pod.sh"])
def test_help_and_strictness(script):
    text = (LAUNCH / script).read_text()
    assert "\nset -euo pipefail\n" in text and os.access(LAUNCH / script, os.X_OK)
    shown = launch(script, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: launch/{script} ")


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("local.sh", (), "no flags for m2mkd_jax.main"),
        ("local.sh", ("-n", "2", "--"), "no flags for m2mkd_jax.main"),
        ("local.sh", ("-n", "0", *FLAGS), "-n needs a number above 0, not '0'"),
        ("local.sh", ("-d", "four", *FLAGS), "-d needs a number above 0, not 'four'"),
        ("local.sh", ("-n",), "-n needs a number"),
        ("local.sh", ("-r", "often", *FLAGS), "-r needs a number, not 'often'"),
        ("slurm.sh", ("nodes", "-n", "2", "-r", "-1", *FLAGS), "-r needs a number, not '-1'"),
        ("tpu_pod.sh", ("-t", "t", "-z", "z", "-r", "x", *FLAGS), "-r needs a number, not 'x'"),
        ("local.sh", ("-p", "65536", *FLAGS), "-p needs a port below 65536, not '65536'"),
        ("local.sh", ("--config=c.py",), "unknown option '--config=c.py'"),
        ("slurm.sh", (), "the first word must be array or nodes"),
        ("slurm.sh", ("array", "-a", "0-9", *FLAGS), "needs -j mt or -j m2mkd"),
        ("slurm.sh", ("array", "-j", "pt", "-a", "0-9", *FLAGS), "needs -j mt or -j m2mkd"),
        ("slurm.sh", ("array", "-j", "mt", "-a", "all", *FLAGS), "needs -a RANGE"),
        ("slurm.sh", ("array", "-j", "mt", "-a", "0-9"), "no flags for m2mkd_jax.main"),
        ("slurm.sh", ("nodes", *FLAGS), "needs -n NODES"),
        ("slurm.sh", ("nodes", "-n", "2", "-j", "mt", *FLAGS), "belong to array"),
        ("tpu_pod.sh", ("-z", "z", *FLAGS), "-t TPU is missing"),
        ("tpu_pod.sh", ("-t", "t", *FLAGS), "-z ZONE is missing"),
        ("tpu_pod.sh", ("-t", "t", "-z", "z"), "no flags for m2mkd_jax.main"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(script, words, says):
    result = launch(script, *words)
    assert result.returncode == 2
    assert says in result.stderr and result.stderr.count("\n") == 1 and not result.stdout


def test_local_shows_its_processes():
    result = launch(
        "local.sh",
        "-n",
        "2",
        "-d",
        "4",
        "-p",
        "1234",
        "--print",
        *FLAGS,
        PYTHON="py",
        XLA_FLAGS="--xla_a=1",
    )
    assert result.returncode == 0
    first, second = map(shlex.split, result.stdout.splitlines())
    assert first == [
        "env",
        "JAX_PLATFORMS=cpu",
        "XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=4",
        "M2MKD_COORDINATOR=localhost:1234",
        "M2MKD_PROCESSES=2",
        "M2MKD_PROCESS=0",
        "py",
        "-m",
        "m2mkd_jax.main",
        "--config=c.py",
        "--workdir=my runs",
        "&",
    ]
    assert second == [*first[:5], "M2MKD_PROCESS=1", *first[6:]]


def slurm_parts(result):
    """The words given to sbatch, and the lines of the batch script."""
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    return shlex.split(lines[0]), [line.strip() for line in lines[1:-1]]


def test_slurm_array_runs_every_pair_by_itself():
    words, script = slurm_parts(
        launch(
            "slurm.sh",
            "array",
            "-j",
            "m2mkd",
            "-a",
            "0-9%4",
            "-s",
            "--gpus-per-node=1",
            "--print",
            *FLAGS,
        )
    )
    assert words[0] == "sbatch" and {"--array=0-9%4", "--ntasks=1", "--requeue"} <= set(words)
    assert words[-2:] == ["--gpus-per-node=1", "<<END"]
    assert (
        r"M2MKD_PROCESSES=1 srun python -m m2mkd_jax.main --config=c.py --workdir=my\ runs "
        "--only=m2mkd/$SLURM_ARRAY_TASK_ID || code=$?"
    ) in script
    requeue = next(line for line in script if "requeue" in line)
    assert requeue.startswith("if ((code == 3))") and "$SLURM_ARRAY_TASK_ID" in requeue


def test_slurm_nodes_run_one_process_each():
    words, script = slurm_parts(launch("slurm.sh", "nodes", "-n", "4", "--print", *FLAGS))
    assert {"--nodes=4", "--ntasks-per-node=1"} <= set(words)
    assert not any(word.startswith("--array") for word in words)
    line = next(line for line in script if "srun" in line)
    assert line.startswith("srun --kill-on-bad-exit=1 python -m m2mkd_jax.main")
    assert "M2MKD_PROCESSES" not in line and "--only" not in line


def test_the_batch_script_is_valid_and_passes_on_the_exit_code(tmp_path):
    _, script = slurm_parts(launch("slurm.sh", "nodes", "-n", "4", "--print", *FLAGS))
    once = f"test -e {tmp_path}/again && exit 0; touch {tmp_path}/again; exit 137"
    for name, body in (
        ("srun", f'[ "$CODE" != once ] && exit $CODE; {once}'),
        ("scontrol", 'echo "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    again = [f"exit code 137; restart {i} of 3\n" for i in (1, 2, 3)]
    cases = [("0", 0, "", []), ("2", 2, "", []), ("3", 3, "requeue 77\n", [])]
    cases += [("137", 137, "", again), ("once", 0, "", again[:1])]
    for given, code, printed, said in cases:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
        done = subprocess.run(
            ["bash"],
            input="\n".join(script),
            env=environment | {"CODE": given},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, printed, "".join(said))


def test_tpu_pod_runs_on_all_workers():
    result = launch(
        "tpu_pod.sh", "-t", "v4-64", "-z", "zone", "-p", "mine", "-d", "my code", "--print", *FLAGS
    )
    assert result.returncode == 0
    words = shlex.split(result.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "v4-64"]
    assert words[6:9] == ["--zone=zone", "--project=mine", "--worker=all"]
    remote = words[9].removeprefix("--command=")
    assert shlex.split(remote) == [
        "cd",
        "my code",
        "&&",
        "M2MKD_PROCESSES=auto",
        "python3",
        "-m",
        "m2mkd_jax.main",
        "--config=c.py",
        "--workdir=my runs",
    ]


@pytest.fixture
def program(tmp_path):
    """Makes a stand-in for python that runs the given lines of shell."""

    def make(body):
        path = tmp_path / "program"
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_local_passes_all_on(program, tmp_path):
    stand_in = program(f'echo "$M2MKD_PROCESS of $M2MKD_PROCESSES: $*" > {tmp_path}/$M2MKD_PROCESS')
    assert launch("local.sh", "-n", "3", "-p", "1", *FLAGS, PYTHON=stand_in).returncode == 0
    for i in range(3):
        expected = f"{i} of 3: -m m2mkd_jax.main --config=c.py --workdir=my runs\n"
        assert (tmp_path / str(i)).read_text() == expected


def test_local_ends_with_the_code_of_the_first_to_fail(program):
    # Process 0 would go on for ever, process 2 fails after process 1.
    stand_in = program(
        "case $M2MKD_PROCESS in 0) exec sleep 99;; 1) exit 7;; *) sleep 1; exit 8; esac"
    )
    began = time.monotonic()
    assert launch("local.sh", "-n", "3", "-p", "1", *FLAGS, PYTHON=stand_in).returncode == 7
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("code", "runs"), [(137, 3), (4, 3), (1, 3), (2, 1), (3, 1)], ids=lambda v: str(v)
)
def test_local_starts_again_after_a_loss_alone(program, tmp_path, code, runs):
    stand_in = program(
        f'echo >> {tmp_path}/$M2MKD_PROCESS; [ "$M2MKD_PROCESS" = 0 ] || exit {code}'
    )
    done = launch("local.sh", "-n", "2", "-p", "1", "-r", "2", *FLAGS, PYTHON=stand_in)
    assert done.returncode == code
    assert len((tmp_path / "1").read_text()) == runs
    assert done.stderr.count(f"ended with exit code {code}; restart") == runs - 1


def test_local_goes_on_when_a_restart_helps(program, tmp_path):
    stand_in = program(f"test -e {tmp_path}/again && exit 0; touch {tmp_path}/again; kill -9 $$")
    done = launch("local.sh", "-n", "1", "-p", "1", "-r", "5", *FLAGS, PYTHON=stand_in)
    assert done.returncode == 0 and "exit code 137; restart 1 of 5" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_local_passes_signals_on(program, tmp_path, number):
    up = f"touch {tmp_path}/$M2MKD_PROCESS.up"
    stand_in = program(f"trap 'exit 3' {number.name[3:]}; {up}; while :; do sleep 0.05; done")
    process = subprocess.Popen(
        [LAUNCH / "local.sh", "-n", "2", "-p", "1", *FLAGS], env=os.environ | {"PYTHON": stand_in}
    )
    try:
        while len(list(tmp_path.glob("*.up"))) < 2:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) == 3
    finally:
        process.kill()
