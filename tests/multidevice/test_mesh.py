"""The mesh on 8 devices: where a batch lies, and checkpoints from one mesh on another."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from m2mkd_jax.checkpoint.store import RunCheckpoints, checksum, load_weights, save_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models.layers import all_gather_params
from m2mkd_jax.parallel.compilation_cache import enable_compilation_cache
from m2mkd_jax.parallel.mesh import (
    batch_sharding,
    in_line,
    make_mesh,
    mesh_shape,
    put_batch,
    replicated,
    spanning_groups,
    with_mesh,
)
from m2mkd_jax.parallel.process import is_main


def test_scalars_are_gathered_as_they_are():
    params = {"gain": jnp.float32(2.0), "kernel": jnp.ones((8, 8))}
    gathered = jax.jit(with_mesh(make_mesh(), all_gather_params))(params)
    assert gathered["gain"] == 2.0 and gathered["kernel"].sum() == 64


def test_the_mesh_has_the_axes_asked_for():
    mesh = make_mesh(expert=4)
    assert dict(mesh.shape) == {"data": 2, "expert": 4}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert dict(make_mesh(jax.devices()[:3]).shape) == {"data": 3, "expert": 1}
    assert dict(make_mesh(data=2, expert=-1).shape) == {"data": 2, "expert": 4}
    assert dict(make_mesh(data=4, expert=2).shape) == {"data": 4, "expert": 2}
    assert is_main()


@pytest.mark.parametrize(
    ("data", "expert", "says"),
    [
        (-1, 3, "3 does not divide 8 .*one of [1, 2, 4, 8]"),
        (16, -1, "16 does not divide 8"),
        (-1, 0, "not a valid mesh shape"),
        (-2, 1, "not a valid mesh shape"),
        (-1, -1, "only one of them can be -1"),
        (2, 3, "is 6 device(s), but there are 8"),
        (8, 8, "is 64 device(s), but there are 8"),
    ],
)
def test_impossible_shapes_are_refused(data, expert, says):
    says = ".*".join(map(re.escape, says.split(".*")))
    with pytest.raises(UserError, match=rf"^config.mesh: data {data} x expert {expert}.*{says}"):
        make_mesh(data=data, expert=expert)


def test_groups_lie_within_processes():
    def processes(count, of, expert):
        """A mesh of so many processes with so many devices each, listed in an odd order."""
        devices = [
            SimpleNamespace(process_index=i, id=10 * j + i)
            for j in reversed(range(of))
            for i in range(count)
        ]
        shape = mesh_shape(len(devices), expert=expert)
        return SimpleNamespace(devices=np.array(in_line(devices)).reshape(shape))

    assert spanning_groups(processes(4, of=4, expert=2)) == 1
    assert spanning_groups(processes(4, of=4, expert=4)) == 1
    assert spanning_groups(processes(4, of=4, expert=8)) == 2
    assert spanning_groups(processes(4, of=2, expert=8)) == 4
    assert spanning_groups(processes(2, of=3, expert=2)) == 2  # the middle one of three
    order = [device.process_index for device in processes(2, of=4, expert=1).devices.ravel()]
    assert order == [0] * 4 + [1] * 4


@pytest.mark.parametrize("expert", [1, 2, 8])
def test_every_device_gets_its_own_images(expert):
    mesh = make_mesh(expert=expert)
    host = {"image": np.arange(16 * 3, dtype=np.float32).reshape(16, 3), "label": np.arange(16)}
    batch = put_batch(mesh, host)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, host[name])
        assert array.sharding == batch_sharding(mesh)
        starts = {s.index[0].start: np.asarray(s.data) for s in array.addressable_shards}
        assert sorted(starts) == list(range(0, 16, 2))
        for start, shard in starts.items():
            np.testing.assert_array_equal(shard, host[name][start : start + 2])
    total = jax.jit(lambda b: b["image"].sum(), out_shardings=replicated(mesh))(batch)
    assert total == host["image"].sum() and len(total.sharding.device_set) == 8
    with pytest.raises(UserError, match=r"'label' of shape \(12,\).* a multiple of 8"):
        put_batch(mesh, {"label": np.arange(12)})


def meshes():
    return {
        "one": make_mesh(jax.devices()[:1]),
        "another one": make_mesh(jax.devices()[5:6]),
        "8x1": make_mesh(),
        "2x4": make_mesh(expert=4),
    }


def make_state(mesh):
    """Cut over 'data', cut over 'expert', cut over both, and whole; a scalar too."""
    rng = np.random.default_rng(0)
    specs = {"d": ("data",), "e": (None, "expert"), "de": ("data", "expert"), "whole": ()}
    state = {
        name: jax.device_put(
            rng.normal(size=(16, 8)).astype(np.float32), NamedSharding(mesh, PartitionSpec(*spec))
        )
        for name, spec in specs.items()
    }
    return {"params": state, "step": jax.device_put(jnp.int32(5), replicated(mesh))}


@pytest.mark.parametrize("source", ["8x1", "2x4", "one"])
def test_a_checkpoint_of_one_mesh_restores_on_another(tmp_path, source):
    saved = make_state(meshes()[source])
    run = RunCheckpoints(tmp_path)
    run.save(5, saved)
    run.wait()
    for name, mesh in meshes().items():
        wanted = make_state(mesh)
        step, restored = run.restore_latest(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
            )
        )
        assert step == 5
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert a.sharding == b.sharding, name
            np.testing.assert_array_equal(a, b)
            for mine, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
                np.testing.assert_array_equal(mine.data, theirs.data)
    run.close()


def test_weights_and_checksum_do_not_depend_on_the_mesh(tmp_path):
    states = {name: make_state(mesh) for name, mesh in meshes().items()}
    assert len({checksum(state) for state in states.values()}) == 1
    save_weights(tmp_path / "w", {"m": states["2x4"]["params"]}, {})
    loaded = load_weights(tmp_path / "w")[0]["m"]
    assert checksum(loaded) == checksum(states["one"]["params"])


def test_programs_are_found_in_the_cache_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "env"))
    before = jax.config.jax_compilation_cache_dir
    jax.jit(lambda x: x - 1)(jnp.ones(3))  # compiled before: must not switch the cache off
    try:
        path = enable_compilation_cache()
        assert path.parent == tmp_path / "env"
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(3)).block_until_ready()
        assert list(path.glob("*-cache"))
        path = enable_compilation_cache(tmp_path / "given")
        assert path.parent == tmp_path / "given"
        jax.jit(lambda x: x * 5 + 1)(jnp.ones(3)).block_until_ready()
        assert list(path.glob("*-cache"))
        (tmp_path / "file").touch()
        assert enable_compilation_cache(tmp_path / "file") is None
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).with_name("two_processes.py"))
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, port, index, str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in "01"
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    assert outputs[0].count("is damaged, not used") == 1  # process 0 speaks for both
    assert outputs[1].count("is damaged, not used") == 0
