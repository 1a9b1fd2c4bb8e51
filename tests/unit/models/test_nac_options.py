"""Every option of a NAC: it runs compiled, its gradients are finite, and it acts as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.spec import NACSpec
from tests.support import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, assert_close, assert_trees_close
from tests.tiny_nac import (
    BATCH,
    RATES,
    SPEC,
    compiled,
    differ,
    evaluate,
    images,
    jit,
    network,
    params_of,
    parts,
    propagated,
    spec_with,
    with_leaf,
)

# Each option appears at least once; what each one does is tested below. The gradients of the
# published ones are those of the original in tests/parity.
COMBINATIONS = {
    "states_per_iteration": {
        "seeder": False,
        "codes_per_iteration": True,
        "share_ffn": True,
        "geglu": False,
        "modulation": "l2",
        "truncation_implementation": "masked",
    },
    "shared": {
        "share_propagators": True,
        "input_output": False,
        "qkv_bias": True,
        "pooling": "vanilla",
        "modulation": "sigmoid",
        "read_in_residual": False,
        "codes_per_iteration": True,
    },
    "first_slot": {
        "persistent_inputs": False,
        "output": "first_slot",
        "classes": SPEC.state_dim,
        "modulation": "tanh",
        "truncation": None,
        "stochastic_kernel": False,
        "remat": "always",
        "add_one": False,
        "code_noise": 0.0,
    },
}
# Nobody hears anybody but itself, then not even itself; in training they leak.
NOBODY_HEARD = {
    "itself_only": {"truncation": 1e-3, "stochastic_kernel": False},
    "nobody": {"truncation": -1.0, "stochastic_kernel": False, "modulation": "none"},
    "nobody_sampled": {"truncation": -1.0, "truncation_implementation": "masked"},
}


def assert_finite(gradients):
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_trains_with_finite_gradients(name):
    spec = spec_with(**COMBINATIONS[name])

    @jit
    def run(params, x, key):
        def loss(params):
            logits = network(spec, params)(x, rates=RATES, key=key, train=True)
            return jnp.square(logits).mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    grads, logits = run(params_of(spec), images(), jax.random.key(0))
    assert logits.shape == (BATCH, spec.classes) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert_finite(grads)


@pytest.mark.parametrize("name", NOBODY_HEARD)
def test_propagators_that_hear_nobody_have_finite_gradients(name):
    spec = spec_with(**NOBODY_HEARD[name])
    inputs = {k: params_of(spec)[k] for k in ("propagators", "mediator_latents", "input_latents")}

    @jit
    def run(some, key):
        def loss(some):
            net = network(spec, {**params_of(spec), **some})
            return jnp.square(net.propagate(*states(), RATES, key)).sum()

        return jax.grad(loss)(some)

    assert_finite(run(inputs, jax.random.key(0)))


def test_options_that_are_refused():
    with pytest.raises(UserError, match="first_slot"):
        spec_with(output="first_slot")
    with pytest.raises(UserError, match="modulation"):
        spec_with(modulation="batch_norm")
    with pytest.raises(UserError, match="leaves none"):
        spec_with(ffn_capacity=0.05)
    with pytest.raises(UserError, match="stride 8"):
        spec_with(image_size=20)


# Randomness


def test_evaluation_is_deterministic_without_key_and_sampled_with_one():
    assert (evaluate(SPEC) == evaluate(SPEC)).all()
    one, again = (evaluate(SPEC, key=jax.random.key(0)) for _ in range(2))
    assert (one == again).all()
    assert differ(evaluate(SPEC, key=jax.random.key(1)), one) and differ(one, evaluate(SPEC))


def test_training_noise_is_a_function_of_the_key():
    run = compiled(SPEC, RATES, train=True)
    one, again, other = (run(params_of(SPEC), images(), jax.random.key(k)) for k in (0, 0, 1))
    assert (one == again).all()
    assert differ(other, one)
    # More than what evaluation with the same key draws.
    assert differ(one, evaluate(SPEC, key=jax.random.key(0)))


def test_a_drop_path_rate_of_zero_is_none():
    key = jax.random.key(0)
    expected = propagated(SPEC, key=key)
    assert (propagated(SPEC, key=key, rates=(0.0, 0.0)) == expected).all()
    assert differ(propagated(SPEC, key=key, rates=(0.0, 0.9)), expected)


def test_each_training_noise_can_be_switched_off():
    quiet = {"stochastic_kernel": False, "code_noise": 0.0}
    still = propagated(SPEC)
    key = jax.random.key(0)
    assert (propagated(spec_with(**quiet), key=key) == still).all()
    for option in quiet:
        others = {k: v for k, v in quiet.items() if k != option}
        assert differ(propagated(spec_with(**others), key=key), still), option
    # Seeder and pooling are what evaluation draws: without both nothing is left.
    bare = spec_with(seeder=False, pooling="vanilla")
    assert (evaluate(bare, key=key) == evaluate(bare)).all()
    assert differ(evaluate(spec_with(seeder=False), key=key), evaluate(spec_with(seeder=False)))


# Latents


def test_without_seeder_the_states_are_parameters():
    spec = spec_with(seeder=False)
    assert "seeder" not in parts(spec).params
    seeded = params_of(SPEC)
    groups = ("input_latents", "mediator_latents", "output_latents")
    params = {name: value for name, value in seeded.items() if name != "seeder"}
    for group in groups:
        states = network(SPEC).seeder(seeded[group]["codes"], 1)[0]
        params[group] = {**seeded[group], "states": states}
    assert_close(evaluate(spec, params), evaluate(SPEC), OUTPUT_TOLERANCE)
    for group in groups:
        states = jnp.zeros_like(params[group]["states"])
        assert differ(
            evaluate(spec, with_leaf(params, f"{group}/states", states)), evaluate(SPEC)
        ), group


def test_codes_per_iteration():
    spec = spec_with(codes_per_iteration=True)
    shared = params_of(SPEC)
    codes = shared["mediator_latents"]["codes"]
    both = jnp.stack([codes, codes])
    assert parts(spec).params["mediator_latents"]["codes"].shape == both.shape
    equal = with_leaf(shared, "mediator_latents/codes", both)
    assert_close(evaluate(spec, equal), evaluate(SPEC), OUTPUT_TOLERANCE)
    # Each propagator takes its own iteration's codes.
    expected = propagated(spec, equal)
    for i in range(SPEC.iterations):
        other = with_leaf(shared, "mediator_latents/codes", both.at[i].set(-codes))
        assert differ(propagated(spec, other), expected), i
    # The seeder takes the first iteration's codes, the read-out the last one's.
    swapped = jnp.stack([codes, codes[::-1]])
    states = network(spec, with_leaf(shared, "mediator_latents/codes", swapped))
    assert (states.mediator_codes(0) == codes).all()
    assert (states.mediator_codes(-1) == codes[::-1]).all()


# Propagators


def test_shared_propagators():
    spec = spec_with(share_propagators=True)
    shared = params_of(spec)
    for leaf in jax.tree.leaves(shared["propagators"]):
        assert leaf.shape[0] == 1
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), shared["propagators"])
    equal = {**shared, "propagators": twice}
    assert_close(propagated(spec), propagated(SPEC, equal), OUTPUT_TOLERANCE)
    assert differ(propagated(spec), propagated(SPEC))


def test_a_shared_ffn():
    spec = spec_with(share_ffn=True)
    shared = params_of(spec)
    assert "ffn" not in shared["propagators"]
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), shared["shared_ffn"])
    equal = {k: v for k, v in shared.items() if k != "shared_ffn"}
    equal["propagators"] = {**shared["propagators"], "ffn": twice}
    assert_close(propagated(spec), propagated(SPEC, equal), OUTPUT_TOLERANCE)


def test_input_latents_heard_in_the_first_iteration_only():
    spec = spec_with(persistent_inputs=False)
    assert differ(propagated(spec), propagated(SPEC))
    once, still_once = spec_with(iterations=1), spec_with(iterations=1, persistent_inputs=False)
    assert_close(propagated(still_once), propagated(once), OUTPUT_TOLERANCE)
    # Yet what they said then goes on.
    silent = jnp.zeros((BATCH, SPEC.input_latents, SPEC.state_dim))
    assert differ(propagated(spec, inputs=silent), propagated(spec))


def test_the_loop_by_hand_equals_the_scan():
    assert_close(propagated(SPEC, trace=[]), propagated(SPEC), OUTPUT_TOLERANCE)
    key = jax.random.key(3)
    expected = propagated(SPEC, key=key, rates=RATES)
    actual = propagated(SPEC, key=key, rates=RATES, trace=[])
    assert_close(actual, expected, OUTPUT_TOLERANCE)


def states() -> list[jax.Array]:
    """Of input latents (B, 3, D) and mediators (B, 5, D)."""
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=(BATCH, n, SPEC.state_dim)), jnp.float32) for n in (3, 5)]


def test_rematerialised_propagators():
    params = {k: params_of(SPEC)[k] for k in ("propagators", "mediator_latents", "input_latents")}

    def run(spec):
        def loss(some):
            net = network(spec, {**params_of(SPEC), **some})
            return jnp.square(net.propagate(*states(), RATES, jax.random.key(0))).sum()

        return jit(jax.value_and_grad(loss))(params)

    (value, gradients), (same_value, same_gradients) = run(spec_with(remat="always")), run(SPEC)
    assert_close(value, same_value, OUTPUT_TOLERANCE)
    assert_trees_close(gradients, same_gradients, GRADIENT_TOLERANCE)


def hears_the_image(spec: NACSpec) -> bool:
    """Whether another image changes the logits at all."""
    return bool((evaluate(spec, x=images(1)) != evaluate(spec, x=images(0))).any())


def test_communication():
    """The image reaches the output through the mediators or directly from the input latents."""
    assert hears_the_image(SPEC)
    assert hears_the_image(spec_with(truncation=-1.0))
    assert hears_the_image(spec_with(input_output=False))
    # Mediators that hear nobody have nothing to tell.
    assert not hears_the_image(spec_with(truncation=-1.0, input_output=False))
