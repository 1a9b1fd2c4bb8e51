"""A directory holds one run: what a second call with another config may change."""

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.pipeline import remember
from tests.e2e import tiny_vmoe


def test_a_run_goes_on_with_other_machines_but_not_as_another_run(tmp_path):
    config = tiny_vmoe.get_config()
    remember(config, tmp_path)
    config.mesh.update(data=2, expert=4, fsdp=True)
    config.data.root, config.data.workers, config.log_every = "elsewhere", 3, 7
    config.data.damaged_share = 0.5  # after a run that too many damaged images ended
    config.phases = (*config.phases, "e2e_kd")
    remember(config, tmp_path)
    before = (tmp_path / "config.json").read_text()
    config.recipes.e2e.lr = 0.5
    with pytest.raises(UserError, match=r"holds a run with config\.recipes\.e2e\.lr = ") as error:
        remember(config, tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "config.json").read_text() == before
