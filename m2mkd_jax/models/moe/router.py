"""Which token goes to which expert, with which weight.

Axes: G groups of tokens, S tokens of a group, D channels, E experts, K choices per token,
C slots per expert and group.

A router is a linear layer and one of three decisions, pure functions of its logits:

    published       the K best experts, weighted by a softmax over their K logits alone (FastMoE's
                    NaiveGate; reference section 2)
    vmoe            a softmax over all experts of noisy logits, the K best kept as they are, tokens
                    served in the order of their largest weight (Riquelme et al. 2021, 2.2, C.1)
    expert_choice   every expert takes its C best tokens (Zhou et al. 2022, 3.1)

Expert choice looks at all tokens of a group: what one image gives depends on the others of its
batch, in evaluation too.
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
    """Every token chose K experts.

    experts: (G, S, K) int32, best first. weights: (G, S, K) float32. order: (G, S) int32, the
    tokens in the order in which they are served where slots are scarce; None: as they come. First
    choices of all tokens always go before second ones.
    """

    experts: jax.Array
    weights: jax.Array
    order: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertChoice:
    """Every expert chose C tokens. tokens: (G, E, C) int32. weights: (G, E, C) float32."""

    tokens: jax.Array
    weights: jax.Array


Routing = TokenChoice | ExpertChoice


def best(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest along the last axis and their places, as jax.lax.top_k finds them.

    For few of few. XLA gathers the input of top_k from all devices; these are sums and maxima.
    """
    columns, rest, found, places = jnp.arange(values.shape[-1]), values, [], []
    for _ in range(count):
        places.append(jnp.argmax(rest, axis=-1))
        chosen = columns == places[-1][..., None]
        found.append(jnp.sum(jnp.where(chosen, values, 0), axis=-1))
        rest = jnp.where(chosen, -jnp.inf, rest)
    return jnp.stack(found, axis=-1), jnp.stack(places, axis=-1)


def published(logits: jax.Array, top_k: int) -> TokenChoice:
    """(G, S, E) -> the best K; their weights sum to one."""
    values, experts = best(logits, top_k)
    return TokenChoice(experts, jax.nn.softmax(values, axis=-1))


def vmoe(logits: jax.Array, top_k: int) -> TokenChoice:
    """(G, S, E), noise included -> the best K of a softmax over E, in batch-priority order."""
    weights, experts = best(jax.nn.softmax(logits, axis=-1), top_k)
    order = jnp.argsort(-jax.lax.stop_gradient(weights[..., 0]), axis=-1, stable=True)
    return TokenChoice(experts, weights, order)


def expert_choice(logits: jax.Array, capacity: int) -> ExpertChoice:
    """(G, S, E) -> every expert's best C tokens, by a softmax over the experts."""
    gates = jnp.swapaxes(jax.nn.softmax(logits, axis=-1), 1, 2)
    tokens = jnp.argsort(-jax.lax.stop_gradient(gates), axis=-1, stable=True)[..., :capacity]
    return ExpertChoice(tokens, jnp.take_along_axis(gates, tokens, axis=-1))


class Router(nnx.Module):
    """Linear D -> E with bias and a decision, in float32 whatever the compute type."""

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

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> tuple[Routing, dict]:
        """Tokens (G, S, D) -> who goes where, and scalars about it.

        key: of the noise; None: no noise. The scalars: 'entropy' of the softmax over all experts
        without noise (mean over the tokens, nats) and the two balance losses of
        objectives/balance.py, over all groups together (the paper's code: group by group), so that
        they do not depend on the devices. The load loss is about the noise: 0 without it.
        """
        spec = self.spec
        logits = noisy = self.logits(x)
        gates = jax.nn.softmax(logits, axis=-1)
        load_loss = jnp.zeros(())
        if spec.noise_std and key is not None:
            noisy = logits + spec.noise_std * jax.random.normal(key, logits.shape)
            threshold = best(noisy, spec.top_k)[0][..., -1:]
            load_loss = balance.load_loss(logits, threshold, spec.noise_std)
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
    """(E,): the share of all assignments that each expert got; sums to one."""
    if isinstance(routing, ExpertChoice):
        return jnp.full((experts,), 1 / experts)
    chosen = routing.experts[..., None] == jnp.arange(experts)
    return jnp.mean(chosen, axis=(0, 1, 2), dtype=jnp.float32)
