"""Properties that hold for any input that hypothesis finds: the same examples in every run."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import m2mkd_jax
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.config.defaults import all_keys
from m2mkd_jax.config.keys import flatten
from m2mkd_jax.config.values import check_value
from m2mkd_jax.conversion.names import as_tuple, vit_stage_names
from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.data.indices import BatchIndices, class_balanced_order
from m2mkd_jax.data.pipeline import local_share
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.accuracy import evaluate, make_counter
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import dispatch, vmoe
from m2mkd_jax.models.moe.router import TokenChoice
from tests.random_params import random_params
from tests.torch_arrays import arrays_from_torch, arrays_to_torch

FEW = settings(derandomize=True, max_examples=30, deadline=None, database=None)
KEYS = dict(flatten(all_keys()))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SCALARS | st.tuples(SCALARS) | st.tuples(SCALARS, SCALARS, SCALARS) | st.binary(max_size=2)


@settings(FEW, max_examples=300)
@given(st.sampled_from(sorted(KEYS)), VALUES)
def test_a_value_is_right_or_refused_in_one_line(name, value):
    key = KEYS[name]
    try:
        check_value(name, value, key)
    except UserError as error:
        assert f"config.{name}" in str(error) and "\n" not in str(error)
        return
    wanted = type(key.default)
    assert type(value) is wanted or (wanted is float and type(value) is int) or key.optional
    if key.range and value is not None and wanted in (int, float, str):
        assert key.range.allows(value)


TENSORS = {  # shape of a tensor of each layout
    "linear": (3, 2),
    "patches": (4, 3, 2, 2),
    "depthwise": (4, 1, 3, 3),
    "grid": (4, 2, 3),
    "same": (5,),
}


def shape_of(entry):
    if entry.layout == "expert":
        return (1, 3, 2) if entry.torch.endswith("weight") else (1, 3)
    return TENSORS[entry.layout]


def assert_both_ways(table):
    """No tensor and no place twice; and to our arrays and back is the identity."""
    assert len({entry.torch for entry in table}) == len(table)
    places = {(entry.path, as_tuple(entry.index)) for entry in table}
    assert len(places) == len(table)
    tensors = {
        entry.torch: np.random.default_rng(number).random(shape_of(entry))
        for number, entry in enumerate(table)
    }
    back = arrays_to_torch(table, arrays_from_torch(table, tensors), patch=2)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


@FEW
@given(st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 30))
def test_names_of_a_vit_lead_both_ways(depth, first, last, bias, offset):
    assert_both_ways(vit_stage_names(depth, first=first, last=last, qkv_bias=bias, offset=offset))


@FEW
@given(
    st.integers(1, 5),
    st.integers(0, 3),
    st.sets(st.integers(0, 7)),
    st.integers(2, 4),
    st.booleans(),
    st.booleans(),
)
def test_names_of_a_vmoe_lead_both_ways(depth, start, positions, experts, first, last):
    spec = vmoe.VMoESpec(vit.ViTSpec(16, 8, 6, 2, 5), tuple(sorted(positions)), experts)
    assert_both_ways(vmoe_stage_names(spec, start, depth, first=first, last=last, offset=start))


@FEW
@given(st.integers(1, 700), st.integers(1, 64), st.integers(0, 2**31), st.integers(1, 3), st.data())
def test_batches_are_a_function_of_seed_and_step(length, batch, seed, repeats, data):
    usable = length if repeats == 1 else length // 256 * 256
    if batch > usable:
        with pytest.raises(UserError):
            BatchIndices(length, batch, seed, repeats)
        return
    indices = BatchIndices(length, batch, seed, repeats)
    steps = indices.steps_per_epoch
    assert steps == usable // batch
    step = data.draw(st.integers(0, 3 * steps))
    first = step // steps * steps
    epoch = np.concatenate([indices[first + i] for i in range(steps)])
    assert epoch.min() >= 0 and epoch.max() < length
    assert max(collections.Counter(epoch.tolist()).values()) <= repeats
    again = BatchIndices(length, batch, seed, repeats)[step]  # without the steps before
    np.testing.assert_array_equal(again, indices[step])
    for processes in (n for n in (1, 2, 4, 8) if batch % n == 0):
        parts = [again[local_share(batch, i, processes)] for i in range(processes)]
        np.testing.assert_array_equal(np.concatenate(parts), again)


@FEW
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 100))
def test_prefixes_of_a_balanced_order_are_balanced(labels, seed):
    order = class_balanced_order(np.array(labels), seed)
    assert sorted(order) == list(range(len(labels)))
    total = collections.Counter(labels)
    for end in range(1, len(labels) + 1):
        counts = collections.Counter(labels[i] for i in order[:end])
        open_classes = [counts[c] for c in total if counts[c] < total[c]]
        assert not open_classes or max(counts.values()) - min(open_classes) <= 1


GROUPS, TOKENS, CHOICES, EXPERTS = 2, 6, 2, 3
fill_slots = jax.jit(dispatch.fill_slots, static_argnums=(1, 2))


@FEW
@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 3, TOKENS]))
def test_a_slot_holds_one_token_and_a_token_has_its_slots(seed, slots):
    draw = np.random.default_rng(seed)
    chosen = np.stack(
        [[draw.permutation(EXPERTS)[:CHOICES] for _ in range(TOKENS)] for _ in range(GROUPS)]
    )
    weights = jnp.asarray(draw.random(chosen.shape), jnp.float32)
    routing = TokenChoice(jnp.asarray(chosen), weights, None)
    source, slot = (np.asarray(a) for a in fill_slots(routing, EXPERTS, slots))
    none, dropped = TOKENS * CHOICES, EXPERTS * slots
    for g in range(GROUPS):
        held = source[g][source[g] < none]
        assert len(set(held)) == len(held)
        for assignment in range(none):
            expert = chosen[g].reshape(-1)[assignment]
            place = slot[g, assignment]
            if place < dropped:
                assert place // slots == expert and source[g, place] == assignment
            else:  # dropped only where its expert is full
                assert (source[g, expert * slots : (expert + 1) * slots] < none).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A V-MoE whose experts take half of the tokens, in training."""
    spec = vmoe.VMoESpec(
        vit.ViTSpec(16, 8, 12, 2, 5), (0,), 4, dispatch="capacity", capacity_factor=0.5
    )
    build = lambda rngs: vmoe.build_stage(spec, 0, (1,), rngs=rngs)
    params = random_params(chain.abstract(build).params, 0)
    description = {"kind": "vmoe", "spec": dataclasses.asdict(spec), "depths": [1], "module": 0}
    description["normalisation"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    path = tmp_path_factory.mktemp("weights") / "w"
    save_weights(path, {"vmoe_0": {"params": params}}, description)
    return m2mkd_jax.load(path)


def test_logits_of_an_image_do_not_depend_on_those_beside_it(model):
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    alone = model(np.repeat(image, 4, 0))[0]

    @FEW
    @given(st.integers(0, 2**31 - 1), st.integers(0, 3), st.floats(0, 50))
    def check(seed, place, scale):
        others = scale * np.random.default_rng(seed).normal(size=(4, 16, 16, 3))
        others[place] = image[0]
        np.testing.assert_allclose(model(others.astype(np.float32))[place], alone, atol=1e-5)

    check()


def test_padding_counts_for_nothing_in_an_evaluation():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32)
    count = make_counter(
        lambda _, frozen, images, key: images.reshape(len(images), -1) @ frozen["kernel"],
        (0.5,) * 3,
        (0.5,) * 3,
    )

    @FEW
    @given(st.integers(1, 12), st.integers(0, 2**31 - 1))
    def check(images, seed):
        draw = np.random.default_rng(seed)
        pixels = draw.integers(0, 256, (images, 2, 2, 3), np.uint8)
        labels, results = draw.integers(0, 5, images).astype(np.int32), []
        for filling in (0, 255):
            batches = []
            for start in range(0, images, 4):
                real = len(labels[start : start + 4])
                image = np.full((4, 2, 2, 3), filling, np.uint8)
                label, mask = np.zeros(4, np.int32), np.zeros(4, np.float32)
                image[:real], label[:real] = pixels[start:][:4], labels[start:][:4]
                mask[:real] = 1
                batches.append({"image": image, "label": label, "mask": mask})
            results.append(
                evaluate(count, {}, {"kernel": kernel}, batches, jax.random.key(0), images)
            )
        assert results[0] == results[1] and results[0]["eval_images"] == images
        logits = (pixels.reshape(images, -1) / 255 - 0.5) / 0.5 @ np.asarray(kernel, np.float64)
        assert results[0]["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())

    check()
