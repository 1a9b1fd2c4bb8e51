"""The tables of names of a NAC and of its students (see names.py).

The networks are described in docs/reference.md#nac and docs/reference.md#nac-students.
"""

from __future__ import annotations

from collections.abc import Iterator

from m2mkd_jax.conversion.names import ArrayPath, Entry, Index, linear, norm, patches
from m2mkd_jax.models.nac.spec import NACSpec


def _modulated(
    torch: str, path: ArrayPath, index: Index = None, bias: bool = True
) -> Iterator[Entry]:
    """A linear layer whose input a latent's code modulates (ModFC)."""
    yield Entry(f"{torch}.native_weight", (*path, "kernel"), "linear", index)
    if bias:
        yield Entry(f"{torch}.native_bias", (*path, "bias"), "same", index)
    yield Entry(f"{torch}.scale_gain", (*path, "gain"), "same", index)
    yield Entry(f"{torch}.scale.weight", (*path, "scale", "kernel"), "linear", index)


def _modulated_ffn(torch: str, path: ArrayPath, index: Index = None) -> Iterator[Entry]:
    """A feed-forward layer of two modulated linear ones."""
    yield from norm(f"{torch}.layernorm", (*path, "norm"), index)
    yield from _modulated(f"{torch}.ffn.0", (*path, "fc1"), index)
    yield from _modulated(f"{torch}.ffn.2", (*path, "fc2"), index)
    yield Entry(f"{torch}.layer_scale.gamma", (*path, "gamma"), "same", index)


def _attention(
    torch: str,
    path: ArrayPath,
    index: Index = None,
    *,
    sender_norm: bool,
    kernel: bool,
    qkv_bias: bool,
) -> Iterator[Entry]:
    """Modulated attention; `kernel`: with a bandwidth for the kernel on signatures."""
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
    path: ArrayPath,
    spec: NACSpec,
    index: Index = None,
    *,
    sender_norm: bool,
    kernel: bool,
    ffn: bool = True,
) -> Iterator[Entry]:
    """Attention among latents, and the feed-forward layer after it."""
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


def _tokenizer(torch: str, path: ArrayPath, spec: NACSpec) -> Iterator[Entry]:
    """The ConvNeXt stages that make tokens of an image, and the grid of positions."""
    backbone = f"{torch}.backbone"
    for i, depth in enumerate(spec.tokenizer_depths):
        stage, down = (*path, f"stage_{i}"), f"{backbone}.downsample_layers.{i}"
        conv, layer_norm = (0, 1) if i == 0 else (1, 0)
        yield from patches(f"{down}.{conv}", (*stage, "downsample"))
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


def _read_in(torch: str, path: ArrayPath, spec: NACSpec) -> Iterator[Entry]:
    """Attention from the input latents to the image tokens, and its feed-forward layer."""
    yield from _attention(
        f"{torch}.read_in_attention",
        (*path, "attention"),
        sender_norm=True,
        kernel=False,
        qkv_bias=spec.qkv_bias,
    )
    yield from _modulated_ffn(f"{torch}.ffn", (*path, "ffn"))


def _pooling(torch: str, path: ArrayPath) -> Iterator[Entry]:
    """The layers that make logits of the output latents."""
    yield from linear(f"{torch}.confidence_scorer", (*path, "confidence"))
    yield from linear(f"{torch}.to_logits", (*path, "to_logits"))


def nac_names(spec: NACSpec) -> list[Entry]:
    """The table of a whole NAC.

    What the iterations share is stored once per iteration, so several entries have one array.
    """
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


def nac_student_names(spec: NACSpec, part: str) -> list[Entry]:
    """The table of a student's trainable parameters.

    Args:
        spec: the student's fields.
        part: 'readin', 'mediator' or 'readout'.
    """
    if part == "readin":
        table = [*_tokenizer("tokenizer", ("tokenizer",), spec)]
        table += _read_in("read_in", ("read_in",), spec)
        return table + list(linear("post_stitch", ("post_stitch",)))
    table = [*linear("pre_stitch", ("pre_stitch",))]
    last = part == "readout"
    table += _latent_layer("", ("layer",), spec, sender_norm=last, kernel=False)
    tail = _pooling("tokenizer", ("pooling",)) if last else linear("post_stitch", ("post_stitch",))
    return table + list(tail)
