"""What each of two processes does in `test_mesh.test_two_processes`: PORT INDEX DIRECTORY."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m2mkd_jax.checkpoint.store import RunCheckpoints, checksum, load_weights, save_weights
from m2mkd_jax.parallel.mesh import make_mesh, put_batch, replicated
from m2mkd_jax.parallel.process import barrier, from_main, is_main, union


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

    save_weights(directory + "/w", {"m": {"w": state["w"]}}, {"step": 1})
    np.testing.assert_array_equal(load_weights(directory + "/w")[0]["m"]["w"], big)


if __name__ == "__main__":
    main(*sys.argv[1:])
