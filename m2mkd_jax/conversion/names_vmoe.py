"""The table of names of a V-MoE (see names.py).

The published layout is that of docs/reference.md#vmoe-checkpoints.
"""

from __future__ import annotations

from m2mkd_jax.conversion.names import ArrayPath, Entry, classifier, embedding, linear, norm
from m2mkd_jax.models.moe.spec import BlockKind, VMoESpec, segments

# Our name and the published one of an expert's two layers.
EXPERT_LAYERS = (("fc1", "htoh4"), ("fc2", "h4toh"))


def vmoe_stage_names(
    spec: VMoESpec, start: int, depth: int, *, first: bool, last: bool, offset: int = 0
) -> list[Entry]:
    """The table of one V-MoE stage; each layer of each expert is a tensor of its own.

    Args:
        spec: fields of the network; its block numbers are those of the whole network.
        start: number of the stage's first block in the network.
        depth: blocks in the stage.
        first: whether it has the embedding.
        last: whether it has the final norm and the head.
        offset: number of its first block in the tensors' names, `blocks.{offset}`: 0 in the
            checkpoint of a stage or student, `start` in that of a whole network.
    """
    table = embedding() if first else []
    number = offset
    for i, (kind, count) in enumerate(segments(spec, start, depth)):
        ours = (f"segment_{i}", "blocks")
        for j in range(count):
            table += vmoe_block_names(f"blocks.{number}", ours, j, kind, spec)
            number += 1
    return table + (classifier() if last else [])


def vmoe_block_names(
    torch: str, ours: ArrayPath, index: int, kind: BlockKind, spec: VMoESpec
) -> list[Entry]:
    """The table of one block.

    Args:
        torch: name of the block in a file.
        ours: path of the stack that it is in.
        index: its place in the stack.
        kind: its structure.
        spec: fields of the network.
    """
    table: list[Entry] = []
    for stitch in ("pre_stitch",) * kind.pre + ("post_stitch",) * kind.post:
        table += norm(f"{torch}.{stitch}.ln", (*ours, stitch, "norm"), index)
        table += linear(f"{torch}.{stitch}.fc", (*ours, stitch, "linear"), index)
    for name in ("norm1", "norm2"):
        table += norm(f"{torch}.{name}", (*ours, name), index)
    table += linear(f"{torch}.attn.qkv", (*ours, "attn", "qkv"), index, spec.vit.qkv_bias)
    table += linear(f"{torch}.attn.proj", (*ours, "attn", "proj"), index)
    if kind.moe:
        return table + _mixture(f"{torch}.moe", (*ours, "moe"), index, spec.experts)
    for name in ("fc1", "fc2"):
        table += linear(f"{torch}.mlp.{name}", (*ours, "mlp", name), index)
    return table


def _mixture(torch: str, path: ArrayPath, block: int, experts: int) -> list[Entry]:
    """The router and the experts of one block."""
    table = [*linear(f"{torch}.gate.gate", (*path, "router", "linear"), block)]
    for expert in range(experts):
        for ours, theirs in EXPERT_LAYERS:
            tensor, array = f"{torch}.experts.{expert}.{theirs}", (*path, "experts", ours)
            index = (block, expert)
            table.append(Entry(f"{tensor}.weight", (*array, "kernel"), "expert", index))
            table.append(Entry(f"{tensor}.bias", (*array, "bias"), "expert", index))
    return table
