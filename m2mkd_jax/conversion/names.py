"""Tables of names: which PyTorch tensor of a published checkpoint is which array of ours.

A table is a list of `Entry`; the same table reads (`from_torch`) and writes (`to_torch`). Layouts:

    same        as it is
    linear      (D, C) <-> (C, D)
    patches     convolution (D, C, P, P) <-> (P*P*C, D), rows ordered (row, column, channel)
    depthwise   (C, 1, K, K) <-> (K, K, C)
    grid        (C, H, W) <-> (H, W, C)
    expert      a tensor of one expert, (1, D, C) <-> (C, D) or (1, D) <-> (D)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.spec import NACSpec


@dataclass(frozen=True)
class Entry:
    """`torch` names a tensor; `path` our array, `index` its place along the stacked axes, if any.

    Blocks are stacked along one axis, experts of blocks along two.
    """

    torch: str
    path: tuple[str, ...]
    layout: str = "same"
    index: int | tuple[int, ...] | None = None


def read_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A tensor of PyTorch as our array."""
    if layout == "linear":
        return array.T
    if layout == "patches":
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if layout == "depthwise":
        return array[:, 0].transpose(1, 2, 0)
    if layout == "expert":
        return array[0].T
    return array.transpose(1, 2, 0) if layout == "grid" else array


def write_layout(array: np.ndarray, entry: Entry, patch: int | None) -> np.ndarray:
    """Our array as the tensor of PyTorch. `patch`: side of the ViT's patches."""
    layout = entry.layout
    if layout == "linear":
        return array.T
    if layout == "patches":
        side = patch
        if entry.path[0] != "patch_embed":
            side = 4 if "stage_0" in entry.path else 2  # tokenizer: stem, then downsampling
        return array.reshape(side, side, -1, array.shape[-1]).transpose(3, 2, 0, 1)
    if layout == "depthwise":
        return array.transpose(2, 0, 1)[:, None]
    if layout == "expert":
        return array.T[None]
    return array.transpose(2, 0, 1) if layout == "grid" else array


