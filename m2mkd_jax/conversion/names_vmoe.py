"""The table of names of a V-MoE (see torch_names.py)."""

from __future__ import annotations

from m2mkd_jax.conversion.names import Entry, classifier, embedding, linear, norm
from m2mkd_jax.models.moe.spec import VMoESpec, segments

# Our name and the published one of an expert's two layers.
EXPERT_LAYERS = (("fc1", "htoh4"), ("fc2", "h4toh"))


def vmoe_stage_names(
    spec: VMoESpec, start: int, depth: int, *, first: bool, last: bool, offset: int = 0
) -> list[Entry]:
    """Stage of blocks start .. start + depth, the first of which is called `blocks.{offset}`.

    The published checkpoints of a stage or student count from 0; in those of a whole network the
    offset is `start`. One tensor per expert and layer, as published (reference section 2).
    """
    table = embedding() if first else []
    number = offset
    for i, (kind, count) in enumerate(segments(spec, start, depth)):
        ours = (f"segment_{i}", "blocks")
        for j in range(count):
            torch = f"blocks.{number}"
            number += 1
            stitches = ("pre_stitch",) * kind.pre + ("post_stitch",) * kind.post
            for stitch in stitches:
                table += norm(f"{torch}.{stitch}.ln", (*ours, stitch, "norm"), j)
                table += linear(f"{torch}.{stitch}.fc", (*ours, stitch, "linear"), j)
            for name in ("norm1", "norm2"):
                table += norm(f"{torch}.{name}", (*ours, name), j)
            table += linear(f"{torch}.attn.qkv", (*ours, "attn", "qkv"), j, spec.vit.qkv_bias)
            table += linear(f"{torch}.attn.proj", (*ours, "attn", "proj"), j)
            if kind.moe:
                table += _mixture(f"{torch}.moe", (*ours, "moe"), j, spec.experts)
            else:
                for name in ("fc1", "fc2"):
                    table += linear(f"{torch}.mlp.{name}", (*ours, "mlp", name), j)
    return table + (classifier() if last else [])


def _mixture(torch: str, path: tuple, block: int, experts: int) -> list[Entry]:
    table = [*linear(f"{torch}.gate.gate", (*path, "router", "linear"), block)]
    for expert in range(experts):
        for ours, theirs in EXPERT_LAYERS:
            tensor, array = f"{torch}.experts.{expert}.{theirs}", (*path, "experts", ours)
            index = (block, expert)
            table.append(Entry(f"{tensor}.weight", (*array, "kernel"), "expert", index))
            table.append(Entry(f"{tensor}.bias", (*array, "bias"), "expert", index))
    return table
