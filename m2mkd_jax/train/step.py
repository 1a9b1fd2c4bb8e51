"""One optimizer step, for every phase.

Axes: B batch, H height, W width, K classes.

The training state is a plain dict: "step" (int32 scalar), "skipped" (int32 scalar, how many of the
steps changed nothing else), "params" {stage: params}, "opt_state", "fixed" {stage: random arrays,
drawn once and saved} and, if a moving average of the weights is kept, "ema" like "params".

A step whose loss or gradient is not finite changes nothing but the two counts; `Loop` decides how
many of them a job survives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m2mkd_jax.parallel import backend
from m2mkd_jax.parallel.gradient_buffers import GradientBuffers, by_name, writing_into
from m2mkd_jax.train.batch import prepared
from m2mkd_jax.train.optimizer import ema_update, global_norm
from m2mkd_jax.train.trained_parts import without_frozen

# parameters -> a context in which a loss is traced: what its gradients are written into.
Into = Callable[[Any], contextlib.AbstractContextManager]


def _anywhere(params: Any) -> contextlib.AbstractContextManager:
    del params
    return contextlib.nullcontext()


def initial_state(
    params: dict, fixed: dict, optimizer: optax.GradientTransformation, recipe: Any
) -> dict:
    """The training state before the first step.

    Args:
        params: {stage: trainable parameters}.
        fixed: {stage: random arrays drawn once}.
        optimizer: of train/optimizer.py.
        recipe: with ema > 0 the state has a moving average of the weights.
    """
    state = {
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
        "fixed": fixed,
    }
    if recipe.ema:
        # A copy: a buffer that appears twice in the state cannot be donated.
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    recipe: Any,
    data: Any,
    seed: int,
    out_shardings: Any = None,
    apart: bool = False,
) -> Step:
    """The compiled training step; it donates the old state's buffers.

    Args:
        loss: (trainable, frozen, batch, key) -> (scalar, metrics).
        optimizer: of train/optimizer.py.
        recipe: the fields of train/mixing.py, ema and accumulate.
        data: mean, std, classes and augment.erase.
        seed: of all randomness; a step's key depends on it and the step number alone.
        out_shardings: (of the state, of the metrics); the new state needs the old one's shardings,
            or its buffers cannot be reused. None: the compiler's choice.
        apart: gradient and update are two programs, see `StepInTwo`; with the same results.

    Returns:
        (state, frozen, batch) -> (state, metrics); the batch has "image" uint8 (B, H, W, C) and
        "label" int32 (B,).
    """

    def joint_loss(
        trainable: dict, frozen: dict, batch: dict, key: jax.Array
    ) -> tuple[jax.Array, dict]:
        value, metrics = loss(trainable[""], frozen, {**batch, "step": batch["step/"]}, key)
        return value, {"": metrics}

    joint_gradient, joint_update = _parts(joint_loss, {"": (optimizer, recipe)}, data)

    def gradient(state: dict, *arguments: Any, into: Into = _anywhere) -> tuple[dict, dict]:
        own = lambda params: into(params[""])
        grads, metrics = joint_gradient({"": state}, *arguments, into=own)
        return grads[""], metrics[""]

    def update(state: dict, grads: dict, metrics: dict) -> tuple[dict, dict]:
        states, metrics = joint_update({"": state}, {"": grads}, {"": metrics})
        return states[""], metrics[""]

    kind = StepInTwo if apart else Step
    return kind(gradient, update, lambda state: state["params"], seed, out_shardings)


def make_joint_step(
    loss: Callable,
    jobs: Mapping[str, tuple[optax.GradientTransformation, Any]],
    data: Any,
    seed: int,
    out_shardings: Any = None,
    apart: bool = False,
) -> Step:
    """`make_step` for jobs that train on the same batches, each with a state of its own.

    Args:
        loss: (trainable, frozen, batch, key) -> (scalar, metrics), `trainable` and `metrics` by
            job; the scalar is the sum of the jobs' losses, so that each job's gradient is its own.
            Of a job's step from 0, without those that it skipped, the batch has "step/JOB".
        jobs: name -> optimizer and recipe. The states are after the same number of steps, and the
            recipes mix alike.
        data, seed, out_shardings, apart: as for `make_step`; the shardings by job.

    Returns:
        (states, frozen, batch) -> (states, metrics), both by job. A batch may have more entries,
        which go to the loss as they are, and no images if the loss needs none.
    """

    def params(states: dict) -> dict:
        return {job: state["params"] for job, state in states.items()}

    kind = StepInTwo if apart else Step
    return kind(*_parts(loss, jobs, data), params, seed, out_shardings)


class Programs(NamedTuple):
    """The programs of a step: traced, and as they will be once they are compiled."""

    traced: list[jax.stages.Traced]
    compiled: list[Future[jax.stages.Compiled]]


class Step:
    """A compiled step with its seed: (state, frozen, batch) -> (state, metrics).

    The seed's key is an argument of the program: jobs that differ in nothing else find the same one
    in the cache of compiled programs. So are the arrays that its largest gradients are written into
    on a CPU (parallel/gradient_buffers.py), which it keeps from call to call.

    Args:
        gradient: (state, frozen, batch, data of a key, into) -> (gradient, metrics); `into` of the
            parameters is a context in which the loss is traced.
        update: (state, gradient, metrics) -> (state, metrics).
        params: of a state, or of its shardings.
        seed: of all randomness.
        out_shardings: as for `make_step`.
    """

    def __init__(
        self, gradient: Callable, update: Callable, params: Callable, seed: int, out_shardings: Any
    ):
        self._params, self._traced = params, False
        self.buffers = kept_buffers = GradientBuffers()

        def step(state: dict, buffers: dict, *arguments: Any) -> tuple[dict, dict, dict]:
            used: set[str] = set()

            def into(params: Any) -> contextlib.AbstractContextManager:
                return writing_into(by_name(params), buffers, used)

            grads, metrics = gradient(state, *arguments, into=into)
            if buffers:
                kept_buffers.used = used
            kept = {name: grad for name, grad in by_name(grads).items() if name in used}
            return *update(state, grads, metrics), kept

        places = None if out_shardings is None else (*out_shardings, None)
        self._whole = backend.jit(step, donate_argnums=(0, 1), out_shardings=places)
        self._key = np.asarray(jax.random.key_data(jax.random.key(seed)))

    def __call__(self, state: dict, *arguments: Any) -> tuple[dict, dict]:
        # Inside another program. Of a state one array tells: walking it takes half a millisecond.
        some = [jax.tree.leaves(state)[0], *jax.tree.leaves(arguments[-1])]
        if any(isinstance(leaf, jax.core.Tracer) for leaf in some):
            return self._whole(state, {}, *arguments, self._key)[:2]
        if not self._traced:
            self.trace(state, *arguments)
        buffers = self.buffers.take(self._params(state))
        state, metrics, buffers = self._whole(state, buffers, *arguments, self._key)
        self.buffers.arrays = buffers
        return state, metrics

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """As `jax.jit`'s."""
        self._traced = True
        traced = self._trace(*arguments)
        return traced if self.buffers.settle() else self._trace(*arguments)

    def _trace(self, state: dict, *arguments: Any) -> jax.stages.Traced:
        buffers = self.buffers.shapes(self._params(state))
        return self._whole.trace(state, buffers, *arguments, self._key)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s."""
        return self.trace(*arguments).lower()

    def begin(self, *arguments: Any) -> Programs:
        """Traces the programs of a call, and compiles them in threads; jax keeps them for calls.

        Args:
            arguments: of a call, or their shapes and shardings.
        """
        traced = self.trace(*arguments)
        thread = ThreadPoolExecutor(1, "compile")
        compiled = thread.submit(traced.lower().compile)
        thread.shutdown(wait=False)
        return Programs([traced], [compiled])


class StepInTwo(Step):
    """A `Step` whose gradient and update are programs of their own; `lower` shows both in one.

    For small networks on a CPU: the two compile side by side, and XLA runs an update's many short
    kernels faster by themselves than in a branch of a program. The gradient is in memory as a
    whole, where one program has room for it among activations that are no longer needed.
    """

    def __init__(
        self, gradient: Callable, update: Callable, params: Callable, seed: int, out_shardings: Any
    ):
        super().__init__(gradient, update, params, seed, out_shardings)
        of_gradient = None
        if out_shardings is not None:
            of_gradient = (params(out_shardings[0]), out_shardings[1])
        self._first = backend.jit(gradient, out_shardings=of_gradient)
        self._second = backend.jit(update, donate_argnums=0, out_shardings=out_shardings)

    def __call__(self, state: dict, *arguments: Any) -> tuple[dict, dict]:
        return self._second(state, *self._first(state, *arguments, self._key))

    def begin(self, *arguments: Any) -> Programs:
        """As `Step`'s; in two threads, as a good part of XLA's compiler runs in one."""
        state = arguments[0]
        threads = ThreadPoolExecutor(2, "compile")
        first = self._first.trace(*arguments, self._key)
        metrics = first.out_info[1]
        second = self._second.trace(state, self._params(state), metrics)
        update = threads.submit(second.lower().compile)
        gradient = threads.submit(first.lower().compile)
        threads.shutdown(wait=False)
        return Programs([first, second], [gradient, update])


def _parts(
    loss: Callable,
    jobs: Mapping[str, tuple[optax.GradientTransformation, Any]],
    data: Any,
) -> tuple[Callable, Callable]:
    """Gradient and update of `make_joint_step`, before they are compiled; see `Step`."""
    _, mixing_recipe = next(iter(jobs.values()))

    def gradient(
        states: dict, frozen: dict, batch: dict, key: jax.Array, into: Into = _anywhere
    ) -> tuple[dict, dict]:
        def of_trained(params: dict, *arguments: Any) -> tuple[jax.Array, dict]:
            own = {job: without_frozen(params[job], recipe) for job, (_, recipe) in jobs.items()}
            with into(params):
                return loss(own, *arguments)

        first = next(iter(states.values()))
        loss_key, prepare_keys = step_keys(jax.random.wrap_key_data(key), first["step"])
        # A skipped step is no part of an update; each job has skipped its own.
        taken = {f"step/{job}": own["step"] - own["skipped"] for job, own in states.items()}
        batch = prepared(prepare_keys, batch, mixing_recipe, data) | taken
        for state in states.values():
            frozen = with_fixed(frozen, state["fixed"])
        params = {job: states[job]["params"] for job in jobs}
        (_, metrics), grads = jax.value_and_grad(of_trained, has_aux=True)(
            params, frozen, batch, loss_key
        )
        return grads, metrics

    def update(states: dict, grads: dict, metrics: dict) -> tuple[dict, dict]:
        new, told = {}, {}
        for job, (optimizer, recipe) in jobs.items():
            norm = global_norm(_accumulated(states[job], grads[job], recipe))
            finite = jnp.isfinite(metrics[job]["loss"]) & jnp.isfinite(norm)
            new[job] = _advance(states[job], grads[job], finite, optimizer, recipe)
            told[job] = {**metrics[job], "gradient_norm": norm}
        return new, told

    return gradient, update


def step_keys(
    key: jax.Array, step: jax.Array | int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The keys of a step from the seed's: the loss's, and those of `prepared`."""
    key = jax.random.fold_in(key, step)
    mix_key, loss_key, erase_key = jax.random.split(key, 3)
    return loss_key, (erase_key, mix_key)