def arrays_from_torch(table: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> dict:
    """Arrays by PyTorch name -> our nested dict.

    Raises:
        UserError: a tensor that the table needs is missing, or one that it does not know is there.
    """
    known = {entry.torch for entry in table}
    for name in tensors:
        if name not in known:
            raise UserError(f'checkpoint: unexpected tensor "{name}"')
    stacks: dict[tuple, list] = {}
    for entry in table:
        if entry.torch not in tensors:
            raise UserError(f'checkpoint: tensor "{entry.torch}" is missing')
        value = read_layout(np.asarray(tensors[entry.torch]), entry.layout)
        stacks.setdefault(entry.path, []).append((entry.index, value))
    tree: dict = {}
    for path, values in stacks.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        if values[0][0] is None:
            node[path[-1]] = np.array(values[0][1], order="C")
        else:
            values.sort(key=lambda v: v[0])
            stacked = np.stack([value for _, value in values])
            last = values[-1][0]
            if isinstance(last, tuple):
                stacked = stacked.reshape(*(i + 1 for i in last), *stacked.shape[1:])
            node[path[-1]] = stacked
    return tree


def arrays_to_torch(table: Sequence[Entry], tree: Mapping, patch: int | None = None) -> dict:
    """Our nested dict -> arrays by PyTorch name. `patch`: side of the ViT's patches."""
    tensors = {}
    for entry in table:
        node = tree
        for name in entry.path:
            node = node[name]
        value = np.asarray(node)
        if entry.index is not None:
            value = value[entry.index]
        tensors[entry.torch] = np.array(write_layout(value, entry, patch), order="C")
    return tensors


def linear(torch: str, path: tuple, index=None, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{torch}.weight", (*path, "kernel"), "linear", index)
    if bias:
        yield Entry(f"{torch}.bias", (*path, "bias"), "same", index)


def norm(torch: str, path: tuple, index=None) -> Iterator[Entry]:
    yield Entry(f"{torch}.weight", (*path, "scale"), "same", index)
    yield Entry(f"{torch}.bias", (*path, "bias"), "same", index)


def _patches(torch: str, path: tuple) -> Iterator[Entry]:
    yield Entry(f"{torch}.weight", (*path, "linear", "kernel"), "patches")
    yield Entry(f"{torch}.bias", (*path, "linear", "bias"))


def embedding() -> list[Entry]:
    """What the first stage of a transformer has besides blocks."""
    table = [Entry("cls_token", ("cls_token",)), Entry("pos_embed", ("pos_embed",))]
    return table + list(_patches("patch_embed.proj", ("patch_embed",)))


def classifier() -> list[Entry]:
    """What the last stage of a transformer has besides blocks."""
    return [*norm("norm", ("norm",)), *linear("head", ("head",))]


def vit_stage_names(
    depth: int, *, first: bool, last: bool, qkv_bias: bool, offset: int = 0
) -> list[Entry]:
    """A ViT stage whose first block is called `blocks.{offset}`."""
    table = embedding() if first else []
    for i in range(depth):
        torch = f"blocks.{offset + i}"
        for name in ("norm1", "norm2"):
            table += norm(f"{torch}.{name}", ("blocks", name), i)
        table += linear(f"{torch}.attn.qkv", ("blocks", "attn", "qkv"), i, qkv_bias)
        table += linear(f"{torch}.attn.proj", ("blocks", "attn", "proj"), i)
        for name in ("fc1", "fc2"):
            table += linear(f"{torch}.mlp.{name}", ("blocks", "mlp", name), i)
    return table + (classifier() if last else [])


def _modulated(torch: str, path: tuple, index=None, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{torch}.native_weight", (*path, "kernel"), "linear", index)
    if bias:
        yield Entry(f"{torch}.native_bias", (*path, "bias"), "same", index)
    yield Entry(f"{torch}.scale_gain", (*path, "gain"), "same", index)
    yield Entry(f"{torch}.scale.weight", (*path, "scale", "kernel"), "linear", index)


def _modulated_ffn(torch: str, path: tuple, index=None) -> Iterator[Entry]:
    yield from norm(f"{torch}.layernorm", (*path, "norm"), index)
    yield from _modulated(f"{torch}.ffn.0", (*path, "fc1"), index)
    yield from _modulated(f"{torch}.ffn.2", (*path, "fc2"), index)
    yield Entry(f"{torch}.layer_scale.gamma", (*path, "gamma"), "same", index)


def _attention(
    torch: str, path: tuple, index=None, *, sender_norm: bool, kernel: bool, qkv_bias: bool
) -> Iterator[Entry]:
    if kernel:
        yield Entry(f"{torch}.kernel.bandwidth", (*path, "bandwidth"), "same", index)
    yield from norm(f"{torch}.receiver_layernorm", (*path, "receiver_norm"), index)
    if sender_norm:
        yield from norm(f"{torch}.sender_layernorm", (*path, "sender_norm"), index)
    for name in ("query", "key", "value"):
        yield from _modulated(f"{torch}.{name}_compiler", (*path, name), index, qkv_bias)
    yield from _modulated(f"{torch}.exit_layer", (*path, "exit"), index)
    yield Entry(f"{torch}.layer_scale.gamma", (*path, "gamma"), "same", index)


def _latent_layer(
    torch: str,
    path: tuple,
    spec: NACSpec,
    index=None,
    *,
    sender_norm: bool,
    kernel: bool,
    ffn: bool = True,
) -> Iterator[Entry]:
    dot = f"{torch}." if torch else ""
    yield from _attention(
        f"{dot}latent_attention",
        (*path, "attention"),
        index,
        sender_norm=sender_norm,
        kernel=kernel,
        qkv_bias=spec.qkv_bias,
    )
    if ffn:
        yield from _modulated_ffn(f"{dot}ffn", (*path, "ffn"), index)


def _tokenizer(torch: str, path: tuple, spec: NACSpec) -> Iterator[Entry]:
    backbone = f"{torch}.backbone"
    for i, depth in enumerate(spec.tokenizer_depths):
        stage, down = (*path, f"stage_{i}"), f"{backbone}.downsample_layers.{i}"
        conv, layer_norm = (0, 1) if i == 0 else (1, 0)
        yield from _patches(f"{down}.{conv}", (*stage, "downsample"))
        yield from norm(f"{down}.{layer_norm}", (*stage, "norm"))
        for j in range(depth):
            block, ours = f"{backbone}.stages.{i}.{j}", (*stage, "blocks")
            yield Entry(f"{block}.dwconv.weight", (*ours, "depthwise", "kernel"), "depthwise", j)
            yield Entry(f"{block}.dwconv.bias", (*ours, "depthwise", "bias"), "same", j)
            yield from norm(f"{block}.norm", (*ours, "norm"), j)
            yield from linear(f"{block}.pwconv1", (*ours, "fc1"), j)
            yield from linear(f"{block}.pwconv2", (*ours, "fc2"), j)
            yield Entry(f"{block}.gamma", (*ours, "gamma"), "same", j)
    yield Entry(f"{torch}.positional_grid.grid", (*path, "grid"), "grid")


def _read_in(torch: str, path: tuple, spec: NACSpec) -> Iterator[Entry]:
    yield from _attention(
        f"{torch}.read_in_attention",
        (*path, "attention"),
        sender_norm=True,
        kernel=False,
        qkv_bias=spec.qkv_bias,
    )
    yield from _modulated_ffn(f"{torch}.ffn", (*path, "ffn"))


def _pooling(torch: str, path: tuple) -> Iterator[Entry]:
    yield from linear(f"{torch}.confidence_scorer", (*path, "confidence"))
    yield from linear(f"{torch}.to_logits", (*path, "to_logits"))


def nac_names(spec: NACSpec) -> list[Entry]:
    """A whole NAC. What iterations share has a name in each of them: several for one array."""
    graph = "latent_graphs.0"
    table: list[Entry] = []
    for group in ("input_latents", "mediator_latents", "output_latents"):
        for name in ("codes", "signatures"):
            table.append(Entry(f"{graph}.{group}.{name}_", (group, name)))
        if not spec.seeder:
            table.append(Entry(f"{graph}.{group}.initial_states_", (group, "states")))
    if spec.seeder:
        table += norm(f"{graph}.latent_seeder.layernorm", ("seeder", "norm"))
        table += linear(f"{graph}.latent_seeder.code_to_state_mu", ("seeder", "mu"))
        table += linear(f"{graph}.latent_seeder.code_to_state_logvar", ("seeder", "logvar"))
    table += _read_in(f"{graph}.read_in", ("read_in",), spec)
    for i in range(spec.iterations):
        propagator, index = f"{graph}.propagators.{i}", 0 if spec.share_propagators else i
        table += _latent_layer(
            propagator,
            ("propagators",),
            spec,
            index,
            sender_norm=False,
            kernel=True,
            ffn=not spec.share_ffn,
        )
        if spec.share_ffn:
            table += _modulated_ffn(f"{propagator}.ffn", ("shared_ffn",))
    table += _latent_layer(f"{graph}.read_out", ("read_out",), spec, sender_norm=True, kernel=True)
    table += _tokenizer("input_tokenizer", ("tokenizer",), spec)
    if spec.output == "pooling":
        table += _pooling("output_tokenizer", ("pooling",))
    return table


def nac_student_names(spec: NACSpec, kind: str) -> list[Entry]:
    """Trainable parameters of a student; kind is 'readin', 'mediator' or 'readout'."""
    if kind == "readin":
        table = [*_tokenizer("tokenizer", ("tokenizer",), spec)]
        table += _read_in("read_in", ("read_in",), spec)
        return table + list(linear("post_stitch", ("post_stitch",)))
    table = [*linear("pre_stitch", ("pre_stitch",))]
    last = kind == "readout"
    table += _latent_layer("", ("layer",), spec, sender_norm=last, kernel=False)
    tail = _pooling("tokenizer", ("pooling",)) if last else linear("post_stitch", ("post_stitch",))
    return table + list(tail)
