"""A function from images to logits as the teacher of e2e_kd."""

import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.setup import fresh_setup
from tests.e2e.tiny_vmoe import get_config

CLASSES = 10


def bright(images):
    assert not isinstance(images, np.ndarray)
    return images.mean(axis=(1, 2, 3))[:, None] + jnp.arange(CLASSES, dtype=jnp.float32)[None]


def on_host(images):
    assert isinstance(images, np.ndarray)
    return images.mean(axis=(1, 2, 3))[:, None] + np.arange(CLASSES, dtype=np.float32)


def too_few(images):
    return jnp.zeros((images.shape[0], 3))


NO_FUNCTION = 7
MODULES = ("first", "middle", "last")


def first(images):
    """Tokens (B, 5, 16) of images of 16 x 16 pixels, in patches of 8."""
    means = images.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4, 5)).reshape(-1, 4)
    return (
        jnp.pad(means, ((0, 0), (1, 0)))[..., None] * jnp.arange(16, dtype=jnp.float32)[None, None]
    )


def middle(tokens):
    return np.tanh(tokens) if isinstance(tokens, np.ndarray) else jnp.tanh(tokens)


def last(tokens):
    return tokens.mean(1)[:, :CLASSES]


def config_of(name: str, **options):
    config = get_config()
    config.phases = ("e2e_kd", "eval")
    config.vmoe.keep_stitches, config.recipes.m2mkd.modules = False, {}
    config.teacher.family = "m2mkd_jax.phases.function_teacher:FunctionTeacher"
    with config.teacher.options.unlocked():
        config.teacher.options.function = f"tests.unit.phases.test_function_teacher:{name}"
        config.teacher.options.update(options)
    return config


@pytest.mark.parametrize(("name", "options"), [("bright", {}), ("on_host", {"callback": True})])
def test_its_logits_are_the_teachers(name, options):
    config = config_of(name, **options)
    checks.validate(config)
    program = fresh_setup(config, "e2e_kd").program
    assert program.teacher == ("module_0",)
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    stage = program.stage("module_0", {}, {"module_0": {"params": {}, "fixed": {}}})
    expected = images.mean((1, 2, 3))[:, None] + np.arange(CLASSES)
    np.testing.assert_allclose(stage(jnp.asarray(images)), expected, rtol=1e-5, atol=1e-5)


def modules_of(*names: str, **options):
    config = config_of("bright")
    config.phases = ("pt", "m2mkd", "e2e", "eval")
    config.teacher.family = "m2mkd_jax.phases.function_teacher:FunctionModules"
    with config.teacher.options.unlocked():
        del config.teacher.options.function
        functions = tuple(f"tests.unit.phases.test_function_teacher:{name}" for name in names)
        config.teacher.options.update({"functions": functions, **options})
    return config


@pytest.mark.parametrize("options", [{}, {"callback": True}])
def test_functions_stand_between_modules_of_the_meta_model(options):
    config = modules_of(*MODULES, **options)
    if not options:
        checks.validate(config)  # every chain fits, and the students' network
    setup = fresh_setup(config, "m2mkd/1")
    program, frozen = setup.program, setup.frozen
    assert not any(name.startswith("mt") or name == "ft" for name in Plan(config).names)
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    given = program.run(program.teacher, {}, frozen, jnp.asarray(images))
    single = setup.joined.single
    assert single.teacher == ("meta_0", "module_1", "meta_2")
    stages = setup.joined.single_stages(frozen)
    x = single.run(("meta_0",), {}, stages, jnp.asarray(images))
    expected = single.run(("meta_2",), {}, stages, jnp.tanh(x))
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_what_is_refused():
    def refused(config, words: str) -> None:
        with pytest.raises(UserError, match=words):
            checks.validate(config)

    refused(config_of("missing"), "has no class .missing.")
    refused(config_of("NO_FUNCTION"), "is no function")
    refused(config_of("bright", other=1), "unknown other")
    config = config_of("bright")
    config.phases = ("m2mkd", "e2e")
    refused(config, 'm2mkd" needs a teacher in modules')
    refused(modules_of("first"), "give two or more")
    refused(modules_of("first", "last"), "names 2 modules; the student needs 3")
    refused(modules_of("first", "last", "middle"), r"last returned .* where tokens \(16, 5, 16\)")
    config = modules_of(*MODULES)
    config.phases = ("pt", "mt", "ft", "m2mkd")
    refused(config, 'mt" trains the teacher.s modules')
    with pytest.raises(UserError, match=r"array of shape \(3, 3\)"):
        setup = fresh_setup(config_of("too_few"), "e2e_kd")
        stage = setup.program.stage("module_0", {}, {"module_0": {"params": {}, "fixed": {}}})
        stage(jnp.zeros((3, 16, 16, 3)))
