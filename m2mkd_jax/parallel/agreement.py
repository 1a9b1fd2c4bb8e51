"""What must be the same in all processes of a run: compared before work, through the host alone."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # its key-value store has no public name; Orbax uses it as well

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.process import CONNECT_SECONDS, reached

_MILLISECONDS = 1000 * CONNECT_SECONDS
# What decides with the code what a program computes: jax's settings, and variables of its compiler.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_numpy_dtype_promotion",
    "jax_softmax_custom_jvp",
    "jax_use_shardy_partitioner",
    "jax_debug_nans",
    "jax_disable_jit",
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_number = itertools.count()  # each key of the store can be written once


def check_same(values: Mapping[str, Any], advice: str) -> None:
    """Refuses values that are not those of process 0; every process makes this call.

    Args:
        values: by what they are called in the message; JSON can represent them.
        advice: what to do where they differ.

    Raises:
        UserError: one line that names the first value that differs, and both processes.
    """
    state = distributed.global_state
    if state.client is None:
        return
    reached()
    where = f"m2mkd_jax/same/{next(_number)}"
    mine = json.loads(json.dumps({"host": socket.gethostname(), "values": values}))
    state.client.key_value_set(f"{where}/{state.process_id}", json.dumps(mine))
    text = state.client.blocking_key_value_get(f"{where}/0", _MILLISECONDS)
    if line := difference(json.loads(text), mine, state.process_id):
        raise UserError(f"{line}; {advice}")
    # Nobody goes on before all agree: the others are ended by the one that does not.
    state.client.wait_at_barrier(f"{where}/agreed", timeout_in_ms=_MILLISECONDS)


def difference(main: Mapping[str, Any], other: Mapping[str, Any], index: int) -> str:
    """A line on the first value in which a process differs from process 0; "": there is none.

    Args:
        main: {"host", "values"} of process 0.
        other: likewise of the other one.
        index: its number.
    """
    for name in sorted({*main["values"], *other["values"]}):
        here, there = main["values"].get(name), other["values"].get(name)
        if here != there:
            return (
                f"{name} is {here!r} in process 0 ({main['host']}) and {there!r} in process "
                f"{index} ({other['host']})"
            )
    return ""


@functools.cache
def code_versions() -> dict[str, str]:
    """The versions of what computes: of Python, the libraries, and this package's own files."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in packages}
    versions["the code of m2mkd_jax (its sha256)"] = digest.hexdigest()[:12]
    major, minor, _ = platform.python_version_tuple()
    return versions | {"the version of Python": f"{major}.{minor}"}


def compiler_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What is set of jax and its compiler that changes numbers, by what it is called.

    Processes that compile other programs of one step wait for each other for ever, or keep other
    weights each, without a word. Where the compiler leaves files may differ.

    Args:
        environment: the environment variables.
    """
    have = jax.config.values
    found = {f"jax's setting {n}": str(have[n]) for n in _SETTINGS if n in have}
    for name in _VARIABLES:
        flags = environment.get(name, "").split()
        found[f"${name}"] = " ".join(f for f in flags if not f.startswith("--xla_dump"))
    return found
