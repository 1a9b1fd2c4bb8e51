"""Programs are traced for the platform that is named, whatever device is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.models import attention
from m2mkd_jax.parallel import backend
from tests.support import assert_close


def test_the_default_is_the_device():
    assert backend.platform() == jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    ("platform", "capability", "fits"),
    [("gpu", "9.0", True), ("gpu", "7.5", False), ("gpu", "gfx942", False), ("tpu", "", False)],
)
def test_layers_take_the_named_platform(platform, capability, fits):
    half = jnp.zeros((1, 64, 1, 8), jnp.bfloat16)
    with backend.tracing_for(platform, capability):
        assert backend.platform() == platform
        assert attention.fits_cudnn(half, half) == fits
    assert not attention.fits_cudnn(half, half)
    assert backend.platform() == "cpu"


def test_a_function_compiled_with_options_can_be_called_inside_another(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    double = backend.jit(lambda x: 2 * x)
    assert isinstance(double, backend.CompiledFunction)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(double(x), 2 * x)
    np.testing.assert_array_equal(jax.jit(lambda x: double(x) + 1)(x), 2 * x + 1)
    np.testing.assert_array_equal(double.lower(x).compile()(x), 2 * x)
    assert jax.eval_shape(double, x).shape == (3,)
    assert jax.grad(lambda x: double(x).sum())(x).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("transform", [jax.grad, jax.vmap, jax.checkpoint])
def test_a_transformed_function_compiles_as_itself(transform):
    inner = backend.jit(lambda x: 2 * jnp.sin(x))
    x = jnp.float32(1.0) if transform is jax.grad else jnp.ones(3)
    expected = transform(lambda x: 2 * jnp.sin(x))(x)
    assert_close(backend.jit(transform(inner))(x), expected, 1e-6)


def test_options_that_the_compiler_does_not_know_are_told_apart():
    assert backend.is_option("xla_cpu_use_fusion_emitters", False)
    assert not backend.is_option("xla_cpu_use_no_such_thing", False)
    assert not backend.is_option("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_NO_SUCH_THING")


def branches(arguments):
    x, key = arguments["x"], arguments["key"]
    wide = [jnp.sort(jnp.tanh(x + i), 1) for i in range(8)]  # which may all be there at once
    return sum(a.sum(0) for a in wide) + jax.random.normal(key, x.shape[:1])


X = np.linspace(-1, 1, 256 * 256, dtype=np.float32).reshape(256, 256)


def planned(function, arguments):
    return function.lower(arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("flag", ["", "--xla_backend_optimization_level=1"])
def test_a_program_with_large_arguments_plans_for_less_memory(monkeypatch, abstract, flag):
    monkeypatch.setenv("XLA_FLAGS", flag)
    arguments = {"x": X, "key": jax.random.key(0), "steps": 3}
    given = jax.eval_shape(lambda a: a, arguments) if abstract else arguments
    small = backend.jit(branches)
    small_plan = planned(small, given)
    monkeypatch.setattr(backend, "LARGE", X.nbytes)
    large = backend.jit(branches)
    assert planned(large, given) <= small_plan / 2
    assert_close(large(arguments), small(arguments), 1e-6)
    assert_close(jax.jit(lambda a: large(a) * 2)(arguments), 2 * small(arguments), 1e-6)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT")
    assert planned(backend.jit(branches), given) == small_plan


def test_a_level_of_optimisation_in_the_environment_stays(monkeypatch, tmp_path):
    levels = []
    file = tmp_path / "flags"
    file.write_text("--xla_backend_optimization_level=2\n")
    monkeypatch.setattr(
        backend, "CompiledFunction", lambda _, options, **__: levels.append(options)
    )
    for flags in ("", "--xla_backend_optimization_level=3", str(file), str(tmp_path / "none")):
        monkeypatch.setenv("XLA_FLAGS", flags)
        backend.jit(lambda x: x)
    ours = {"xla_backend_optimization_level": 1}
    assert levels == [ours, {}, {}, ours]


def test_a_gpu_program_goes_without_kernels_that_take_long_to_generate(monkeypatch):
    found = []
    monkeypatch.setattr(backend, "CompiledFunction", lambda _, options, **__: found.append(options))
    for flags in ("", "--xla_gpu_enable_triton_gemm=true"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        with backend.tracing_for("gpu", "9.0"):
            backend.jit(lambda x: x)
    softmax = {"xla_disable_hlo_passes": "triton-softmax-rewriter"}
    assert found == [softmax | {"xla_gpu_enable_triton_gemm": False}, softmax]


def test_other_arguments_than_arrays_have_no_size(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    class Static:
        dtype = "float32"

    for static in (Static(), jnp.dtype("int32"), np.float32, jax.make_mesh((1,), ("a",))):
        scaled = backend.jit(lambda _, x, y: x * y, static_argnums=0)
        assert scaled(static, 2, np.float32(3)) == 6


def test_an_unknown_size_is_no_large_one(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    doubled = backend.jit(lambda x: 2 * x)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3"), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: doubled(x) + 1))(shape)
    np.testing.assert_array_equal(exported.call(jnp.ones((5, 3))), np.full((5, 3), 3.0))


def test_a_program_that_runs_once_gives_the_same_numbers(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def draw(key):
        return jax.nn.initializers.truncated_normal(0.02)(key, (64, 48))

    key = jax.random.key(3)
    assert_close(backend.jit(draw, once=True)(key), backend.jit(draw)(key), 1e-6)
