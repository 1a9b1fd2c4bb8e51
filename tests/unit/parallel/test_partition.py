"""Which part of an array a device holds, read off shapes; no devices are needed."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel import partition

L, E, D = 3, 8, 1024


@pytest.fixture
def mesh():
    return AbstractMesh((2, 4), ("data", "expert"))


def specs(mesh, tree, fsdp):
    return jax.tree.map(lambda s: s.spec, partition.shardings(mesh, tree, fsdp))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_experts_lie_apart_with_all_that_is_kept_for_them(mesh):
    moe = {"experts": {"fc1": {"kernel": shape(L, E, D, D), "bias": shape(L, E, D)}}}
    params = {"student_1": {"segment_0": {"blocks": {"moe": moe}}}}
    tree = {
        "params": params,
        "opt_state": ({"count": shape()}, {"mu": params}),
        "one block": {"moe": {"experts": {"fc1": {"bias": shape(E, D)}}}},
        "listed blocks": {"blocks": {"0": {"experts": {"bias": shape(E, D)}}}},
    }
    found = specs(mesh, tree, fsdp=False)
    stacked = {
        "kernel": PartitionSpec(None, "expert", None, None),
        "bias": PartitionSpec(None, "expert", None),
    }
    for part in (found["params"], found["opt_state"][1]["mu"]):
        assert part["student_1"]["segment_0"]["blocks"]["moe"]["experts"]["fc1"] == stacked
    assert found["opt_state"][0]["count"] == PartitionSpec()
    single = PartitionSpec("expert", None)
    assert found["one block"]["moe"]["experts"]["fc1"]["bias"] == single
    assert found["listed blocks"]["blocks"]["0"]["experts"]["bias"] == single


@pytest.mark.parametrize(
    ("path", "sizes", "expected"),
    [
        (("blocks", "qkv"), (L, D, 3 * D), (None, None, "data")),  # the longest axis
        (("blocks", "proj"), (L, 4 * D, D), (None, "data", None)),
        (("blocks", "odd"), (2, D, 4 * D + 1), (None, "data", None)),  # the longest that divides
        (("blocks", "thin"), (L, 1025, 1025), (None, None, None)),
        (("blocks", "norm"), (L, D), (None, None)),  # small
        (("head",), (D, 1000), ("data", None)),
        (("experts", "fc1"), (E, D, 4 * D), ("expert", None, "data")),
        (("blocks", "experts", "fc1"), (L, E, D, 4 * D), (None, "expert", None, "data")),
    ],
)
def test_large_parameters_lie_apart_with_fsdp(mesh, path, sizes, expected):
    tree = shape(*sizes)
    for name in reversed(path):
        tree = {name: tree}
    (found,) = (s.spec for s in jax.tree.leaves(partition.shardings(mesh, tree, fsdp=True)))
    assert found == PartitionSpec(*expected)


def test_bytes_of_a_device(mesh):
    tree = {
        "experts": {"fc1": shape(E, D, D, dtype=jnp.bfloat16)},
        "head": shape(D, 1000),
        "norm": shape(D),
    }
    held = partition.bytes_per_device(tree, partition.shardings(mesh, tree, fsdp=True))
    assert held == 2 * E * D * D // 8 + 4 * D * 1000 // 2 + 4 * D


def test_experts_must_be_dealt_equally(mesh):
    tree = {"experts": {"fc1": {"kernel": shape(6, 4, 4)}}}
    with pytest.raises(UserError, match=r"6 experts cannot be dealt over 4 devices \(experts/fc1"):
        partition.shardings(mesh, tree, fsdp=False)
