"""A training step on any mesh is the step on one device, and a device holds what it should.

Axes of a mesh: D groups ('data') by E devices of a group ('expert'), written DxE.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import vmoe
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.mesh import make_mesh, put_batch, replicated, with_mesh
from m2mkd_jax.phases.nac_family import graph_regulariser
from m2mkd_jax.phases.program import Program
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.step import initial_state, make_step
from tests.random_params import random_params
from tests.support import NAC_SPEC, assert_trees_close

# Without a key bias: its gradient is zero but for rounding, which Adam would blow up to a step.
VIT = vit.ViTSpec(8, 4, 16, 2, 10, qkv_bias=False)
EXPERTS, STEPS = 8, 3
MESHES = {"8x1": 1, "4x2": 2, "2x4": 4, "1x8": 8}
# Whatever the mesh; then the dropless dispatch, which has ways of its own where experts are whole
# and where they are cut.
CASES = [("capacity", shape, fsdp) for shape in MESHES for fsdp in (False, True)]
CASES += [("dropless", "8x1", True), ("dropless", "2x4", False)]
RECIPE = SimpleNamespace(
    optimizer="adamw",
    lr=1e-4,
    min_lr=1e-5,
    warmup_lr=1e-6,
    epochs=10,
    warmup_epochs=0,
    schedule="clean",
    weight_decay=0.05,
    decay_rule="published",
    clip=1.0,
    accumulate=1,
    ema=0.0,
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.1,
)
KEY = jax.random.key(5)
DATA = SimpleNamespace(
    mean=(0.5,) * 3, std=(0.25,) * 3, classes=10, augment=SimpleNamespace(erase=0.0)
)


def batch_of(draw, size):
    return {
        "image": draw.integers(0, 255, (16, size, size, 3), np.uint8),
        "label": draw.integers(0, 10, (16,), np.int32),
    }


def train(dispatch, mesh, fsdp=False):
    """STEPS steps on the mesh: losses, the states after the first and the last, the program."""
    where = functools.partial(partition.shardings, mesh, fsdp=fsdp)
    # Two blocks with experts, in a loop, with slots for every token.
    spec = vmoe.VMoESpec(VIT, (0, 1), EXPERTS, dispatch=dispatch, capacity_factor=EXPERTS)
    stage = chain.abstract(lambda rngs: vmoe.build_stage(spec, 0, (2,), rngs=rngs))
    program = Program({"vmoe": stage.graph}, ("vmoe",), ("vmoe",), balance={"importance_loss": 0.1})
    params, fixed = {"vmoe": random_params(stage.params, seed=0)}, {"vmoe": {}}
    params = partition.put(params, where(params))
    optimizer = make_optimizer(RECIPE, 10, params)
    begin = lambda p, f: initial_state(p, f, optimizer, RECIPE)
    placement = where(jax.eval_shape(begin, params, fixed))
    state = jax.jit(begin, out_shardings=placement)(params, fixed)
    step = make_step(
        with_mesh(mesh, program.loss),
        optimizer,
        RECIPE,
        DATA,
        3,
        out_shardings=(placement, replicated(mesh)),
    )
    draw, losses, states, text = np.random.default_rng(0), [], [], ""
    for _ in range(STEPS):
        batch = put_batch(mesh, batch_of(draw, VIT.image_size))
        text = text or step.lower(state, {}, batch).compile().as_text()
        old, (state, metrics) = state, step(state, {}, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old["params"]))
        losses.append(float(metrics["loss"]))
        # Copies: a view of a buffer on the host keeps it from being reused.
        states.append(jax.tree.map(np.array, state))
    for leaf, home in zip(jax.tree.leaves(state), jax.tree.leaves(placement), strict=True):
        assert leaf.sharding.is_equivalent_to(home, leaf.ndim)
    return SimpleNamespace(losses=losses, first=states[0], last=states[-1], state=state, text=text)


@pytest.fixture(scope="module")
def one_device():
    """Without capacity: what every mesh and dispatch must equal."""
    return train("dropless", make_mesh(jax.devices()[:1]))


def assert_same(run, expected):
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-5)
    # After one step the first moment is a tenth of the clipped gradient.
    assert_trees_close(moments(run.first)[0], moments(expected.first)[0], 1e-5)
    assert int(run.last["step"]) == STEPS
    for part in ("params", "opt_state"):
        assert_trees_close(run.last[part], expected.last[part], 1e-5)


def moments(state):
    """Adam's two moments, wherever they are in the chain of transformations."""
    found = [
        s
        for s in jax.tree.leaves(state["opt_state"], is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    ]
    return found[0].mu, found[0].nu


def held(tree):
    """Bytes of a tree, and those that the first device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(a.nbytes for a in leaves), sum(a.addressable_shards[0].data.nbytes for a in leaves)


def experts_of(tree):
    """The leaves under 'experts'."""
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if "['experts']" in jax.tree_util.keystr(path)
    ]


@pytest.mark.parametrize(("dispatch", "shape", "fsdp"), CASES)
def test_vmoe_on_eight_devices(one_device, monkeypatch, dispatch, shape, fsdp):
    monkeypatch.setattr(partition, "LARGE", 64)
    mesh = make_mesh(expert=MESHES[shape])
    run = train(dispatch, mesh, fsdp)
    assert_same(run, one_device)
    # Slots to the experts and back, and their gradients. Else nothing moves but weights (gathered
    # with FSDP, and with it alone) and sums.
    assert len(re.findall(r" all-to-all\(", run.text)) == (4 if MESHES[shape] > 1 else 0)
    assert "collective-permute" not in run.text
    gathers = re.findall(r" all-gather\(", run.text)
    assert bool(gathers) == (fsdp and mesh.shape["data"] > 1)
    # Weights are gathered once more in the backward pass, not kept from the forward pass.
    again = re.search(r"all-gather\(.*transpose\(jvp\(\)\)/while", run.text)
    assert bool(again) == (fsdp and mesh.shape["data"] > 1)
    for tree in (run.state["params"], *moments(run.state)):
        experts = experts_of(tree)
        assert len(experts) == 4  # kernel and bias of two layers
        whole, mine = held(experts)
        assert mine * (8 if fsdp else MESHES[shape]) == whole
        for leaf in jax.tree.leaves(tree):
            if not any(leaf is expert for expert in experts):
                whole, mine = held(leaf)
                assert mine * (mesh.shape["data"] if fsdp and leaf.size >= 64 else 1) == whole


def test_fresh_weights_do_not_depend_on_the_mesh(monkeypatch):
    monkeypatch.setattr(partition, "LARGE", 64)
    build = lambda rngs: vit.ViTStage(VIT, 1, first=False, last=True, rngs=rngs)
    where = functools.partial(partition.shardings, make_mesh(), fsdp=True)
    whole, cut = (chain.initialise(build, KEY, place).params for place in (None, where))
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = cut["blocks"]["mlp"]["fc1"]["kernel"]  # (layers, in, out): the layers are never cut
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 16, 8)


def test_nac_on_eight_devices():
    spec = dataclasses.replace(NAC_SPEC, iterations=1, tokenizer_depths=(1, 1))
    stage = chain.abstract(lambda rngs: NAC(spec, rngs=rngs))
    regulariser = graph_regulariser("hinge", SimpleNamespace(weight=0.1, hinge=0.4))
    program = Program(
        {"nac": stage.graph},
        ("nac",),
        ("nac",),
        rates=((0.1,),),
        regulariser=lambda stages: regulariser(stages["nac"]),
    )
    params = {"nac": random_params(stage.params, seed=0)}
    host = batch_of(np.random.default_rng(0), NAC_SPEC.image_size)
    host = {"image": host["image"] / np.float32(255), "target": np.eye(10)[host["label"]]}
    results = []
    for mesh in (make_mesh(jax.devices()[:1]), make_mesh(expert=2)):
        loss = jax.jit(
            jax.value_and_grad(lambda p, b: program.loss(p, {"nac": {"fixed": {}}}, b, KEY)[0]),
            out_shardings=replicated(mesh),
        )
        placed = partition.put(params, partition.shardings(mesh, params, fsdp=False))
        results.append(jax.device_get(loss(placed, put_batch(mesh, host))))
    (one, one_grads), (eight, eight_grads) = results
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    # Zero but for rounding: it moves all confidences alike.
    skip = ("['nac']['pooling']['confidence']['bias']",)
    assert_trees_close(eight_grads, one_grads, 1e-4, skip)
