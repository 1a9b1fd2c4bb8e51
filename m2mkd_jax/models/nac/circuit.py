"""The Neural Attentive Circuit: read-in, propagators, read-out.

Axes: B batch, H height, W width, V tokens, U latents, D state, S code, K classes, I iterations.

Input latents attend to the image. Mediators then receive I times from [input latents, mediators]
along the links that their signatures allow. Output latents receive from input latents and mediators
and are pooled to logits.

Source: Weiss et al. 2022 (arXiv 2210.08031);
docs/reference.md#nac, docs/reference.md#nac-iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import chain, layers
from m2mkd_jax.models.nac import kernels
from m2mkd_jax.models.nac.attention import LatentLayer
from m2mkd_jax.models.nac.fused.choice import is_fused
from m2mkd_jax.models.nac.latents import Latents, Seeder, jitter
from m2mkd_jax.models.nac.modulation import ModulatedFFN
from m2mkd_jax.models.nac.read_in import ReadIn
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.tokenizers import OutputPooling, Tokenizer

GROUPS = ("input", "mediator", "output")
Noise = Mapping[str, jax.Array]


def _split(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """`count` keys from one, or as many None from None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def _unstack(tree: Any, count: int) -> list[Any]:
    """Trees of every entry of the leading axis; their gradients are joined by one copy."""
    parts, structure = jax.tree.flatten(tree)
    rows = [[part[0] for part in jnp.split(leaf, count)] for leaf in parts]
    return [jax.tree.unflatten(structure, row) for row in zip(*rows, strict=True)]


