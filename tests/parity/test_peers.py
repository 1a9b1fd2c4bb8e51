"""The PyTorch programs that benchmarks/speed.py times compute what ours do, at tiny sizes.

Logits, loss and gradients without noise, from parameters in which nothing is trivial; and a
training step with its noise moves every trained parameter. timm's blocks are not tested: see
benchmarks/peers/vit.py.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.cases import Case, make_config
from benchmarks.peers.export import check_inputs, export, in_torch_layout, stage_tables
from benchmarks.peers.job import Job
from m2mkd_jax.jobs.setup import abstract_stages, set_up
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.train.step import with_fixed
from tests.random_params import random_params
from tests.support import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, assert_close

BATCH = 4
# The gradient of a scalar gain is a sum over all entries of a layer that cancel: float32 has fewer
# digits of it.
SCALAR_TOLERANCE = 1e-3
JOBS = [
    ("nac_digits", "e2e_scratch"),
    ("nac_digits", "m2mkd/0"),
    ("nac_digits", "m2mkd/1"),
    ("nac_digits", "m2mkd/3"),
    ("vmoe_digits", "e2e_scratch"),
    ("vmoe_digits", "m2mkd/1"),
    ("vmoe_digits", "mt/0"),
]
# Tiny arrays: all the time is compilation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch's threads spin while they wait, which costs whoever else runs more than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(name, job):
    config = make_config(Case(name, "", job, BATCH, BATCH), BATCH)
    config.teacher.width, config.teacher.heads = 16, 2
    config.teacher.depths = (2, 1, 1, 1)
    config.data.image_size, config.teacher.patch = 16, 8
    for recipe in config.recipes.values():
        recipe.mixup, recipe.cutmix, recipe.drop_path, recipe.clip = 0.8, 1.0, 0.2, 1.0
    config.data.augment.erase = 0.5
    config.distillation.token_weight = 0.0  # the published loss
    if name == "nac_digits":
        nac = config.nac
        nac.prior, nac.options = "none", {}
        nac.state_dim = nac.code_dim = 12
        nac.head_dim, nac.position_dim, nac.iterations = 5, 4, 2
        nac.input_latents, nac.mediator_latents, nac.output_latents = 3, 6, 2
    else:
        config.vmoe.width, config.vmoe.heads = 12, 2
        config.vmoe.depths, config.vmoe.experts = (1, 2, 1, 1), 3
    return config


def tiny_setup(config, job):
    phase = build_phase(config, job)
    shapes = abstract_stages(phase)
    stages = {
        name: {part: random_params(tree, seed=i) for part, tree in shapes[name].items()}
        for i, name in enumerate(shapes)
    }
    return set_up(config, phase, stages)


def run_ours(setup, inputs):
    """Logits and loss without noise, and gradients by the peer's names, of one compiled program."""

    @jit
    def run(params, frozen, images, target):
        batch = {"image": images, "target": target}
        gradient = jax.value_and_grad(setup.program.loss, has_aux=True)
        (loss, _), gradients = gradient(params, frozen, batch, None)
        return {
            "logits": setup.program.logits(params, frozen, images),
            "loss": loss,
        }, setup.joined.split(gradients)

    given = [jnp.asarray(inputs[name]) for name in ("images", "target")]
    answers, found = run(setup.params, with_fixed(setup.frozen, setup.fixed), *given)
    tables = stage_tables(setup)
    return answers, {
        key: value
        for name, tree in found.items()
        for key, value in in_torch_layout(name, *tables[name], tree).items()
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(config's name, job) -> the directory with the job's files, inputs and our gradients."""

    @functools.cache
    def make(name, job):
        config, directory = tiny_config(name, job), tmp_path_factory.mktemp("job")
        setup = tiny_setup(config, job)
        inputs = check_inputs(setup)
        answers, gradients = run_ours(setup, inputs)
        known = inputs | {key: np.asarray(value) for key, value in answers.items()}
        export(directory, setup, config, BATCH, predict=False, known=known)
        return directory, inputs, gradients

    return make


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_peers_equal_ours(exported, name, job):
    directory, inputs, expected = exported(name, job)
    peer = Job(directory)
    found = peer.check()
    assert max(found["logits"], found["loss"]) < OUTPUT_TOLERANCE
    images = torch.from_numpy(inputs["images"]).permute(0, 3, 1, 2)
    peer.loss(images, torch.from_numpy(inputs["target"]), train=False).backward()
    assert expected.keys() == peer.trained.keys()
    for key, parameter in peer.trained.items():
        value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # Gradients that cancel, as that of the confidence's bias, are rounding errors.
        if np.abs(expected[key]).max() > 1e-7 or float(value.abs().max()) > 1e-7:
            tolerance = GRADIENT_TOLERANCE if value.ndim else SCALAR_TOLERANCE
            assert_close(value, expected[key], tolerance, key)
    torch.manual_seed(0)
    random.seed(0)
    peer.prepare(compiled=False)
    before = {key: parameter.detach().clone() for key, parameter in peer.trained.items()}
    peer.optimizer.zero_grad()
    peer.steps(2)
    assert all(torch.isfinite(parameter).all() for parameter in peer.trained.values())
    moved = {key for key, value in before.items() if not torch.equal(value, peer.trained[key])}
    # Under drop-path and mixed images an expert of so few tokens may get none.
    learns = {key for key in before if np.abs(expected[key]).max() > 1e-7}
    assert {key for key in learns if ".experts." not in key} <= moved


def test_the_literal_read_in_is_equal_too(exported):
    found = Job(exported("nac_digits", "m2mkd/0")[0], literal=True).check()
    assert found["logits"] < OUTPUT_TOLERANCE


def test_another_network_is_not_timed(exported):
    peer = Job(exported("vmoe_digits", "mt/0")[0])
    with torch.no_grad():
        peer.stages["module_0"].blocks[0].attn.proj.weight[0] += 1e-2
    with pytest.raises(RuntimeError, match="not equal to ours"):
        peer.check()
