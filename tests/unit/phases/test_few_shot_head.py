"""Training a part of a stage, and the checks of the job 'fewshot'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.dry_run import dry_run
from m2mkd_jax.models import chain
from m2mkd_jax.models.vit import ViTStage
from m2mkd_jax.models.vit_spec import ViTSpec
from m2mkd_jax.phases.program import Program
from tests.shipped import change, digits, load


def test_parts_of_nested_dicts():
    tree = {"a": {"b": {"w": 1, "v": 2}, "c": 3}, "d": 4}
    assert chain.subtree(tree, ("a", "b")) == {"a": {"b": {"w": 1, "v": 2}}}
    assert chain.subtree(tree, ()) is tree
    changed = {"a": {"b": {"w": 5, "v": 6}}}
    assert chain.deep_update(tree, changed) == {"a": {"b": {"w": 5, "v": 6}, "c": 3}, "d": 4}
    assert chain.deep_update({}, changed) == changed and tree["a"]["b"]["w"] == 1


def test_the_gradient_of_a_head_alone_is_its_part_of_the_whole():
    stage = chain.initialise(
        lambda rngs: ViTStage(ViTSpec(8, 4, 8, 2, 3), 1, first=True, last=True, rngs=rngs),
        jax.random.key(0),
    )
    params = jax.tree.map(lambda x: x + 0.1, stage.params)  # no trivial values
    program = Program({"vit": stage.graph}, ("vit",), ("vit",))
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    batch = {"image": images, "target": jnp.eye(3)[jnp.array([0, 1, 2, 0])]}
    fixed = {"vit": {"fixed": stage.fixed}}
    frozen = {"vit": {"params": params, "fixed": stage.fixed}}

    def loss(trainable, frozen):
        return program.loss(trainable, frozen, batch, None)[0]

    both = jax.jit(jax.value_and_grad(loss))
    whole, grads = both({"vit": params}, fixed)
    part, its = both({"vit": chain.subtree(params, ("head",))}, frozen)
    assert its.keys() == {"vit"} and its["vit"].keys() == {"head"}
    np.testing.assert_allclose(part, whole, rtol=1e-6)
    for name in ("kernel", "bias"):
        assert abs(its["vit"]["head"][name]).max() > 1e-3
        np.testing.assert_allclose(
            its["vit"]["head"][name], grads["vit"]["head"][name], rtol=1e-5, atol=1e-7
        )


def few_shot_digits():
    config = digits()
    config.phases = ("e2e_scratch", "fewshot")
    config.few_shot.network = "e2e_scratch"
    data = config.few_shot.data
    data.name, data.classes, data.mean, data.std = "digits", 10, config.data.mean, config.data.std
    config.few_shot.ways, config.few_shot.shots = 5, 2
    recipe = config.recipes.fewshot
    recipe.epochs, recipe.batch = 10, 5
    return config


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("few_shot.ways", 11, "config.few_shot.ways is 11 of"),
        ("few_shot.selection", "publishd", 'did you mean "published"'),
        ("few_shot.network", "e2e_scrach", 'did you mean "e2e_scratch"'),
        ("few_shot.shots", 0, "0 shots and 20 episodes"),
        ("few_shot.data.image_size", 64, "the network takes 32"),
        ("few_shot.data.augment.rand_augment", "rand-x", "position 5"),
        ("recipes.fewshot.batch", 11, "10 support images"),
    ],
)
def test_episodes_that_cannot_run_are_refused(key, value, says):
    config = few_shot_digits()
    checks.check_config(config)
    change(key, value)(config)
    with pytest.raises(UserError) as error:
        checks.check_config(config)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_network_without_a_head_is_refused():
    config = few_shot_digits()
    config.nac.output, config.nac.state_dim = "first_slot", 10
    config.nac.code_dim = 10
    with pytest.raises(UserError, match='only "pooling" has a head'):
        checks.check_config(config)


def test_the_dry_run_counts_the_head_alone(tmp_path, capsys):
    dry_run(few_shot_digits(), tmp_path, "fewshot")
    lines = capsys.readouterr().out
    # A state of 64 to 5 classes, and a bias.
    assert f"{64 * 5 + 5:,} trained" in lines and "after: e2e_scratch" in lines


@pytest.mark.parametrize(("name", "optimizer"), [("nac_imnet", "sgd"), ("vmoe_imnet", "adamw")])
def test_the_published_few_shot_recipes_pass_the_checks(name, optimizer):
    config = load(name)
    config.phases = ("e2e", "fewshot")
    config.init.network = "somewhere"
    checks.check_config(config)
    assert config.recipes.fewshot.optimizer == optimizer