class NAC(chain.Stage):
    """A whole circuit as one stage: images (B, H, W, C) -> logits (B, K), float32."""

    def __init__(self, spec: NACSpec, *, rngs: nnx.Rngs):
        self.spec, self.depth = spec, spec.iterations
        self.tokenizer = Tokenizer(spec, rngs=rngs)
        self.input_latents = Latents(spec.input_latents, spec, rngs=rngs)
        self.mediator_latents = Latents(
            spec.mediator_latents, spec, per_iteration=spec.codes_per_iteration, rngs=rngs
        )
        self.output_latents = Latents(spec.output_latents, spec, rngs=rngs)
        self.seeder = Seeder(spec, rngs=rngs) if spec.seeder else None
        self.read_in = ReadIn(spec, spec.layer_scale, rngs=rngs)
        self.propagators = layers.stack(
            lambda rngs: LatentLayer(
                spec, share_norm=True, residual=True, kernel=True, ffn=not spec.share_ffn, rngs=rngs
            ),
            1 if spec.share_propagators else spec.iterations,
            rngs=rngs,
        )
        self.shared_ffn = (
            ModulatedFFN(spec, spec.layer_scale, rngs=rngs) if spec.share_ffn else None
        )
        self.read_out = LatentLayer(spec, share_norm=False, residual=False, kernel=True, rngs=rngs)
        if spec.output == "pooling":
            self.pooling = OutputPooling(spec.state_dim, spec.classes, rngs=rngs)

    def mediator_codes(self, iteration: int) -> jax.Array:
        """Codes (U, S) of the mediators in an iteration."""
        codes = self.mediator_latents.codes[...]
        return codes[iteration] if self.spec.codes_per_iteration else codes

    def draw_noise(self, key: jax.Array, batch: int) -> dict[str, jax.Array]:
        """Draws the noise that is also drawn by the published evaluation.

        Source: docs/reference.md#nac-evaluation-noise.

        Args:
            key: of the draw.
            batch: B.

        Returns:
            Seeder noise (B, U, D) by group of latents, and 'gumbel' (B, U).
        """
        spec, keys = self.spec, jax.random.split(key, 4)
        counts = (spec.input_latents, spec.mediator_latents, spec.output_latents)
        noise = {
            group: jax.random.normal(k, (batch, count, spec.state_dim))
            for group, count, k in zip(GROUPS, counts, keys[:3], strict=True)
        }
        if spec.pooling == "gumbel":
            noise["gumbel"] = jax.random.gumbel(keys[3], (batch, spec.output_latents))
        return noise

    def initial_states(
        self, batch: int, noise: Noise, keys: Sequence[jax.Array | None]
    ) -> list[jax.Array]:
        """Initial states (B, U, D) of input, mediator and output latents.

        Source: docs/reference.md#nac-seeder.

        Args:
            batch: B.
            noise: made by `draw_noise`; empty for the mean.
            keys: of each group's code noise; None for no code noise.
        """
        if self.seeder is None:
            groups = (self.input_latents, self.mediator_latents, self.output_latents)
            return [group.initial_states(batch) for group in groups]
        codes = (
            self.input_latents.codes[...],
            self.mediator_codes(0),
            self.output_latents.codes[...],
        )
        return [
            self.seeder(jitter(c, self.spec.code_noise, k), batch, noise.get(group))
            for group, c, k in zip(GROUPS, codes, keys, strict=True)
        ]

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Images (B, H, W, C) -> logits (B, K).

        A key without `train` samples seeder and pooling as the published evaluation does.
        """
        noise: dict[str, jax.Array] = {}
        train_key: jax.Array | None = None
        if key is not None:
            noise_key, train_key = jax.random.split(key)
            noise = self.draw_noise(noise_key, x.shape[0])
        states = self.forward(x, noise, rates=rates, key=train_key if train else None)
        if self.spec.output == "first_slot":
            return states["output"][:, 0].astype(jnp.float32)
        return self.pooling(states["output"], noise.get("gumbel"))

    def forward(
        self,
        images: jax.Array,
        noise: Noise,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Computes the final states of all latents.

        Args:
            images: (B, H, W, C).
            noise: made by `draw_noise`; empty for a deterministic evaluation.
            rates: drop-path rates of the propagators; None for no drop-path.
            key: of the training noise; None for no training noise.

        Returns:
            'tokens' (B, V, T), and the final states 'input', 'mediator' and 'output' (B, U, D).
        """
        spec = self.spec
        keys = _split(key, 7)
        tokens = self.tokenizer(images)
        inputs, mediators, outputs = self.initial_states(tokens.shape[0], noise, keys[:3])
        input_codes = self.input_latents.codes[...]
        inputs = self.read_in(inputs, jitter(input_codes, spec.code_noise, keys[3]), tokens)
        mediators = self.propagate(inputs, mediators, rates, keys[4])
        # The read-out's kernel has neither truncation nor sampling.
        senders, codes, signatures = self._senders(
            inputs, mediators, self.mediator_codes(-1), spec.input_output
        )
        distance = kernels.distance(self.output_latents.signatures[...], signatures)
        bandwidth = self.read_out.attention.bandwidth[...]
        outputs = self.read_out(
            outputs,
            jitter(self.output_latents.codes[...], spec.code_noise, keys[5]),
            senders,
            jitter(codes, spec.code_noise, keys[6]),
            kernels.log_kernel(distance, bandwidth, None),
        )
        return {"tokens": tokens, "input": inputs, "mediator": mediators, "output": outputs}

    def propagate(
        self,
        inputs: jax.Array,
        mediators: jax.Array,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        trace: list[jax.Array] | None = None,
    ) -> jax.Array:
        """Computes the mediator states after all iterations.

        Source: docs/reference.md#nac-iterations.

        Args:
            inputs: states of the input latents (B, U, D).
            mediators: initial states of the mediators (B, U, D).
            rates: drop-path rates of the propagators; None for no drop-path.
            key: of the training noise; None for no training noise.
            trace: a list to which the states after each iteration are appended.

        Returns:
            (B, U, D).
        """
        spec = self.spec
        steps: dict[str, jax.Array] = {}
        if spec.codes_per_iteration:
            steps["codes"] = self.mediator_latents.codes[...]
        if key is not None:
            steps["key"] = jax.random.split(key, spec.iterations)
            if rates is not None and any(rates):
                steps["rate"] = jnp.asarray(rates)

        if key is not None and trace is None and is_fused(spec, len(mediators), mediators.dtype):
            return self._propagate_fused(inputs, mediators, steps)

        def step(
            layer: LatentLayer,
            states: jax.Array,
            own: dict[str, jax.Array],
            with_inputs: bool = True,
        ) -> jax.Array:
            return self._iteration(layer, inputs, states, own, with_inputs)

        if trace is None and spec.persistent_inputs and not spec.share_propagators:
            apply = lambda layer, states, own: (step(layer, states, own), None)
            return layers.scan_stack(self.propagators, mediators, steps, apply, remat=spec.remat)[0]
        graph, state = nnx.split(self.propagators)
        for i in range(spec.iterations):
            index = 0 if spec.share_propagators else i
            layer = nnx.merge(graph, jax.tree.map(lambda a, index=index: a[index], state))
            own = jax.tree.map(lambda a, i=i: a[i], steps)
            mediators = step(layer, mediators, own, i == 0 or spec.persistent_inputs)
            if trace is not None:
                trace.append(mediators)
        return mediators

    def _propagate_fused(
        self, inputs: jax.Array, mediators: jax.Array, steps: dict[str, jax.Array]
    ) -> jax.Array:
        """`propagate` by fused kernels, in training.

        There is no loop: what each iteration keeps would be copied into stacks and back. What does
        not depend on images is computed for all iterations at once.

        Args:
            inputs, mediators: as for `propagate`.
            steps: for every iteration 'key', and 'codes' and 'rate' as far as there are any.

        Returns:
            (B, U, D).
        """
        # Needs Pallas: see fused/choice.py.
        fused = import_module("m2mkd_jax.models.nac.fused.propagator")
        spec = self.spec
        graph, state = nnx.split(self.propagators)
        codes = self.mediator_codes(0)
        _, _, signatures = self._senders(inputs, mediators, codes, True)
        distance = kernels.distance(self.mediator_latents.signatures[...], signatures)

        def shared(params: Any, own: dict[str, jax.Array]) -> Any:
            layer = nnx.merge(graph, params)
            keys = jax.random.split(own["key"], 4)
            _, sender_codes, _ = self._senders(inputs, mediators, own.get("codes", codes), True)
            weights = fused.weights_of(
                layer,
                jitter(own.get("codes", codes), spec.code_noise, keys[1]),
                jitter(sender_codes, spec.code_noise, keys[2]),
            )
            log = self.mean_kernel(distance, layer.attention.bandwidth[...])
            keep = None
            if "rate" in own:
                keep = fused.keep_factors(len(mediators), own["rate"], keys[3])
            return weights, kernels.link_logits(log), keys[0], keep

        def iteration(own: Any, states: jax.Array) -> jax.Array:
            weights, logits, key, keep = own
            uniform = jax.random.uniform(key, (len(states), *distance.shape))
            log = kernels.relax(logits, uniform, spec.kernel_temperature, states.dtype)
            return fused.propagate(weights, inputs, states, log, spec.heads, keep)

        if layers.recomputes(spec.remat):
            iteration = jax.checkpoint(iteration)
        for own in _unstack(jax.vmap(shared)(state, steps), spec.iterations):
            mediators = iteration(own, mediators)
        return mediators

    def _iteration(
        self,
        layer: LatentLayer,
        inputs: jax.Array,
        mediators: jax.Array,
        own: dict[str, jax.Array],
        with_inputs: bool,
    ) -> jax.Array:
        """One iteration of `propagate`.

        Args:
            layer: the propagator.
            inputs: states of the input latents (B, U, D).
            mediators: states of the mediators (B, U, D).
            own: the iteration's 'codes', noise 'key' and drop-path 'rate', as far as there are any.
            with_inputs: whether input latents are among the senders.

        Returns:
            New states of the mediators (B, U, D).
        """
        noise = self.spec.code_noise
        codes = own["codes"] if "codes" in own else self.mediator_codes(0)
        senders, sender_codes, signatures = self._senders(inputs, mediators, codes, with_inputs)
        keys = _split(own.get("key"), 4)
        log_kernel = self.propagator_kernel(
            kernels.distance(self.mediator_latents.signatures[...], signatures),
            layer.attention.bandwidth[...],
            mediators.shape[0],
            keys[0],
            mediators.dtype,
        )
        return layer(
            mediators,
            jitter(codes, noise, keys[1]),
            senders,
            jitter(sender_codes, noise, keys[2]),
            log_kernel,
            own.get("rate"),
            keys[3] if "rate" in own else None,
            self.shared_ffn,
        )

    def propagator_kernel(
        self,
        distance: jax.Array,
        bandwidth: jax.Array,
        batch: int,
        key: jax.Array | None = None,
        dtype: Any = jnp.float32,
    ) -> jax.Array:
        """Computes a propagator's log kernel.

        Source: docs/reference.md#nac-kernel.

        Args:
            distance: (U, V).
            bandwidth: scalar.
            batch: B.
            key: of the stochastic kernel; None for no sampling.
            dtype: of a sampled kernel.

        Returns:
            (U, V), or (B, U, V) when sampled.
        """
        spec = self.spec
        log = self.mean_kernel(distance, bandwidth)
        if key is not None and spec.stochastic_kernel:
            uniform = jax.random.uniform(key, (batch, *distance.shape))
            log = kernels.sample(log, uniform, spec.kernel_temperature, dtype)
        return log

    def mean_kernel(self, distance: jax.Array, bandwidth: jax.Array) -> jax.Array:
        """A propagator's log kernel (U, V) before it is sampled."""
        spec = self.spec
        return kernels.log_kernel(
            distance, bandwidth, spec.truncation, spec.truncation_implementation
        )

    def _senders(
        self, inputs: jax.Array, mediators: jax.Array, codes: jax.Array, with_inputs: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """States (B, V, D), codes (V, S) and signatures (V, C) of all senders."""
        signatures = self.mediator_latents.signatures[...]
        if not with_inputs:
            return mediators, codes, signatures
        return (
            jnp.concatenate([inputs, mediators], axis=1),
            jnp.concatenate([self.input_latents.codes[...], codes]),
            jnp.concatenate([self.input_latents.signatures[...], signatures]),
        )