def _accumulated(state: dict, grads: dict, recipe: Any) -> dict:
    """The mean gradient of the parts of a batch up to this one; after the last, what clip sees."""
    if recipe.accumulate == 1:
        return grads
    before = state["opt_state"]
    parts = (before.mini_step + 1).astype(jnp.float32)
    return jax.tree.map(lambda mean, grad: mean + (grad - mean) / parts, before.acc_grads, grads)


def _advance(
    state: dict,
    grads: dict,
    finite: jax.Array,
    optimizer: optax.GradientTransformation,
    recipe: Any,
) -> dict:
    """The state after one more step.

    Args:
        state: before it.
        grads: gradient of its parameters.
        finite: whether loss and gradient are; if not, only the counts change.
            (optax.apply_if_finite gives up after some steps, and lets NaN through.)
        optimizer: of train/optimizer.py.
        recipe: its ema and accumulate.
    """
    before = {name: state[name] for name in ("params", "opt_state", "ema") if name in state}
    update = functools.partial(_updated, optimizer, recipe)
    if backend.platform() == "cpu":
        # A choice of each array makes XLA copy both moments: five times the update's time.
        if recipe.accumulate > 1:
            changed = _accumulating(update, recipe, before, grads, finite)
        else:
            changed = jax.lax.cond(finite, update, lambda before, grads: before, before, grads)
    else:  # a GPU's host would wait for the loss before it goes on
        choose = functools.partial(jnp.where, finite)
        changed = jax.tree.map(choose, update(before, grads), before)
    skipped = state["skipped"] + jnp.where(finite, 0, 1)
    return {**state, **changed, "step": state["step"] + 1, "skipped": skipped}


