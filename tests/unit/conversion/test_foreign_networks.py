"""Checkpoints of timm, DINO and Google as networks of this package, or refused by name."""

import json

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from safetensors.numpy import save_file

import m2mkd_jax
from m2mkd_jax.conversion.open_weights import open_weights
from tests import foreign_networks as foreign
from tests.support import OUTPUT_TOLERANCE, assert_close

IMAGES = np.random.default_rng(9).standard_normal((2, foreign.SIDE, foreign.SIDE, 3), np.float32)


def load(tmp_path, state: dict, **fields) -> m2mkd_jax.Model:
    (tmp_path / "arch.json").write_text(json.dumps({"heads": foreign.HEADS, **fields}))
    save_file(state, tmp_path / "network.safetensors")
    return m2mkd_jax.load(tmp_path / "network.safetensors", arch=str(tmp_path / "arch.json"))


@pytest.mark.parametrize("layer_scale", [False, True])
def test_timm_networks_compute_the_same(layer_scale, tmp_path):
    state = foreign.timm_vit(layer_scale=layer_scale)
    model = load(tmp_path, state)
    assert_close(model(IMAGES), foreign.run_timm(state, IMAGES), OUTPUT_TOLERANCE)


def test_a_network_without_head_gets_a_fresh_one(tmp_path):
    state = foreign.timm_vit(layer_scale=True, head=False) | {"mask_token": np.zeros((1, 12), "f4")}
    with pytest.raises(m2mkd_jax.UserError, match="has no head"):
        load(tmp_path, state)
    model = load(tmp_path, state, classes=7)
    assert model.classes == 7
    features = model.features(IMAGES)["class_token"]
    assert_close(features, foreign.run_timm(state, IMAGES), OUTPUT_TOLERANCE)


@pytest.mark.parametrize("moe", [False, True])
def test_googles_networks_compute_the_same(moe, tmp_path):
    arrays = foreign.google_npz(moe=moe)
    np.savez(tmp_path / "network.npz", **arrays)
    model = m2mkd_jax.load(tmp_path / "network.npz")
    assert model.mean == [0.5, 0.5, 0.5] and model.description["kind"] == ("vmoe" if moe else "vit")
    assert_close(model(IMAGES), foreign.run_google(arrays, IMAGES), OUTPUT_TOLERANCE)


def test_a_file_of_bfloat16_is_read(tmp_path):
    arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in foreign.google_npz(moe=True).items()}
    np.savez(tmp_path / "network.npz", **arrays)
    assert np.load(tmp_path / "network.npz")["cls"].dtype == "V2"
    model = m2mkd_jax.load(tmp_path / "network.npz")
    rounded = {name: array.astype(np.float32) for name, array in arrays.items()}
    assert_close(model(IMAGES), foreign.run_google(rounded, IMAGES), OUTPUT_TOLERANCE)


def test_arrays_of_another_type_or_shape_are_refused(tmp_path):
    good = foreign.google_npz()
    query = next(name for name in good if name.endswith("query/kernel"))
    key = query.replace("query", "key")
    width = good[key].shape[0]
    for name, array, words in (
        ("cls", good["cls"].astype(np.float64), "cls.* is of the type f8"),
        ("cls", np.ones(good["cls"].shape, np.int32), "cls.* is of the type i4"),
        ("embedding/kernel", good["embedding/kernel"][0, 0], "embedding/kernel .* by its axes"),
        (key, np.ones((width, 1, good[key][0].size), np.float32), "are of unequal shapes"),
    ):
        np.savez(tmp_path / "x.npz", **{**good, name: array})
        with pytest.raises(m2mkd_jax.UserError, match=words):
            m2mkd_jax.load(tmp_path / "x.npz")


