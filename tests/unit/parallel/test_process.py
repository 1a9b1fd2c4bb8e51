"""Who belongs to a run, as the environment says it."""

import os
import socket
import subprocess
import sys

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.cluster import distributed_arguments

EXPLICIT = {"M2MKD_COORDINATOR": "node1:1234", "M2MKD_PROCESSES": "4", "M2MKD_PROCESS": "3"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (
            EXPLICIT,
            {
                "coordinator_address": "node1:1234",
                "num_processes": 4,
                "process_id": 3,
                "local_device_ids": [],
            },
        ),
        ({"M2MKD_PROCESSES": "auto"}, {}),
        (STEP | {"SLURM_STEP_NUM_NODES": "2"}, {}),  # a task per device
        (STEP | {"SLURM_STEP_NUM_NODES": "8"}, {"local_device_ids": []}),  # a task per node
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_ARRAY_TASK_ID": "3"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # the batch script itself, no step
        (STEP | {"M2MKD_PROCESSES": "1"}, None),  # tasks that have nothing to do with each other
        (  # job 7's port, as jax has it: 7 % 4096 + 61440
            STEP | {"SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_NODELIST": "n[3,5-7]-ib,gpu[1-2]"},
            {"local_device_ids": [], "coordinator_address": "n3-ib:61447"},
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_the_environment_says_who_belongs_together(environment, expected):
    assert distributed_arguments(environment) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node[001-004]", "node001"),
        ("node[003,005-007],gpu[1-2]", "node003"),
        ("gpu1,node[1-3]", "gpu1"),
        ("a-b-[10-12]x", "a-b-10x"),
        ("x[1000-1001]c[0-7]b[0,1],y", "x1000c0b0"),
    ],
)
def test_the_first_node_of_a_step_is_where_its_processes_meet(nodes, first):
    found = distributed_arguments(STEP | {"SLURM_STEP_NODELIST": nodes})
    assert found == {"coordinator_address": f"{first}:61447"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"M2MKD_PROCESS": ""}, "M2MKD_PROCESS is not set"),
        ({"M2MKD_COORDINATOR": ""}, "M2MKD_COORDINATOR is not set"),
        ({"M2MKD_PROCESSES": ""}, "M2MKD_PROCESSES is not set"),
        ({"M2MKD_COORDINATOR": "node1"}, "must be host:port"),
        ({"M2MKD_COORDINATOR": "node1:0"}, "must be host:port"),
        ({"M2MKD_PROCESSES": "four"}, "'four'; it must be a number"),
        ({"M2MKD_PROCESSES": "0"}, "'0'; it must be a number"),
        ({"M2MKD_PROCESS": "4"}, "'4'; it must be 0 to 3"),
        ({"M2MKD_PROCESS": "-1"}, "'-1'; it must be 0 to 3"),
    ],
)
def test_wrong_variables_are_refused_in_one_line(change, says):
    with pytest.raises(UserError, match=says) as error:
        distributed_arguments(EXPLICIT | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("process", ["0", "1"])
def test_a_process_that_nobody_joins_ends_with_one_line(process):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = (
        "from m2mkd_jax.parallel import cluster; cluster.CONNECT_SECONDS = 2; "
        "cluster.start_distributed()"
    )
    environment = EXPLICIT | {"M2MKD_COORDINATOR": address, "M2MKD_PROCESS": process}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    assert f"after 2 s not all of {4} processes are at {address};" in done.stderr
    assert done.stderr.count("\n") == 1
