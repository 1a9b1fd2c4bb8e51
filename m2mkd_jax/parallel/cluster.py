"""How the processes of a run find each other."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.process import CONNECT_SECONDS, watch

# Longer than config.watchdog_seconds can be: jax aborts where its own heartbeats stay away.
_HEARTBEAT_SECONDS = 24 * 3600


def distributed_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None for a run of a single process.

    The first of these that applies:
        M2MKD_PROCESSES=1: a single process, whatever else is set
        M2MKD_COORDINATOR=host:port, M2MKD_PROCESSES=N, M2MKD_PROCESS=i (launch/local.sh)
        M2MKD_PROCESSES=auto: a TPU pod (launch/tpu_pod.sh) or a cluster that jax recognises
        a SLURM step of several tasks (launch/slurm.sh nodes); the elements of an array job have
            one task each and run as single processes
        several names in TPU_WORKER_HOSTNAMES

    Args:
        environment: the environment variables.

    Raises:
        UserError: the three M2MKD variables are incomplete or invalid.
    """
    variables = ("COORDINATOR", "PROCESSES", "PROCESS")
    given = {name: environment.get(f"M2MKD_{name}", "") for name in variables}
    if given["PROCESSES"] == "1":
        return None
    if given["PROCESSES"] == "auto":
        return {}
    if any(given.values()):
        return _explicit(given)
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_ID" in environment and tasks.isdigit() and int(tasks) > 1:
        alone_on_node = tasks == environment.get("SLURM_STEP_NUM_NODES")
        # By default jax gives each task a single device, that of its local number.
        own: dict[str, Any] = {"local_device_ids": []} if alone_on_node else {}
        return own | _slurm_coordinator(environment)
    return {} if "," in environment.get("TPU_WORKER_HOSTNAMES", "") else None


def _slurm_coordinator(environment: Mapping[str, str]) -> dict[str, str]:
    """The first node of a step, at jax's port; jax itself misreads lists such as n[1-4]-ib."""
    nodes, job = (environment.get(f"SLURM_{name}", "") for name in ("STEP_NODELIST", "JOB_ID"))
    first = re.match(r"(\[[^]]*]|[^,[])*", nodes)
    host = re.sub(r"\[([^],-]*)[^]]*]", r"\1", first[0] if first else "")
    if not host or not job.isdigit() or environment.get("JAX_COORDINATOR_ADDRESS"):
        return {}
    port = environment.get("JAX_COORDINATOR_PORT") or int(job) % 2**12 + 2**16 - 2**12
    return {"coordinator_address": f"{host}:{port}"}


def _explicit(given: Mapping[str, str]) -> dict[str, Any]:
    """The arguments from the three M2MKD variables."""
    for name, value in given.items():
        if not value:
            raise UserError(
                f"M2MKD_{name} is not set; M2MKD_COORDINATOR=host:port, M2MKD_PROCESSES=N and "
                "M2MKD_PROCESS=0..N-1 belong together"
            )
    host, _, port = given["COORDINATOR"].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"M2MKD_COORDINATOR is {given['COORDINATOR']!r}; it must be host:port")
    if not given["PROCESSES"].isdigit() or int(given["PROCESSES"]) < 1:
        raise UserError(
            f"M2MKD_PROCESSES is {given['PROCESSES']!r}; it must be a number of processes, or auto"
        )
    count = int(given["PROCESSES"])
    if not given["PROCESS"].isdigit() or int(given["PROCESS"]) >= count:
        raise UserError(f"M2MKD_PROCESS is {given['PROCESS']!r}; it must be 0 to {count - 1}")
    return {
        "coordinator_address": given["COORDINATOR"],
        "num_processes": count,
        "process_id": int(given["PROCESS"]),
        "local_device_ids": [],
    }


def start_distributed() -> None:
    """Connects this process to the others of its run, if any; call it before jax is used.

    If not all connect within CONNECT_SECONDS, it ends the process with a message and exit code 2.

    Raises:
        UserError: invalid variables, or jax could not connect.
    """
    arguments = distributed_arguments(os.environ)
    if arguments is None:
        return
    given = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if address := arguments.get("coordinator_address", given):
        first = str(arguments.get("process_id", os.environ.get("SLURM_PROCID"))) == "0"
        check_reachable(address, first, os.environ)
        if first:
            check_port(address)
    # At its own time limit jax aborts the process with a stack trace, which cannot be caught.
    timeout = threading.Timer(CONNECT_SECONDS, _give_up)
    timeout.daemon = True
    timeout.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=2 * CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot join the other processes of this run: {reason}") from None
    finally:
        timeout.cancel()
    watch(distributed.global_state.client)


def check_reachable(address: str, first: bool, environment: Mapping[str, str]) -> None:
    """Refuses an address that on this machine means this machine, while process 0 is on another.

    Only SLURM says how many machines there are. On that of process 0 its own name may well be a
    loopback address, as on Debian; "localhost" is wrong there too.

    Args:
        address: host:port of process 0.
        first: whether this process is process 0.
        environment: the environment variables.

    Raises:
        UserError: one line with both addresses.
    """
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES", "1")
    host = address.rpartition(":")[0].strip("[]")
    here = first or environment.get("SLURM_NODEID") == "0"
    if nodes == "1" or not (found := loopback(host)) or (here and not _literally_here(host)):
        return
    raise UserError(
        f"process 0 is to be at {address}, and here on {socket.gethostname()} {host} is {found}, a "
        f"loopback address that other machines do not reach; there are {nodes} nodes: give the "
        "name or address by which all of them reach process 0"
    )


def _literally_here(host: str) -> bool:
    """Whether a name means "this machine" on every machine."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def loopback(host: str) -> str:
    """The loopback address that a name resolves to; "": it is none, or does not resolve."""
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    addresses = [str(entry[4][0]).partition("%")[0] for entry in entries]
    return next((a for a in addresses if ipaddress.ip_address(a).is_loopback), "")


def check_port(address: str) -> None:
    """Refuses a port that another program listens at; jax would share it with another run.

    Args:
        address: host:port of process 0, which this process is.

    Raises:
        UserError: one line that names the port.
    """
    port = int(address.rpartition(":")[2])
    for family, anywhere in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # A port on which connections of a run before are still closing is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((anywhere, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # a machine without IPv6
                continue
            raise UserError(
                f"port {port} of {socket.gethostname()} is taken by another program; give another "
                "port for process 0 (M2MKD_COORDINATOR, or JAX_COORDINATOR_PORT under SLURM), or "
                "end the run that has it"
            ) from None


def _give_up() -> None:
    """Ends the process because others are missing."""
    state = distributed.global_state
    address = str(state.coordinator_address)
    host = address.rpartition(":")[0].strip("[]")
    hint = "look at what the others say, and whether they can reach it"
    if found := loopback(host):
        hint = f"{host} is {found}, which processes on other machines cannot reach, or {hint}"
    print(
        f"m2mkd_jax: after {CONNECT_SECONDS} s not all of {state.num_processes or 'the'} processes "
        f"are at {address}; {hint}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
