"""A directory holds one run: what a second call with another config may change."""

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.job import Log
from m2mkd_jax.pipeline import is_done, remember
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


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null"])
def test_damaged_records_are_refused_with_their_path(tmp_path, text):
    done = tmp_path / "jobs" / "mt" / "1" / "done.json"
    done.parent.mkdir(parents=True)
    for path in (done, tmp_path / "config.json"):
        path.write_text(text)
    for look in (
        lambda: is_done(tmp_path, "mt/1"),
        lambda: remember(tiny_vmoe.get_config(), tmp_path),
    ):
        with pytest.raises(UserError, match="delete it") as error:
            look()
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_log_goes_on_after_lines_that_are_none(tmp_path):
    """As a power cut or another program leaves them; records after the checkpoint go."""
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 5, "loss": 1.0}\n'
    path.write_bytes(
        kept + b'{"step": 10, "loss": 1.0}\n\x00\x00\n{"loss": 1}\n[3]\n{"step": 12, \xff'
    )
    log = Log(path, "pt", 20, start=9)
    log({"step": 10})
    log.close()
    assert path.read_bytes() == kept + b'{"step": 10}\n'
