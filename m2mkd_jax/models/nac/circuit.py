"""The Neural Attentive Circuit: read-in, propagators, read-out (reference section 3).

Axes: B batch, H height, W width, V tokens, U latents, D state, S code, K classes, I iterations.

Input latents read the image; mediators then listen to [input latents, mediators] I times, along
the links that their signatures allow; output latents listen to all and are pooled to logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import chain, layers
from m2mkd_jax.models.nac import kernels
from m2mkd_jax.models.nac.attention import LatentLayer
from m2mkd_jax.models.nac.latents import Latents, Seeder, jitter
from m2mkd_jax.models.nac.modulation import ModulatedFFN
from m2mkd_jax.models.nac.read_in import ReadIn
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.tokenizers import OutputPooling, Tokenizer

GROUPS = ("input", "mediator", "output")


class NAC(chain.Stage):
    """A whole circuit as one stage: images (B, H, W, 3) -> logits (B, K), float32."""

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
        codes = self.mediator_latents.codes[...]
        return codes[iteration] if self.spec.codes_per_iteration else codes

    def draw_noise(self, key: jax.Array, batch: int) -> dict[str, jax.Array]:
        """Seeder noise (B, U, D) per group and Gumbel noise (B, U): also drawn by the published
        evaluation."""
        spec, keys = self.spec, jax.random.split(key, 4)
        counts = (spec.input_latents, spec.mediator_latents, spec.output_latents)
        noise = {
            group: jax.random.normal(k, (batch, count, spec.state_dim))
            for group, count, k in zip(GROUPS, counts, keys[:3], strict=True)
        }
        if spec.pooling == "gumbel":
            noise["gumbel"] = jax.random.gumbel(keys[3], (batch, spec.output_latents))
        return noise

    def initial_states(self, batch: int, noise: dict, keys) -> list[jax.Array]:
        """States (B, U, D) of input, mediator and output latents before anything is read."""
        if self.seeder is None:
            groups = (self.input_latents, self.mediator_latents, self.output_latents)
            return [jnp.broadcast_to(g.states[...], (batch, *g.states.shape)) for g in groups]
        codes = (
            self.input_latents.codes[...],
            self.mediator_codes(0),
            self.output_latents.codes[...],
        )
        return [
            self.seeder(jitter(c, self.spec.code_noise, k), batch, noise.get(group))
            for group, c, k in zip(GROUPS, codes, keys, strict=True)
        ]

    def __call__(self, x, *, rates=None, key=None, train=False):
        """`key` without `train` samples seeder and pooling as the published evaluation does."""
        noise, train_key = {}, None
        if key is not None:
            noise_key, train_key = jax.random.split(key)
            noise = self.draw_noise(noise_key, x.shape[0])
        states = self.forward(x, noise, rates=rates, key=train_key if train else None)
        if self.spec.output == "first_slot":
            return states["output"][:, 0].astype(jnp.float32)
        return self.pooling(states["output"], noise.get("gumbel"))

    def forward(self, images, noise: dict, *, rates=None, key=None) -> dict[str, jax.Array]:
        """All groups' final states, and the tokens. `key` turns the training noise on."""
        spec = self.spec
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        tokens = self.tokenizer(images)
        inputs, mediators, outputs = self.initial_states(tokens.shape[0], noise, keys[:3])
        input_codes = self.input_latents.codes[...]
        inputs = self.read_in(inputs, jitter(input_codes, spec.code_noise, keys[3]), tokens)
        read_in = inputs
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
        return {"tokens": tokens, "input": read_in, "mediator": mediators, "output": outputs}

    def propagate(self, inputs, mediators, rates=None, key=None, trace: list | None = None):
        """Mediator states (B, U, D) after all iterations; `trace` collects each one's (tests)."""
        spec = self.spec
        signatures = self.mediator_latents.signatures[...]
        noisy_paths = key is not None and rates is not None and any(rates)
        steps = {"codes": self.mediator_latents.codes[...]} if spec.codes_per_iteration else {}
        if key is not None:
            steps["key"] = jax.random.split(key, spec.iterations)
        if noisy_paths:
            steps["rate"] = jnp.asarray(rates)

        def step(layer, states, step, *, hear_inputs=True):
            codes = step.get("codes", None)
            codes = self.mediator_codes(0) if codes is None else codes
            senders, sender_codes, sender_signatures = self._senders(
                inputs, states, codes, hear_inputs
            )
            keys = [None] * 4
            if key is not None:
                keys = jax.random.split(step["key"], 4)
            log_kernel = self.propagator_kernel(
                kernels.distance(signatures, sender_signatures),
                layer.attention.bandwidth[...],
                states.shape[0],
                keys[0],
            )
            return layer(
                states,
                jitter(codes, spec.code_noise, keys[1]),
                senders,
                jitter(sender_codes, spec.code_noise, keys[2]),
                log_kernel,
                step.get("rate"),
                keys[3] if noisy_paths else None,
                self.shared_ffn,
            )

        if trace is None and spec.persistent_inputs and not spec.share_propagators:
            return layers.scan_stack(self.propagators, mediators, steps, step, remat=spec.remat)
        graph, state = nnx.split(self.propagators)
        for i in range(spec.iterations):
            index = 0 if spec.share_propagators else i
            layer = nnx.merge(graph, jax.tree.map(lambda a, index=index: a[index], state))
            this = jax.tree.map(lambda a, i=i: a[i], steps)
            hear = i == 0 or spec.persistent_inputs
            mediators = step(layer, mediators, this, hear_inputs=hear)
            if trace is not None:
                trace.append(mediators)
        return mediators

    def propagator_kernel(self, distance, bandwidth, batch: int, key=None) -> jax.Array:
        """Log kernel (U, V), or (B, U, V) when sampled in training."""
        spec = self.spec
        log = kernels.log_kernel(
            distance, bandwidth, spec.truncation, spec.truncation_implementation
        )
        if key is not None and spec.stochastic_kernel:
            uniform = jax.random.uniform(key, (batch, *distance.shape))
            log = kernels.sample(log, uniform, spec.kernel_temperature)
        return log

    def _senders(self, inputs, mediators, codes, with_inputs: bool):
        signatures = self.mediator_latents.signatures[...]
        if not with_inputs:
            return mediators, codes, signatures
        return (
            jnp.concatenate([inputs, mediators], axis=1),
            jnp.concatenate([self.input_latents.codes[...], codes]),
            jnp.concatenate([self.input_latents.signatures[...], signatures]),
        )