def _accumulating(
    update: Callable, recipe: Any, before: dict, grads: dict, finite: jax.Array
) -> dict:
    """What `update` gives for a part of a batch, which is computed for the last part alone.

    optax.MultiSteps computes an update for every part, and with a branch around it XLA copies the
    state again: three times the time.
    """
    steps, parts = before["opt_state"], recipe.accumulate
    mean = _accumulated({"opt_state": steps}, grads, recipe)
    mean = jax.tree.map(functools.partial(jnp.where, finite), mean, steps.acc_grads)

    def whole(before: dict) -> dict:
        # The mean and itself have the same mean; a constant number leaves nothing to choose.
        last = before["opt_state"]._replace(mini_step=jnp.int32(parts - 1))
        return update({**before, "opt_state": last}, last.acc_grads)

    added = {**before, "opt_state": steps._replace(acc_grads=mean)}
    last = finite & (steps.mini_step == parts - 1)
    changed = jax.lax.cond(last, whole, lambda before: before, added)
    number = jnp.where(finite, (steps.mini_step + 1) % parts, steps.mini_step)
    return {**changed, "opt_state": changed["opt_state"]._replace(mini_step=number)}


def _updated(
    optimizer: optax.GradientTransformation, recipe: Any, before: dict, grads: dict
) -> dict:
    """Parameters, the optimizer's state and the average after an update, of those before it."""
    updates, opt_state = optimizer.update(grads, before["opt_state"], before["params"])
    params = optax.apply_updates(before["params"], updates)
    changed = {"params": params, "opt_state": opt_state}
    if recipe.ema:
        changed["ema"] = ema_update(before["ema"], params, recipe.ema)
    if recipe.ema and recipe.accumulate > 1:
        # The weights change with the last part of a batch only, and so must their average.
        keep = functools.partial(jnp.where, opt_state.mini_step == 0)
        changed["ema"] = jax.tree.map(keep, changed["ema"], before["ema"])
    return changed


def with_fixed(frozen: dict, fixed: dict) -> dict:
    """The frozen stages, with the fixed arrays of the trained stages added."""
    return frozen | {n: {**frozen.get(n, {}), "fixed": arrays} for n, arrays in fixed.items()}


def evaluated_params(state: dict) -> dict:
    """The weights to evaluate and export: the moving average if there is one."""
    return state.get("ema", state["params"])
