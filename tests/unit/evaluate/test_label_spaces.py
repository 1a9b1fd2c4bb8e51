"""The classes of ImageNet-R and Tiny-ImageNet-R, and evaluation on them alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.data.class_lists import PARENTS, wordnet_ids
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.accuracy import evaluate, make_counter
from m2mkd_jax.evaluate.label_spaces import positions, restricted
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.plan import Plan, jobs_to_run, write_inputs
from tests.shipped import load

COUNTS = {"imagenet": 1000, "imagenet_r": 200, "tiny_imagenet": 200, "tiny_imagenet_r": 62}


@pytest.mark.parametrize("name", COUNTS)
def test_the_lists_are_whole_and_in_the_order_of_folders(name):
    ids = wordnet_ids(name)
    assert len(ids) == len(set(ids)) == COUNTS[name]
    assert list(ids) == sorted(ids)
    assert all(len(i) == 9 and i[0] == "n" and i[1:].isdigit() for i in ids)
    assert set(ids) <= set(wordnet_ids("imagenet"))


def test_tiny_renditions_are_the_classes_that_both_have():
    both = set(wordnet_ids("tiny_imagenet")) & set(wordnet_ids("imagenet_r"))
    assert set(wordnet_ids("tiny_imagenet_r")) == both


@pytest.mark.parametrize("name", PARENTS)
def test_positions_point_at_the_same_classes(name):
    parents = wordnet_ids(PARENTS[name])
    where = positions(name)
    assert [parents[place] for place in where] == list(wordnet_ids(name))
    # Known ones: the goldfish is ImageNet's class 1, the great white shark its class 2.
    assert name != "imagenet_r" or list(where[:2]) == [1, 2]
    shuffled = list(np.random.default_rng(0).permutation(parents))
    assert [shuffled[place] for place in positions(name, shuffled)] == list(wordnet_ids(name))


def test_a_network_without_the_classes_is_refused():
    with pytest.raises(UserError, match="lack 20 of its 62") as error:
        positions("tiny_imagenet_r", wordnet_ids("tiny_imagenet_r")[20:])
    assert "\n" not in str(error.value)


def test_only_the_sets_classes_compete():
    """A network that prefers class 0, which the set lacks, and then the right one."""
    where = positions("tiny_imagenet_r")
    assert 0 in where and 1 not in where  # the goldfish is in it, the next is not
    labels = np.array([0, 5, 61])
    outputs = np.zeros((3, 200), np.float32)
    outputs[:, 1] = 9
    outputs[np.arange(3), where[labels]] = 5
    outputs[2, where[3]] = 7  # the third is wrong also among its own

    def logits(trainable, frozen, images, key):
        return jnp.asarray(outputs)

    batch = {
        "image": np.zeros((3, 4, 4, 3), np.uint8),
        "label": labels,
        "mask": np.ones(3, np.float32),
    }
    for function, label, right in ((restricted(logits, where), labels, 2), (logits, labels, 0)):
        count = make_counter(function, (0.0,) * 3, (1.0,) * 3)
        found = evaluate(count, {}, {}, [{**batch, "label": label}], jax.random.key(0), 3)
        assert found["eval_accuracy"] == pytest.approx(right / 3)
        assert found["eval_images"] == 3


def test_sums_over_batches_leave_out_padding():
    """Two batches of three with one padded image; ranks 1, 4, 6 and 1, 5 of the right class."""
    scores = np.arange(7, 0, -1) / 2
    labels, mask = np.array([[0, 3, 5], [0, 4, 0]]), np.array([[1, 1, 1], [1, 1, 0]], np.float32)

    def logits(trainable, frozen, images, key):
        return jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (3, 7))

    images = np.zeros((3, 4, 4, 3), np.uint8)
    batches = [
        {"image": images, "label": label, "mask": m} for label, m in zip(labels, mask, strict=True)
    ]
    count = make_counter(logits, (0.0,) * 3, (1.0,) * 3)
    found = evaluate(count, {}, {}, batches, jax.random.key(0), images=5)
    p = np.exp(scores) / np.exp(scores).sum()
    right = p[[0, 3, 5, 0, 4]]
    brier = (1 - 2 * right + (p**2).sum()).mean()
    ece = abs(2 / 5 - p[0])  # all are equally sure of class 0
    loss = np.log(np.exp(scores).sum()) - scores[[0, 3, 5, 0, 4]].mean()
    assert found == {
        "eval_accuracy": pytest.approx(2 / 5),
        "eval_top5": pytest.approx(4 / 5),
        "eval_loss": pytest.approx(loss, rel=1e-5),
        "eval_brier": pytest.approx(brier, rel=1e-5),
        "eval_ece": pytest.approx(ece, rel=1e-5),
        "eval_images": 5,
    }
    # Of six images one is damaged, which is that of mask 0.
    with_damaged = evaluate(count, {}, {}, batches, jax.random.key(0), images=6)
    assert with_damaged == {**found, "eval_damaged": 1}


@pytest.mark.parametrize(
    ("name", "words"),
    [("imagenet_r", "needs a network of imagenet"), ("tiny_imagnet_r", "tiny_imagenet_r")],
)
def test_renditions_of_other_classes_are_refused_by_the_checks(name, words):
    config = load("nac_tinyimnet")
    config.evaluation.renditions = ("tiny_imagenet_r",)
    checks.check_config(config)
    config.evaluation.renditions = (name,)
    with pytest.raises(UserError, match=words):
        checks.check_config(config)


def test_renditions_asked_for_later_are_evaluated_later(tmp_path):
    config = load("nac_tinyimnet")
    config.phases = ("e2e_scratch", "eval")
    plan = Plan(config)
    for job, networks in (("e2e_scratch", {}), ("eval", {"e2e_scratch": {"eval_accuracy": 0.5}})):
        write_inputs(tmp_path, plan.job(job))
        (tmp_path / "jobs" / job / "done.json").write_text(
            json.dumps({"metrics": {}, "networks": networks})
        )
    assert jobs_to_run(plan, tmp_path) == []
    config.evaluation.renditions = ("tiny_imagenet_r",)
    assert jobs_to_run(Plan(config), tmp_path) == ["eval"]
