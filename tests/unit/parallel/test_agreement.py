"""What is refused before processes of a run work together: unequal starts, wrong addresses."""

import json
import socket

import jax
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import agreement as starts
from m2mkd_jax.jobs import run
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.parallel import agreement, cluster
from tests.e2e import tiny


class Store:
    """The key-value store, where process 0 has said its part already."""

    def __init__(self, main):
        self.main, self.said, self.barriers = main, [], 0

    def key_value_set(self, key, value):
        self.said.append(json.loads(value)["values"])

    def blocking_key_value_get(self, key, timeout):
        return json.dumps({"host": "a", "values": self.main.pop(0)})

    def wait_at_barrier(self, *_, **__):
        self.barriers += 1


@pytest.fixture
def second_of_two(monkeypatch):
    """Makes this process the second one, whose process 0 has said these values."""

    def make(*main):
        store = Store(list(main))
        monkeypatch.setattr(agreement.distributed.global_state, "client", store)
        monkeypatch.setattr(agreement.distributed.global_state, "process_id", 1)
        return store

    return make


def values_of(config, only=""):
    """What check_same_start compares, in order: code; environment; config and flags."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "check_same", lambda values, advice: seen.append(dict(values)))
        starts.check_same_start(config, {"--only": only})
    return seen


def test_equal_processes_agree(second_of_two):
    config = tiny.get_config()
    store = second_of_two(*json.loads(json.dumps(values_of(config))))
    config.data.root, config.data.workers = "/another/disk", 7  # of the machine
    starts.check_same_start(config, {"--only": ""})
    assert store.barriers == 3 and len(store.said) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.recipes.pt.update(lr=0.5), "config.recipes.pt.lr is 0.001 in process 0 (a)"),
        (lambda c: c.update(seed=3), "config.seed is 0 in process 0 (a) and 3 in process 1 ("),
        (lambda c: c.nac.options.update(m=3), "config.nac.options is {'m': 2} in process 0"),
        (lambda c: c.data.update(damaged_share=0.5), "config.data.damaged_share is 0.001"),
    ],
)
def test_other_configs_are_refused_by_their_key(second_of_two, change, says):
    config = tiny.get_config()
    store = second_of_two(*json.loads(json.dumps(values_of(config))))
    change(config)
    with pytest.raises(UserError) as error:
        starts.check_same_start(config, {"--only": ""})
    text = str(error.value)
    assert text.startswith(says) and "same config and flags" in text and "\n" not in text
    assert store.barriers == 2  # code and environment are the same


def test_other_flags_and_other_code_are_refused(second_of_two):
    config = tiny.get_config()
    code, environment, rest = values_of(config, only="pt")
    second_of_two(code, environment, rest)
    with pytest.raises(UserError, match=r"--only is 'pt' in process 0 .* and '' in process 1"):
        starts.check_same_start(config, {"--only": ""})
    second_of_two(code | {"the version of jax": "0.0.1"})
    with pytest.raises(UserError, match=r"the version of jax is '0.0.1' in process 0"):
        starts.check_same_start(config, {"--only": "pt"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax's setting jax_enable_x64", "True"), ("$XLA_FLAGS", "--xla_cpu_enable_fast_math=true")],
)
def test_what_compiles_other_programs_is_refused(second_of_two, monkeypatch, name, value):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/here")  # may differ
    config = tiny.get_config()
    code, environment, rest = values_of(config)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/there")
    second_of_two(code, environment, rest)
    starts.check_same_start(config, {"--only": ""})
    second_of_two(code, environment | {name: value})
    with pytest.raises(UserError, match=r"in process 0 .*; start all .* the same environment") as e:
        starts.check_same_start(config, {"--only": ""})
    assert str(e.value).startswith(f"{name} is '{value}' in process 0 (a) and")


def test_what_is_set_of_the_compiler_and_of_jax():
    flags = {"XLA_FLAGS": "--xla_dump_to=/here --xla_a=1", "HOME": "/root"}
    plain = agreement.compiler_settings(flags)
    assert plain["$XLA_FLAGS"] == "--xla_a=1" and plain["$NVIDIA_TF32_OVERRIDE"] == ""
    with jax.default_matmul_precision("bfloat16"):
        other = agreement.compiler_settings(flags)
    changed = {name for name in plain if plain[name] != other[name]}
    assert changed == {"jax's setting jax_default_matmul_precision"}


def test_other_data_are_refused(second_of_two, monkeypatch):
    monkeypatch.setattr(starts, "alone", lambda: False)
    config = tiny.get_config()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(starts, "check_same", lambda values, advice: seen.append(dict(values)))
        starts.check_same_data(Plan(config), ["pt"])
    (facts,) = seen
    second_of_two(facts)
    starts.check_same_data(Plan(config), ["pt"])
    name = "the number of the train images of config.data"
    assert facts[name] == 160
    source = run.image_source(config.data, "train")
    second_of_two(facts | {name: 159})
    with pytest.raises(UserError, match=f"{name} is 159 in process 0 .* and 160 in process 1"):
        starts.check_same_data(Plan(config), ["pt"])
    # As many of the same classes, but others of them: with them a loss has other class weights.
    monkeypatch.setitem(run._IMAGES, f"train {config.data.to_json()}", Reordered(source))
    second_of_two(facts)
    with pytest.raises(UserError, match="the sha256 of the labels of the train images of config"):
        starts.check_same_data(Plan(config), ["pt"])


class Reordered:
    """A data set whose labels are in another order."""

    def __init__(self, source):
        self.labels, self.class_names = np.asarray(source.labels)[::-1], source.class_names

    def __len__(self):
        return len(self.labels)


NODES = {"SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("address", "first", "environment", "wrong"),
    [
        ("localhost:1234", False, NODES, True),
        ("localhost:1234", True, NODES, True),
        ("127.0.1.1:1234", False, NODES, True),
        ("[::1]:1234", False, NODES, True),
        ("localhost:1234", False, {}, False),  # launch/local.sh
        ("10.0.0.1:1234", False, NODES, False),
        ("node1:1234", True, NODES, False),  # its own name, as Debian resolves it
        ("node1:1234", False, NODES | {"SLURM_NODEID": "0"}, False),
        ("node1:1234", False, NODES | {"SLURM_NODEID": "1"}, True),
    ],
)
def test_a_loopback_address_on_several_nodes_is_refused(
    monkeypatch, address, first, environment, wrong
):
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: real("127.0.1.1" if host == "node1" else host, *a, **k),
    )
    if not wrong:
        cluster.check_reachable(address, first, environment)
        return
    with pytest.raises(UserError, match=r"a loopback address .* there are 2 nodes") as error:
        cluster.check_reachable(address, first, environment)
    assert address in str(error.value) and "\n" not in str(error.value)


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        other.listen()
        with pytest.raises(UserError, match=f"port {port} of .* is taken by another program"):
            cluster.check_port(f"localhost:{port}")
    cluster.check_port(f"localhost:{port}")
