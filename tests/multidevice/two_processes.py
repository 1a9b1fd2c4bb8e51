"""What each of two processes does in `test_mesh.test_two_processes`: PORT INDEX DIRECTORY."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from m2mkd_jax.checkpoint.checksums import CheckedPyTreeHandler
from m2mkd_jax.checkpoint.store import RunCheckpoints, checksum, load_weights, save_weights
from m2mkd_jax.parallel.mesh import make_mesh, put_batch, replicated
from m2mkd_jax.parallel.process import barrier, from_main, is_main, union


class Late(ocp.future.Future):
    """What one process writes of a checkpoint long after the other one has written its own."""

    def __init__(self, path):
        self.path = path

    def result(self, timeout=None):
        time.sleep(1)
        self.path.touch()


def check_saves_at_once(directory, index, state):
    """Of two jobs that save the same step at once, each is whole once both processes wrote it."""
    late, whole, early = directory / "late", CheckedPyTreeHandler.finalize, []
    save = CheckedPyTreeHandler.async_save

    async def slow_save(self, path, *others, args):
        futures = await save(self, path, *others, args=args)
        return [Late(late), *futures] if index == 1 and "slow" in str(path) else futures

    def finalize(self, path):
        early.extend([path] if "slow" in str(path) and not late.exists() else [])
        whole(self, path)

    CheckedPyTreeHandler.async_save, CheckedPyTreeHandler.finalize = slow_save, finalize
    runs = [RunCheckpoints(directory / name) for name in ("slow", "fast")]
    for run in runs:
        run.save(1, state)
    for run in runs:
        run.close()
    CheckedPyTreeHandler.async_save, CheckedPyTreeHandler.finalize = save, whole
    assert not early, "taken for whole before process 1 has written it"


def main(port: str, index: str, directory: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    assert len(jax.devices()) == 4 and is_main() == (index == "0")
    assert from_main(["said by", index] * (1 + int(index))) == ["said by", "0"]
    for own, all_of_them in (({int(index), 5}, {0, 1, 5}), (set(), set())):
        assert union(own) == all_of_them
    assert union([3] * int(index)) == {3}  # process 0 has none
    whole = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    for expert in (1, 4):  # 4: one group spans both processes
        mesh = make_mesh(expert=expert)
        batch = put_batch(mesh, {"x": whole[4 * int(index) :][:4]})
        assert batch["x"].shape == (8, 2)
        same = jax.jit(lambda b: (b["x"] == whole).all(), out_shardings=replicated(mesh))
        assert same(batch)

    cut = NamedSharding(mesh, PartitionSpec("expert"))
    big = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
    state = {
        "w": jax.make_array_from_callback(big.shape, cut, lambda i: big[i]),
        "step": jax.device_put(jnp.int32(1), replicated(mesh)),
    }
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    assert checksum(state) == checksum({"w": big, "step": np.int32(1)})

    run = RunCheckpoints(directory + "/run")
    run.save(1, state)
    run.save(2, state)
    run.wait()
    if is_main():  # takes away what only the other process reads; both must fall back
        files = Path(directory, "run", "2", "state", "ocdbt.process_1", "d").iterdir()
        max(files, key=lambda file: file.stat().st_size).unlink()
    barrier("damage")
    step, restored = run.restore_latest(abstract)
    assert step == 1 and restored["w"].sharding == cut
    assert checksum(restored) == checksum(state)
    run.save(2, restored)
    run.close()

    check_saves_at_once(Path(directory), int(index), state)

    save_weights(directory + "/w", {"m": {"w": state["w"]}}, {"step": 1})
    np.testing.assert_array_equal(load_weights(directory + "/w")[0]["m"]["w"], big)


if __name__ == "__main__":
    main(*sys.argv[1:])
