"""Features and attention maps of a network, from the parameters that it computes with.

Axes: B batch, H height, W width, N tokens, D channels, L blocks, A attention heads, U latents, M
mediators, V senders, I iterations, C channels of a head.

Everything here is without noise, as in evaluation. A layer's fused attention does not give its
weights, so they are computed again from its queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe.blocks import Block as MoEBlock
from m2mkd_jax.models.moe.spec import segments
from m2mkd_jax.models.moe.vmoe import VMoEStage
from m2mkd_jax.models.nac import kernels
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.vit import Attention, ViTStage

Arrays = dict[str, jax.Array]


def features(stages: Sequence[chain.Stage], names: Sequence[str], x: jax.Array) -> Arrays:
    """What a network computes on the way to its output.

    Args:
        stages: of the network, in order.
        names: of the stages.
        x: what the first stage takes.

    Returns:
        By stage name the output of every stage; of a transformer's last stage also 'tokens'
        (B, N, D) after its blocks, and 'class_token' (B, D), the normalised class token that the
        head sees; of a NAC also 'tokens' of its tokenizer, and the final states 'input', 'mediator'
        and 'output' (B, U, D) of its groups of latents.
    """
    found: Arrays = {}
    for name, stage in zip(names, stages, strict=True):
        if isinstance(stage, NAC):
            states = stage.forward(x, {})
            outputs = states["output"]
            x = outputs[:, 0] if stage.spec.output == "first_slot" else stage.pooling(outputs)
            x = x.astype(jnp.float32)
            found |= states
        elif isinstance(stage, ViTStage | VMoEStage) and stage.last:
            found["tokens"] = _blocks(stage, x)[0]
            found["class_token"] = stage.features(found["tokens"])
            x = stage.head(found["class_token"]).astype(jnp.float32)
        else:
            x = stage(x)
        found[name] = x
    return found


def attention(stages: Sequence[chain.Stage], x: jax.Array) -> Arrays:
    """Attention maps of a network.

    Args:
        stages: of the network, in order.
        x: what the first stage takes.

    Returns:
        Of transformers 'blocks' (L, B, A, N, N): row n says what token n attends to, and sums to
        one. Of a NAC 'read_in' (B, U, A, N), what each input latent reads, 'links' (I, M, V), the
        probability of each link from a sender (input latents, then mediators) to a mediator, and
        'read_out' (B, A, U, V), what each output latent reads of the same senders (of mediators
        alone, where the output latents do not hear the input latents).

    Raises:
        UserError: a stage has no attention maps.
    """
    maps = []
    for stage in stages:
        if isinstance(stage, NAC):
            return _nac_attention(stage, x)
        if not isinstance(stage, ViTStage | VMoEStage):
            raise UserError(f"attention: there are no attention maps of a {type(stage).__name__}")
        x, of_stage = _blocks(stage, x)
        maps += of_stage
    return {"blocks": jnp.concatenate(maps)} if maps else {}


def attention_weights(layer: Attention, x: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) of a layer's input (B, N, D) -> (B, A, N, N), float32."""
    q, k, _ = rearrange(layer.qkv(x), "b n (i h c) -> i b n h c", i=3, h=layer.heads)
    scores = jnp.einsum("bnhc,bmhc->bhnm", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(q.shape[-1]))


def _blocks(stage: ViTStage | VMoEStage, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """A transformer stage's tokens (B, N, D) after its blocks, and attention weights per stack."""
    if stage.first:
        x = stage.embed(x)
    if isinstance(stage, ViTStage):
        stacks = [stage.blocks] if stage.depth else []
    else:
        count = len(segments(stage.spec, stage.start, stage.depth))
        stacks = [getattr(stage, f"segment_{i}").blocks for i in range(count)]
    maps = []
    for stack in stacks:
        x, weights = _stack(stack, x)
        maps.append(weights)
    return x, maps


def _stack(stack: nnx.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output of stacked blocks, and their attention weights (L, B, A, N, N)."""
    graph, state = nnx.split(stack)

    def body(x: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        block: Any = nnx.merge(graph, state)
        stitched = isinstance(block, MoEBlock) and block.kind.pre
        inside = block.pre_stitch(x) if stitched else x
        weights = attention_weights(block.attn, block.norm1(inside))
        y = block(x)
        return (y[0] if isinstance(block, MoEBlock) else y), weights

    if jax.tree.leaves(state)[0].shape[0] > 1:
        return jax.lax.scan(body, x, state)
    # With a stitch at one end alone the width changes, which a loop does not allow.
    x, weights = body(x, jax.tree.map(lambda a: a[0], state))
    return x, weights[None]


def _nac_attention(nac: NAC, images: jax.Array) -> Arrays:
    """See `attention`."""
    spec = nac.spec
    tokens = nac.tokenizer(images)
    inputs = nac.initial_states(tokens.shape[0], {}, [None] * 3)[0]
    layer = nac.read_in.attention
    read_in = layer.weights(inputs, nac.input_latents.codes[...], layer.sender_norm(tokens))
    mediators = nac.mediator_latents.signatures[...]
    heard = jnp.concatenate([nac.input_latents.signatures[...], mediators])
    distance = kernels.distance(mediators, heard)
    bandwidths = nac.propagators.attention.bandwidth[...]
    links = []
    for i in range(spec.iterations):
        bandwidth = bandwidths[0 if spec.share_propagators else i]
        log = nac.propagator_kernel(distance, bandwidth, images.shape[0])
        probability = jnp.clip(jnp.exp(log), 0.0, 1.0)
        if i and not spec.persistent_inputs:
            probability = probability.at[:, : spec.input_latents].set(0.0)
        links.append(probability)
    return {"read_in": read_in, "links": jnp.stack(links), "read_out": _read_out(nac, images)}


def _read_out(nac: NAC, images: jax.Array) -> jax.Array:
    """Attention weights (B, A, U, V) of the output latents to input latents and mediators."""
    spec, layer = nac.spec, nac.read_out.attention
    states, count = nac.forward(images, {}), images.shape[0]
    outputs = nac.initial_states(count, {}, [None] * 3)[2]
    groups = (nac.input_latents, nac.mediator_latents)
    heard = ("input", "mediator") if spec.input_output else ("mediator",)
    senders = jnp.concatenate([states[name] for name in heard], axis=1)
    codes = [nac.mediator_codes(-1)]
    codes = [nac.input_latents.codes[...], *codes] if spec.input_output else codes
    signatures = [g.signatures[...] for g in (groups if spec.input_output else groups[1:])]
    norm = layer.sender_norm or layer.receiver_norm
    q = layer.query(layer.receiver_norm(outputs), nac.output_latents.codes[...])
    k = layer.key(norm(senders), jnp.concatenate(codes))
    q, k = (rearrange(x, "b u (h c) -> b h u c", h=layer.heads) for x in (q, k))
    distance = kernels.distance(nac.output_latents.signatures[...], jnp.concatenate(signatures))
    log = kernels.log_kernel(distance, layer.bandwidth[...], None)
    scores = jnp.einsum("bhuc,bhvc->bhuv", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(q.shape[-1]) + log[None, None])