def test_shards_of_vmoe_hold_what_one_file_does(tmp_path):
    arrays = foreign.google_npz(moe=True)
    np.savez(tmp_path / "network.npz", **arrays)
    index = foreign.write_google_shards(tmp_path / "ckpt_1", arrays)
    whole, sharded = (open_weights(path) for path in (tmp_path / "network.npz", index))
    for field in ("kind", "spec", "depths", "normalisation"):
        assert sharded.description[field] == whole.description[field]
    jax.tree.map(np.testing.assert_array_equal, dict(sharded.trees), dict(whole.trees))
    first, second = sorted(tmp_path.glob("ckpt_1.data-*"))
    content = second.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(m2mkd_jax.UserError, match=words) as error:
            dict(open_weights(index).trees)
        assert "\n" not in str(error.value)

    second.unlink()
    refused(r"1 of its 2 data files are missing, the first: .*ckpt_1.data-00001-of-00002")
    second.write_bytes(content[:-9])
    refused("00001-of-00002 cannot be read")
    second.write_bytes(first.read_bytes())
    refused("does not hold the arrays .* save the parameters alone")
    second.write_bytes(content)
    index.write_bytes(index.read_bytes()[:40])
    refused("ckpt_1.index cannot be read")
    (tmp_path / "ckpt_1.index").write_bytes(b"\x93abc")
    refused("no index of a checkpoint")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard_count": "2"}, "says that it has '2' data files"),
        ({"shard_count": None}, "says that it has None data files"),
        ({"shard_count": 1.5}, "says that it has 1.5 data files"),
        ({"shard_count": 1}, r"says that it has 1 data files, and uses \[0, 1\]"),
        ({"index": {0: {}, "a": {}}}, "a part of a name is 0"),
        ({"index": {"a": {b"b": {}}}}, "a part of a name is b'b'"),
    ],
)
def test_an_index_that_says_what_cannot_be(change, words, tmp_path):
    index = foreign.write_google_shards(tmp_path / "ckpt_1", foreign.google_npz(moe=True))
    content = msgpack.unpackb(index.read_bytes(), strict_map_key=False)
    index.write_bytes(msgpack.packb(content | change))
    with pytest.raises(m2mkd_jax.UserError, match=words) as error:
        open_weights(index)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reg_token", "register tokens"),
        ("dist_token", "distillation token"),
        ("blocks.0.attns.0.qkv.weight", "parallel layers"),
        ("pre_logits.fc.weight", "pre-logits"),
        ("fc_norm.weight", "average pooling"),
        ("norm_pre.weight", "norm_pre"),
        ("blocks.0.attn.q_norm.weight", "q_norm"),
        ("blocks.1.mlp.w12.weight", "SwiGLU"),
        ("blocks.0.gamma_1", "BEiT"),
        ("attn_pool.latent", "attention pooling"),
    ],
)
def test_parts_without_a_place_are_refused_by_name(name, words, tmp_path):
    state = foreign.timm_vit() | {name: np.ones(foreign.WIDTH, np.float32)}
    with pytest.raises(m2mkd_jax.UserError) as refused:
        load(tmp_path, state)
    assert words in str(refused.value) and name in str(refused.value)


def test_what_shapes_do_not_show_is_asked_for(tmp_path):
    """Without biases eps is 1e-5 in one published network and 1e-6 in timm's."""
    state = {k: v for k, v in foreign.timm_vit().items() if not k.endswith("attn.qkv.bias")}
    with pytest.raises(m2mkd_jax.UserError, match="eps cannot be read off"):
        load(tmp_path, state)
    assert load(tmp_path, state, eps=1e-6).description["spec"]["eps"] == 1e-6


def test_positions_without_a_class_token_are_refused_as_that(tmp_path):
    """As in DeiT III and in networks that pool all tokens."""
    state = foreign.timm_vit()
    state["pos_embed"] = np.ascontiguousarray(state["pos_embed"][:, 1:])
    with pytest.raises(m2mkd_jax.UserError, match="4 positions, none for a class token"):
        load(tmp_path, state)


def test_damaged_and_unknown_npz_are_refused(tmp_path):
    def refused(arrays: dict, words: str) -> None:
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(m2mkd_jax.UserError, match=words):
            m2mkd_jax.load(tmp_path / "x.npz")

    arrays = foreign.google_npz()
    start = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    refused({"a": np.ones(3, np.float32)}, "no checkpoint of Google's")
    refused({k: v for k, v in arrays.items() if k != "cls"}, "average pooling")
    refused({k: v for k, v in arrays.items() if k != f"{start}/key/bias"}, "key/bias. is missing")
    refused({k: v for k, v in arrays.items() if "encoder_norm" not in k}, "norm.weight. is missing")
    refused({**arrays, "pre_logits/kernel": np.ones((12, 12), "f4")}, "pre_logits")
    refused({**arrays, "other/kernel": np.ones((12, 12), "f4")}, "other/kernel. has no place")
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(m2mkd_jax.UserError, match="cannot be read"):
        m2mkd_jax.load(tmp_path / "x.npz")
