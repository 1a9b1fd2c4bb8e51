"""One environment for all lanes, and no skips in two of them.

A lane is a folder here; `make test` runs each in its own pytest process, because one process has
either one CPU device or eight.
"""

import os
from importlib import metadata
from typing import Any

import pytest

DEVICES = 8
NO_SKIPS = ("tests/parity", "tests/multidevice")

# Files that take longest: begun first, so that no worker is left with one at the end of a lane.
LONGEST = (
    "tests/unit/models/test_fused.py",
    "tests/unit/models/test_nac_options.py",
    "tests/parity/test_steps.py",
    "tests/parity/test_students.py",
    "tests/parity/test_vit.py",
    "tests/multidevice/test_processes.py",
    "tests/e2e/test_pipeline.py",
    "tests/e2e/test_vmoe_pipeline.py",
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No silent promotion of types or ranks; processes that tests start inherit it.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


def pytest_configure(config: pytest.Config) -> None:
    # Before any test imports jax; pytest-xdist's workers inherit the environment.
    flags = os.environ.get("XLA_FLAGS", "")
    if _only(config, "multidevice") and "xla_force_host_platform_device_count" not in flags:
        flags = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
    # These programs run for milliseconds and compile for seconds. tests/parity, which holds the
    # numbers against the original's, compiles as jax does by default.
    if _only(config, "multidevice", "unit", "e2e", "chaos"):
        flags += " --xla_backend_optimization_level=0"
        # XLA's older way of writing kernels compiles twice as fast at this level; jax 0.11 has it
        # no more.
        if metadata.version("jax").startswith("0.10."):
            flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in LONGEST)


def _only(config: pytest.Config, *lanes: str) -> bool:
    """Whether all that was asked for lies in these lanes."""
    here = os.path.dirname(os.path.abspath(__file__))
    roots = [os.path.abspath(str(arg).split("::")[0]) + os.sep for arg in config.args]
    inside = tuple(os.path.join(here, lane) + os.sep for lane in lanes)
    return bool(roots) and all(root.startswith(inside) for root in roots)


def skipped_where_forbidden(terminalreporter: Any) -> list[str]:
    """Tests that were skipped or failed as expected in a lane where neither may be."""
    reports = [r for kind in ("skipped", "xfailed") for r in terminalreporter.stats.get(kind, [])]
    ids = {report.nodeid for report in reports}
    return sorted(i for i in ids if i.startswith(tuple(f"{lane}/" for lane in NO_SKIPS)))


# pytest's own terminal reporter prints the summary around this hook: run before it.
@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    # A worker of pytest-xdist has no reporter; its reports reach the main process.
    if reporter and skipped_where_forbidden(reporter) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for nodeid in skipped_where_forbidden(terminalreporter):
        lane = "/".join(nodeid.split("/")[:2])
        line = f"FORBIDDEN {nodeid}: {lane} must not skip or expect failure"
        terminalreporter.write_line(line, red=True)
