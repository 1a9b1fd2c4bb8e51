"""Alpha that changes over a job, and tokens of modules that are matched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import shape_checks
from m2mkd_jax.jobs.checks import check_config
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.setup import make_program
from m2mkd_jax.losses.distillation import linear_alpha
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.joint import JointProgram
from m2mkd_jax.phases.program import Program
from m2mkd_jax.train.step import initial_state, make_joint_step
from tests.e2e import tiny
from tests.support import assert_trees_close

CLASSES, WIDTH = 3, 4
WEIGHT = 0.25


class Linear(chain.Stage):
    """A matrix over the last axis; "first" makes tokens of the images' rows, "last" logits."""

    def __init__(self, kind: str, seed: int):
        self.depth, self.kind = 0, kind
        shape = (9 if kind == "first" else WIDTH, CLASSES if kind == "last" else WIDTH)
        self.matrix = nnx.Param(jax.random.normal(jax.random.key(seed), shape))

    def __call__(self, x, *, rates=None, key=None, train=False):
        if self.kind == "first":
            x = x.reshape(*x.shape[:2], -1)
        if self.kind == "last":
            x = x.mean(1)
        x = x @ self.matrix[...]
        return x if key is None else x + jax.random.normal(key, x.shape)


KINDS = ("first", "middle", "last")
BATCH = {
    "image": jax.random.normal(jax.random.key(9), (2, 3, 3, 3)),
    "target": jnp.eye(CLASSES)[:2],
    "step": jnp.asarray(2),
}


def toy(index, **changes):
    """The pair at a place of three stages: its program, trained stages and frozen ones."""
    names = [f"meta_{i}" for i in range(3)]
    stages = {
        name: Linear(kind, i) for i, (name, kind) in enumerate(zip(names, KINDS, strict=True))
    }
    ours, theirs = f"student_{index}", f"module_{index}"
    stages |= {ours: Linear(KINDS[index], 10 + index), theirs: Linear(KINDS[index], 20 + index)}
    split = {name: chain.split(stage) for name, stage in stages.items()}
    chains = [(*names[:index], own, *names[index + 1 :]) for own in (ours, theirs)]
    program = Program(
        {name: stage.graph for name, stage in split.items()},
        chains[0],
        (ours,),
        teacher=chains[1],
        kind="soft",
        **changes,
    )
    frozen = {n: {"params": s.params, "fixed": {}} for n, s in split.items() if n != ours}
    return program, {ours: split[ours].params}, frozen | {ours: {"fixed": {}}}


def tokens_of(names, trainable, frozen):
    """In numpy, the tokens that the first two stages of a chain give."""
    x = np.asarray(BATCH["image"]).reshape(2, 3, 9)
    for name in names[:2]:
        x = x @ np.asarray((trainable.get(name) or frozen[name]["params"])["matrix"])
    return x


