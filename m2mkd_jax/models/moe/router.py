"""Which token goes to which expert, with which weight.

Axes: G groups of tokens, S tokens of a group, D channels, E experts, K choices per token,
C slots per expert and group.

A router is a linear layer followed by one of three assignments, pure functions of its logits:

    published       the K best experts, weighted by a softmax over their K logits alone (the
                    NaiveGate of FastMoE, arXiv 2103.13262)
    vmoe            a softmax over all experts of noisy logits, the K best weights unchanged, tokens
                    served in the order of their largest weight (batch-priority routing; Riquelme
                    et al. 2021, arXiv 2106.05974, section 2.2 and appendix C.1)
    expert_choice   every expert takes its C best tokens (Zhou et al. 2022, arXiv 2202.09368,
                    section 3)

With expert choice the result for one image depends on the other images of its group. In evaluation
each image is a group of its own (blocks.MoE).

Source: the papers above; docs/reference.md#vmoe-router.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.losses import balance
from m2mkd_jax.models import layers
from m2mkd_jax.models.moe.spec import RouterSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenChoice:
    """Every token chooses K experts.

    Attributes:
        experts: (G, S, K) int32, best first.
        weights: (G, S, K) float32.
        order: (G, S) int32, the order in which tokens are served where slots are scarce; None for
            the order of the sequence. First choices of all tokens go before second ones.
    """

    experts: jax.Array
    weights: jax.Array
    order: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertChoice:
    """Every expert chooses C tokens.

    Attributes:
        tokens: (G, E, C) int32, best first.
        weights: (G, E, C) float32.
    """

    tokens: jax.Array
    weights: jax.Array


Routing = TokenChoice | ExpertChoice


def best(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest values along the last axis and their indices, as jax.lax.top_k.

    Meant for a short axis and a small count. XLA gathers the input of top_k from all devices; sums
    and maxima stay local.

    Args:
        values: (..., E).
        count: K.

    Returns:
        Values and indices, (..., K) each.
    """
    columns = layers.align_rank(jnp.arange(values.shape[-1]), values)
    rest, found, places = values, [], []
    for _ in range(count):
        places.append(jnp.argmax(rest, axis=-1))
        chosen = columns == places[-1][..., None]
        found.append(jnp.sum(jnp.where(chosen, values, 0.0), axis=-1))
        rest = jnp.where(chosen, -jnp.inf, rest)
    return jnp.stack(found, axis=-1), jnp.stack(places, axis=-1)


def published(logits: jax.Array, top_k: int) -> TokenChoice:
    """The K best experts of each token, weighted by a softmax over their K logits.

    Source: docs/reference.md#vmoe-router.

    Args:
        logits: (G, S, E).
        top_k: K.
    """
    values, experts = best(logits, top_k)
    return TokenChoice(experts, jax.nn.softmax(values, axis=-1))


def vmoe(logits: jax.Array, top_k: int) -> TokenChoice:
    """The K largest weights of a softmax over all experts, in batch-priority order.

    Source: Riquelme et al. 2021 (arXiv 2106.05974), section 2.2 and appendix C.1;
    docs/reference.md#vmoe-router.

    Args:
        logits: (G, S, E), noise included.
        top_k: K.
    """
    weights, experts = best(jax.nn.softmax(logits, axis=-1), top_k)
    order = jnp.argsort(-jax.lax.stop_gradient(weights[..., 0]), axis=-1, stable=True)
    return TokenChoice(experts, weights, order)


def expert_choice(logits: jax.Array, capacity: int) -> ExpertChoice:
    """Every expert's C best tokens, by a softmax over the experts.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3; docs/reference.md#vmoe-router.

    Args:
        logits: (G, S, E).
        capacity: C.
    """
    gates = jnp.swapaxes(jax.nn.softmax(logits, axis=-1), 1, 2)
    tokens = jnp.argsort(-jax.lax.stop_gradient(gates), axis=-1, stable=True)[..., :capacity]
    return ExpertChoice(tokens, jnp.take_along_axis(gates, tokens, axis=-1))


class Router(nnx.Module):
    """Linear layer D -> E with bias and an assignment, in float32 whatever the compute dtype."""

    def __init__(self, spec: RouterSpec, width: int, *, rngs: nnx.Rngs):
        self.spec = spec
        self.linear = nnx.Linear(
            width,
            spec.experts,
            kernel_init=layers.transformer_init,
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )

    def logits(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., E), float32."""
        return self.linear(x.astype(jnp.float32))

    def __call__(
        self, x: jax.Array, key: jax.Array | None = None
    ) -> tuple[Routing, dict[str, jax.Array]]:
        """Assigns tokens to experts.

        Args:
            x: tokens (G, S, D).
            key: of the noise; None for no noise.

        Returns:
            The routing, and scalars: 'entropy' of the softmax over all experts without noise (mean
            over the tokens, in nats), 'importance_loss' and 'load_loss' (losses/balance.py). These
            losses are over all groups together, so that they do not depend on the number of
            devices; the code of Riquelme et al. takes them group by group. The load loss is defined
            by the noise and is 0 without it.
        """
        spec = self.spec
        logits = noisy = self.logits(x)
        gates = jax.nn.softmax(logits, axis=-1)
        load_loss = jnp.zeros(())
        if spec.noise_std and key is not None:
            noisy = logits + spec.noise_std * jax.random.normal(key, logits.shape)
            threshold = best(noisy, spec.top_k)[0][..., -1:]
            load_loss = balance.load_loss(logits, threshold, spec.noise_std)
        routing: Routing
        if spec.kind == "published":
            routing = published(noisy, spec.top_k)
        elif spec.kind == "vmoe":
            routing = vmoe(noisy, spec.top_k)
        else:
            routing = expert_choice(noisy, spec.capacity(x.shape[1]))
        return routing, {
            "entropy": -jnp.sum(gates * jax.nn.log_softmax(logits, axis=-1), -1).mean(),
            "importance_loss": balance.importance_loss(gates),
            "load_loss": load_loss,
        }


def load(routing: Routing, experts: int) -> jax.Array:
    """The share of all assignments per expert, (E,); sums to one."""
    if isinstance(routing, ExpertChoice):
        return jnp.full((experts,), 1 / experts)
    chosen = routing.experts[..., None] == jnp.arange(experts)[None, None, None]
    return jnp.mean(chosen.astype(jnp.float32), axis=(0, 1, 2))
