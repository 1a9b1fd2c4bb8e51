"""Reads the checkpoints of Google's vision transformers and V-MoEs under the names of PyTorch.

Arrays are called by their path in a Flax tree, dense networks as in vision_transformer (arXiv
2010.11929), sparse ones as in vmoe (arXiv 2106.05974). They are in one .npz, or in the sharded
files of vmoe (google_shards.py). Shapes: D width, H heads, C channels of a head, F channels inside
an MLP, E experts, P patch side, I channels of an image, T positions, K classes.

    theirs                                                        ours, of block i
    embedding/kernel (P, P, I, D)                                 patch_embed.proj.weight
    cls (1, 1, D)                                                 cls_token
    {root}/posembed_input/pos_embedding (1, T, D)                 pos_embed
    {block}/LayerNorm_0                                           norm1
    {block}/{attention}/query, key, value: kernel (D, H, C)       attn.qkv
    {block}/{attention}/out/kernel (H, C, D)                      attn.proj
    {block}/LayerNorm_2, or LayerNorm_1                           norm2
    {block}/MlpBlock_3, or Mlp: Dense_0 (D, F), Dense_1           mlp.fc1, mlp.fc2
    {block}/Moe/Mlp: Dense_0 (E, D, F), Dense_1                   moe.experts
    {block}/Moe/Router/dense/kernel (D, E)                        moe.gate.gate
    {root}/encoder_norm, head                                     norm, head

Their routers have no bias, so that ours starts at zero. Their GELU is the tanh approximation, ours
exact: outputs differ by about 1e-3 of the largest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from m2mkd_jax.conversion import google_shards
from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.conversion.torch_layouts import expert_names, published_layout
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError

_TYPES = ("f2", "f4", "V2")  # V2: bfloat16, see `_Arrays.read`
SUFFIXES = (".npz", google_shards.SUFFIX)
NORMALISATION = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
_BLOCK = re.compile(r"(?:Transformer|Encoder)/encoderblock_(\d+)/(.+)$")
_ATTENTION = r"(?:MultiHeadDotProductAttention_1|SelfAttention)"
_MLP = r"(?:MlpBlock_3|Mlp)"
_ROOT = r"(?:Transformer|Encoder)"
# Prefixes of a training state that holds the parameters.
_WRAPPERS = ("params/", "target/", "opt/target/")
_REFUSED = {
    "pre_logits/": "a layer between the class token and the head (pre_logits)",
    "MapHead": "attention pooling (MapHead)",
    "conv_root/": "a convolutional stem (a hybrid of ResNet and transformer)",
    "query_norm": "normalised queries and keys",
}

Arrays = Mapping[str, np.ndarray]


def read_google(path: Path) -> TorchWeights:
    """Opens a checkpoint; its values are read when they are used.

    Raises:
        UserError: it cannot be read, is of another layout, or has parts that have no place here.
    """
    arrays = _Arrays(path)
    names, heads = arrays.shapes, 0
    tensors: dict[str, Tensor] = {}
    for name, shape in names.items():
        for words, what in _REFUSED.items():
            if words in name:
                raise UserError(f"{path}: it has {what}, which the networks here have no place for")
        if re.search(rf"{_ATTENTION}/query/kernel$", name) and len(shape) == 3:
            heads = shape[1]
    if not heads:
        raise UserError(
            f"{path} is no checkpoint of Google's ViT or V-MoE; it has {', '.join(list(names)[:3])}"
        )
    used: set[str] = set()
    for name in names:
        _add(tensors, name, arrays, used)
    unknown = sorted(set(names) - used)
    if unknown:
        raise UserError(f'{path}: array "{unknown[0]}" has no place in a ViT or V-MoE')
    if "cls_token" not in tensors:
        raise UserError(f'{path}: it has no class token (array "cls"): average pooling is not here')
    kind = "vmoe" if any(".moe." in name for name in tensors) else "vit"
    weights = TorchWeights(kind, published_layout(list(tensors), None), entries={"heads": heads})
    weights.tensors = tensors
    weights.aliases = {name: [tensor.name] for name, tensor in tensors.items()}
    return weights


class _Arrays:
    """The arrays of a checkpoint by their names, without the wrapper of a training state.

    Attributes:
        path: of the checkpoint.
        shapes: by name.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._shards = google_shards.Shards(path) if path.suffix == google_shards.SUFFIX else None
        shapes = self._shards.shapes if self._shards else _npz_shapes(path)
        self._names = {_bare(name): name for name, shape in shapes.items() if shape}
        self.shapes = {bare: shapes[name] for bare, name in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """An array."""
        if self._shards:
            array = self._shards.read(self._names[name])
        else:
            with open(self.path, "rb") as content, np.load(content, allow_pickle=False) as file:
                array = file[self._names[name]]
        # numpy writes bfloat16 as two bytes of no type.
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of an .npz.

    Raises:
        UserError: it cannot be read, or an array of weights is of another type.
    """
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = ((name, file[name]) for name in file.files)
            found = {name: (array.shape, array.dtype.str[1:]) for name, array in arrays}
    except Exception as error:  # a broken file can cause any error in zipfile, zlib and numpy
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason[:200]}") from None
    for name, (shape, kind) in found.items():
        if shape and kind not in _TYPES:  # numbers alone, such as a step, are no weights
            raise UserError(
                f'{path}: array "{name}" is of the type {kind}; weights are of 16 or 32 bits'
            )
    return {name: shape for name, (shape, _) in found.items()}


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _add(
    tensors: dict[str, Tensor],
    name: str,
    arrays: _Arrays,
    used: set[str],
) -> None:
    """Adds the tensors that the array `name` becomes, or begins; notes which arrays are used."""
    shapes, path = arrays.shapes, arrays.path

    def put(
        target: str, parts: list[str], change: Callable[[list[np.ndarray]], np.ndarray]
    ) -> None:
        reads = [functools.partial(arrays.read, part) for part in parts]
        try:
            shape = change([np.broadcast_to(np.float32(0), shapes[part]) for part in parts]).shape
        except (ValueError, IndexError):
            found = ", ".join(f"{part} {shapes[part]}" for part in parts)
            raise UserError(f"{path}: {found} cannot be {target} by its axes") from None
        read = lambda: np.ascontiguousarray(change([one() for one in reads]))
        tensors[target] = Tensor(parts[0], shape, "float32", (str(path), target), read, False)
        used.update(parts)

    block = _BLOCK.match(name)
    if not block:
        if target := _outside(name):
            put(target, [name], lambda arrays: _torch_layout(arrays[0], target))
        return
    start, inside = f"blocks.{block[1]}", block[2]
    if match := re.match(rf"({_ATTENTION})/query/(kernel|bias)$", inside):
        before = name.removesuffix(f"query/{match[2]}")
        parts = [f"{before}{part}/{match[2]}" for part in ("query", "key", "value")]
        missing = [part for part in parts if part not in shapes]
        if missing:
            raise UserError(f'{path}: array "{missing[0]}" is missing')
        if len({shapes[part] for part in parts}) > 1:
            raise UserError(f"{path}: {', '.join(parts)} are of unequal shapes")
        word = "weight" if match[2] == "kernel" else "bias"
        put(f"{start}.attn.qkv.{word}", parts, _joined_heads)
    elif match := re.match(r"Moe/Mlp/(Dense_[01])/(kernel|bias)$", inside):
        _add_experts(put, start, name, shapes[name], match[1], match[2])
    elif target := _inside(inside):
        put(f"{start}.{target}", [name], lambda arrays: _torch_layout(arrays[0], target))
        if target == "moe.gate.gate.weight":
            count = shapes[name][1]
            zeros = lambda: np.zeros(count, np.float32)
            bias = f"{start}.moe.gate.gate.bias"
            tensors[bias] = Tensor(f"{name} (no bias)", (count,), "float32", (bias,), zeros, False)


def _add_experts(
    put: Callable[..., None], start: str, name: str, shape: tuple[int, ...], layer: str, leaf: str
) -> None:
    """Adds a layer of all experts as tensors of single ones."""
    ours = {"Dense_0": "htoh4", "Dense_1": "h4toh"}[layer]
    word = "weight" if leaf == "kernel" else "bias"
    singles = expert_names(f"{start}.moe.experts.{ours}.{word}", shape[0])
    axes = (0, 2, 1) if leaf == "kernel" else (0, 1)
    for i, target in enumerate(singles):
        put(target, [name], lambda arrays, i=i: arrays[0][i : i + 1].transpose(axes))


def _outside(name: str) -> str:
    """The tensor outside the blocks that an array is; "" for none."""
    for pattern, target in (
        (r"embedding/", "patch_embed.proj."),
        (rf"{_ROOT}/encoder_norm/", "norm."),
        (r"head/", "head."),
    ):
        if match := re.match(pattern + r"(kernel|scale|bias)$", name):
            return target + ("bias" if match[1] == "bias" else "weight")
    if re.match(rf"{_ROOT}/posembed_input/pos_embedding$", name):
        return "pos_embed"
    return "cls_token" if name == "cls" else ""


def _inside(name: str) -> str:
    """The tensor of a block that an array is; "" for none, or a part of one."""
    for pattern, target in (
        (r"LayerNorm_0/", "norm1."),
        (r"LayerNorm_[12]/", "norm2."),
        (rf"{_ATTENTION}/out/", "attn.proj."),
        (rf"{_MLP}/Dense_0/", "mlp.fc1."),
        (rf"{_MLP}/Dense_1/", "mlp.fc2."),
        (r"Moe/Router/dense/", "moe.gate.gate."),
    ):
        if match := re.match(pattern + r"(kernel|scale|bias)$", name):
            return target + ("bias" if match[1] == "bias" else "weight")
    return ""


def _joined_heads(arrays: list[np.ndarray]) -> np.ndarray:
    """Query, key and value: kernels (D, H, C) -> (3 H C, D), biases (H, C) -> (3 H C,)."""
    if arrays[0].ndim == 3:
        return np.concatenate([a.reshape(len(a), -1).T for a in arrays])
    return np.concatenate([a.reshape(-1) for a in arrays])


def _torch_layout(array: np.ndarray, target: str) -> np.ndarray:
    """An array in PyTorch's layout."""
    if target == "patch_embed.proj.weight":
        return array.transpose(3, 2, 0, 1)
    if target == "attn.proj.weight":
        return array.reshape(-1, array.shape[-1]).T
    return array.T if target.endswith(".weight") and array.ndim == 2 else array