def by_hand(ours, theirs):
    def normalised(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    return ((normalised(ours) - normalised(theirs)) ** 2).mean()


def test_the_tokens_of_a_student_are_matched_with_those_of_its_module():
    program, trainable, frozen = toy(1, token_weight=WEIGHT)
    without, *_ = toy(1)
    loss, metrics = jax.jit(program.loss)(trainable, frozen, BATCH, None)
    expected = by_hand(
        *(tokens_of(c, trainable, frozen) for c in (program.student, program.teacher))
    )
    np.testing.assert_allclose(metrics["token_loss"], expected, rtol=1e-5)
    plain, plain_metrics = jax.jit(without.loss)(trainable, frozen, BATCH, None)
    np.testing.assert_allclose(loss, plain + WEIGHT * expected, rtol=1e-6)
    assert "token_loss" not in plain_metrics
    same = {"student_1": frozen["module_1"]["params"]}
    assert jax.jit(program.loss)(same, frozen, BATCH, None)[1]["token_loss"] == 0


def test_its_gradient_reaches_the_student_alone():
    program, trainable, frozen = toy(1, token_weight=1.0)

    def token_loss(trainable, frozen):
        return program.loss(trainable, frozen, BATCH, None)[1]["token_loss"]

    ours, theirs = jax.jit(jax.grad(token_loss, argnums=(0, 1)))(trainable, frozen)
    assert np.abs(ours["student_1"]["matrix"]).min() > 0
    assert not np.any(theirs["module_1"]["params"]["matrix"])


def test_joint_pairs_have_the_losses_that_they_have_alone():
    programs, trainable, frozen, alone = {}, {}, {}, {}
    key = jax.random.key(3)
    for i in range(3):
        alpha = dict(first=1.0, last=0.0, updates=3 + 2 * i, accumulate=1)
        program, own, still = toy(
            i, token_weight=WEIGHT, alpha=lambda step, alpha=alpha: linear_alpha(step, **alpha)
        )
        alone[f"m2mkd/{i}"] = jax.jit(program.loss)(own, still, BATCH, key)[1]
        programs[f"m2mkd/{i}"], trainable[f"m2mkd/{i}"] = program, own
        frozen |= still
    total, metrics = jax.jit(JointProgram(programs).loss)(trainable, frozen, BATCH, key)
    assert_trees_close(metrics, alone, 1e-5)
    np.testing.assert_allclose(total, sum(own["loss"] for own in alone.values()), rtol=1e-5)
    assert ["token_loss" in own for own in metrics.values()] == [True, True, False]
    np.testing.assert_allclose([own["alpha"] for own in metrics.values()], [0, 1 / 2, 2 / 3])


def test_alpha_counts_the_steps_that_a_job_itself_has_skipped():
    recipe = ConfigDict(
        {"ema": 0.0, "accumulate": 1, "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    )
    optimizer, programs, states, frozen = optax.sgd(0.1), {}, {}, {}
    for i, skipped in enumerate((0, 3, 1)):
        alpha = functools.partial(linear_alpha, first=1.0, last=0.0, updates=5, accumulate=1)
        programs[f"m2mkd/{i}"], own, still = toy(i, alpha=alpha)
        state = initial_state(own, {}, optimizer, recipe)
        states[f"m2mkd/{i}"] = state | {"step": jnp.int32(4), "skipped": jnp.int32(skipped)}
        frozen |= still
    data = ConfigDict({"mean": (0.5,) * 3, "std": (0.5,) * 3, "classes": CLASSES})
    data.augment = {"erase": 0.0}
    step = make_joint_step(
        JointProgram(programs).loss, dict.fromkeys(programs, (optimizer, recipe)), data, seed=0
    )
    batch = {"image": np.zeros((2, 3, 3, 3), np.uint8), "label": np.arange(2)}
    _, metrics = step(states, frozen, batch)
    np.testing.assert_allclose([own["alpha"] for own in metrics.values()], [0, 3 / 4, 1 / 4])


@pytest.mark.parametrize(("first", "last"), [(1.0, 0.0), (0.2, 0.8)])
def test_alpha_of_the_first_the_middle_and_the_last_update(first, last):
    config = tiny.get_config()
    config.distillation.alpha, config.distillation.alpha_end = first, last
    # 3 epochs of 7 updates, of 2 steps each.
    program = make_program(config, build_phase(config, "m2mkd/1"), updates_per_epoch=7)
    steps, expected = (0, 1, 20, 21, 40, 41), (first,) * 2 + ((first + last) / 2,) * 2 + (last,) * 2
    np.testing.assert_allclose([program.alpha(step) for step in steps], expected, rtol=1e-6)
    kd = make_program(config, build_phase(config, "e2e_kd"), updates_per_epoch=7)
    np.testing.assert_allclose([kd.alpha(0), kd.alpha(27)], [first, last], atol=1e-6)


def test_alpha_depends_on_the_step_of_the_state_alone():
    """So that a resumed job goes on as if it had not been interrupted."""
    program, trainable, frozen = toy(
        1, alpha=lambda step: linear_alpha(step, first=1.0, last=0.0, updates=5, accumulate=1)
    )
    recipe = ConfigDict(dict(ema=0.0, accumulate=1, freeze=(), train_only=()))
    optimizer, joint = optax.sgd(0.0), JointProgram({"m2mkd/1": program})
    # Noise would hide what is compared.
    silent = lambda *arguments: joint.loss(*arguments[:3], None)
    step = make_joint_step(silent, {"m2mkd/1": (optimizer, recipe)}, None, 0)
    copy = jax.tree.map(jnp.copy, trainable)  # the step takes its buffers
    state = initial_state(copy, {"student_1": {}}, optimizer, recipe)
    state["step"] = jnp.asarray(3, jnp.int32)
    batch = {name: BATCH[name] for name in ("image", "target")}
    _, metrics = step({"m2mkd/1": state}, frozen, batch)
    own = metrics["m2mkd/1"]
    assert own["alpha"] == 0.25
    # The same with alpha as a number.
    constant, *_ = toy(1, alpha=0.25)
    expected, _ = jax.jit(constant.loss)(trainable, frozen, batch, None)
    np.testing.assert_allclose(own["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("alpha_end", [-1.0, 0.5])
def test_both_are_off_by_default(alpha_end):
    config = tiny.get_config()
    config.distillation.alpha_end = alpha_end
    for job in ("m2mkd/0", "m2mkd/1", "e2e_kd"):
        phase = build_phase(config, job)
        program = make_program(config, phase)
        assert program.alpha == 0.5 and not program.matches_tokens
        assert set(phase.depends_on["distillation"]) == {"kind", "alpha", "temperature"}


def test_what_a_result_depends_on_and_where_tokens_are_matched():
    config = tiny.get_config()
    config.distillation.token_weight, config.distillation.alpha_end = 2.0, 0.0
    matched = {}
    for job in ("m2mkd/0", "m2mkd/1", "m2mkd/2", "e2e_kd"):
        phase = build_phase(config, job)
        assert phase.depends_on["distillation"]["alpha_end"] == 0.0
        program = make_program(config, phase)
        matched[job] = program.matches_tokens
        assert bool(program.token_weight) is (job != "e2e_kd")
        assert ("token_weight" in phase.depends_on["distillation"]) is matched[job]
    assert list(matched.values()) == [True, True, False, False]


REFUSED = [
    ({"token_weight": 1.0, "kind": "none"}, "token_weight is 1.0, and with .* no teacher"),
    ({"alpha_end": 1.0, "kind": "none"}, "alpha_end is 1.0, and with .* no teacher"),
    ({"token_weight": 1.0, "views": 2}, "not among the kept targets"),
    ({"alpha_end": -0.5}, "from 0 to 1, or -1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_done_is_refused(changes, message):
    config = tiny.get_config()
    config.distillation.update(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_matched_tokens_need_a_student_that_gives_them(monkeypatch):
    config = tiny.get_config()
    config.distillation.token_weight = 1.0
    plan = Plan(config)
    # A NAC's read-in gives one token, and its read-out logits.
    phases = [plan.job(f"m2mkd/{i}").phase for i in range(3)]
    assert [shape_checks._gives_tokens_of_teacher(p) for p in phases] == [False, True, False]
    shape_checks._check_matched_tokens(plan)
    monkeypatch.setattr(shape_checks, "_gives_tokens_of_teacher", lambda phase: False)
    with pytest.raises(UserError, match="no student gives tokens of the shape"):
        shape_checks._check_matched_tokens(plan)
