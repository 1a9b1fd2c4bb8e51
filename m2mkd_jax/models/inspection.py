"""Features and attention maps of a network, from the parameters that it computes with.

Axes: B batch, H height, W width, N tokens, D channels, L blocks, A attention heads, U latents, M
mediators, V senders, I iterations, C channels of a head.

Everything here is without noise, as in evaluation. A layer's fused attention does not give its
weights, so they are computed again from its queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe.vmoe import Segment, VMoEStage
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
        By stage name the output of every stage; of a transformer also 'class_token' (B, D), the
        normalised class token that the head sees; of a NAC also 'tokens', and the final states
        'input', 'mediator' and 'output' (B, U, D) of its groups of latents.
    """
    found: Arrays = {}
    for name, stage in zip(names, stages, strict=True):
        if isinstance(stage, NAC):
            found |= stage.forward(x, {})
        if isinstance(stage, ViTStage | VMoEStage) and stage.last:
            found["class_token"] = stage.features(_blocks(stage, x)[0])
        x = found[name] = stage(x)
    return found


def attention(stages: Sequence[chain.Stage], x: jax.Array) -> Arrays:
    """Attention maps of a network.

    Args:
        stages: of the network, in order.
        x: what the first stage takes.

    Returns:
        Of transformers 'blocks' (L, B, A, N, N): row n says what token n attends to, and sums to
        one. Of a NAC 'read_in' (B, U, A, N), what each input latent reads, and 'links' (I, M, V),
        the probability of each link from a sender (input latents, then mediators) to a mediator.

    Raises:
        UserError: a stage has no attention maps.
    """
    maps = []
    for stage in stages:
        if isinstance(stage, NAC):
            return _nac_attention(stage, x)
        if not isinstance(stage, ViTStage | VMoEStage):
            raise UserError(f"attention: there are no attention maps of a {type(stage).__name__}")
        maps += _blocks(stage, x)[1]
        x = stage(x)
    return {"blocks": jnp.stack(maps)} if maps else {}


def attention_weights(layer: Attention, x: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) of a layer's input (B, N, D) -> (B, A, N, N), float32."""
    q, k, _ = rearrange(layer.qkv(x), "b n (i h c) -> i b n h c", i=3, h=layer.heads)
    scores = jnp.einsum("bnhc,bmhc->bhnm", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(q.shape[-1]))


def _blocks(stage: ViTStage | VMoEStage, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Tokens (B, N, D) after a transformer stage's blocks, and each block's attention weights."""
    if stage.first:
        x = stage.embed(x)
    if isinstance(stage, ViTStage):
        stacks = [stage.blocks] if stage.depth else []
    else:
        segments = [getattr(stage, n) for n in sorted(vars(stage), key=_number) if _number(n) >= 0]
        stacks = [s.blocks for s in segments if isinstance(s, Segment)]
    maps = []
    for stack in stacks:
        graph, state = nnx.split(stack)
        for i in range(jax.tree.leaves(state)[0].shape[0]):
            block = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
            kind = getattr(block, "kind", None)
            inside = block.pre_stitch(x) if kind is not None and kind.pre else x
            maps.append(attention_weights(block.attn, block.norm1(inside)))
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
    return x, maps


def _number(name: str) -> int:
    """i of 'segment_i'; -1 of any other name."""
    prefix, _, number = name.rpartition("_")
    return int(number) if prefix == "segment" and number.isdecimal() else -1


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
    return {"read_in": read_in, "links": jnp.stack(links)}
