import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    found = len(jax.devices())
    if found < 8:
        pytest.fail(
            f"tests/multidevice needs 8 devices, found {found}: run it as `pytest "
            "tests/multidevice`, without other tests (one process has one number of devices)",
            pytrace=False,
        )
