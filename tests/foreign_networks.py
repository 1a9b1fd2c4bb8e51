"""Tiny networks of other programs: random checkpoints, and what they compute, written out in numpy.

Axes: B images, S image side, P patch side, N tokens, D width, H heads, C channels of a head, F
channels inside an MLP, E experts, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgpack
import numpy as np
from scipy.special import erf, softmax

SIDE, PATCH, WIDTH, HEADS, DEPTH, CLASSES, EXPERTS = 16, 8, 12, 3, 2, 5, 4
Arrays = Mapping[str, np.ndarray]
Draw = Callable[..., np.ndarray]


def draws(seed: int) -> Draw:
    generator = np.random.default_rng(seed)
    return lambda *shape: 0.3 * generator.standard_normal(shape, np.float32)


def timm_vit(seed: int = 0, *, layer_scale: bool = False, head: bool = True) -> dict:
    """A state dict with the names of timm's VisionTransformer."""
    draw, d = draws(seed), WIDTH
    state = {
        "cls_token": draw(1, 1, d),
        "pos_embed": draw(1, (SIDE // PATCH) ** 2 + 1, d),
        "patch_embed.proj.weight": draw(d, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(d),
    }
    for i in range(DEPTH):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": 1 + draw(d), f"{block}.{norm}.bias": draw(d)}
        for name, c, f in (
            ("attn.qkv", d, 3 * d),
            ("attn.proj", d, d),
            ("mlp.fc1", d, 4 * d),
            ("mlp.fc2", 4 * d, d),
        ):
            state |= {f"{block}.{name}.weight": draw(f, c), f"{block}.{name}.bias": draw(f)}
        if layer_scale:
            state |= {f"{block}.ls{j}.gamma": 0.5 + draw(d) for j in (1, 2)}
    state |= {"norm.weight": 1 + draw(d), "norm.bias": draw(d)}
    if head:
        state |= {"head.weight": draw(CLASSES, d), "head.bias": draw(CLASSES)}
    return state


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def patches(images: np.ndarray) -> np.ndarray:
    """(B, S, S, 3) -> (B, N - 1, P, P, 3)."""
    b, n = len(images), SIDE // PATCH
    cut = images.reshape(b, n, PATCH, n, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(b, n * n, PATCH, PATCH, 3)


def run_timm(state: Arrays, images: np.ndarray) -> np.ndarray:
    """Logits (B, K), or features (B, D) without a head, of a state dict as `timm_vit` makes it."""
    x = np.einsum("bnpqc,dcpq->bnd", patches(images), state["patch_embed.proj.weight"])
    x = x + state["patch_embed.proj.bias"]
    x = np.concatenate([np.repeat(state["cls_token"], len(x), 0), x], 1) + state["pos_embed"]
    for i in range(DEPTH):
        own = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if f"blocks.{i}." in k}
        layer = lambda x, name, own=own: x @ own[f"{name}.weight"].T + own[f"{name}.bias"]
        y = layer(norm(x, own["norm1.weight"], own["norm1.bias"]), "attn.qkv")
        q, k, v = y.reshape(*y.shape[:2], 3, HEADS, -1).transpose(2, 0, 1, 3, 4)
        shares = softmax(np.einsum("bnhc,bmhc->bhnm", q, k) / np.sqrt(q.shape[-1]), -1)
        y = np.einsum("bhnm,bmhc->bnhc", shares, v).reshape(x.shape)
        x = x + own.get("ls1.gamma", 1) * layer(y, "attn.proj")
        y = gelu(layer(norm(x, own["norm2.weight"], own["norm2.bias"]), "mlp.fc1"))
        x = x + own.get("ls2.gamma", 1) * layer(y, "mlp.fc2")
    x = norm(x, state["norm.weight"], state["norm.bias"])[:, 0]
    return x @ state["head.weight"].T + state["head.bias"] if "head.weight" in state else x


def google_npz(seed: int = 0, *, moe: bool = False) -> dict:
    """The arrays of a checkpoint of Google's ViT, or of its V-MoE, experts in the last block."""
    draw, d, c = draws(seed), WIDTH, WIDTH // HEADS
    root = "Encoder" if moe else "Transformer"
    attention = "SelfAttention" if moe else "MultiHeadDotProductAttention_1"
    second, mlp = ("LayerNorm_1", "Mlp") if moe else ("LayerNorm_2", "MlpBlock_3")
    arrays = {
        "cls": draw(1, 1, d),
        "embedding/kernel": draw(PATCH, PATCH, 3, d),
        "embedding/bias": draw(d),
        f"{root}/posembed_input/pos_embedding": draw(1, (SIDE // PATCH) ** 2 + 1, d),
        f"{root}/encoder_norm/scale": 1 + draw(d),
        f"{root}/encoder_norm/bias": draw(d),
        "head/kernel": draw(d, CLASSES),
        "head/bias": draw(CLASSES),
    }
    for i in range(DEPTH):
        block = f"{root}/encoderblock_{i}"
        for name in ("LayerNorm_0", second):
            arrays |= {f"{block}/{name}/scale": 1 + draw(d), f"{block}/{name}/bias": draw(d)}
        for name in ("query", "key", "value"):
            arrays[f"{block}/{attention}/{name}/kernel"] = draw(d, HEADS, c)
            arrays[f"{block}/{attention}/{name}/bias"] = draw(HEADS, c)
        arrays[f"{block}/{attention}/out/kernel"] = draw(HEADS, c, d)
        arrays[f"{block}/{attention}/out/bias"] = draw(d)
        sparse = moe and i == DEPTH - 1
        own, lead = ("Moe/Mlp", (EXPERTS,)) if sparse else (mlp, ())
        for layer, inner, outer in (("Dense_0", d, 4 * d), ("Dense_1", 4 * d, d)):
            arrays[f"{block}/{own}/{layer}/kernel"] = draw(*lead, inner, outer)
            arrays[f"{block}/{own}/{layer}/bias"] = draw(*lead, outer)
        if sparse:
            arrays[f"{block}/Moe/Router/dense/kernel"] = draw(d, EXPERTS)
    return arrays


def write_google_shards(prefix: Path, arrays: Arrays, files: int = 2) -> Path:
    """Writes arrays as vmoe shards them, those of experts over all files; returns the index."""

    def packed(code: int, value: object) -> msgpack.ExtType:
        return msgpack.ExtType(code, msgpack.packb(value))

    def slices(where: Sequence[tuple[int, int]]) -> list[bytes]:
        return [msgpack.packb((start, stop, None)) for start, stop in where]

    held: list[dict] = [{"__msgpack_array_chunk_a87ca2__": True} for _ in range(files)]
    index: dict = {}
    order = sorted(arrays, key=lambda name: name.split("/"))
    for number, name in enumerate(order):
        array, whole = arrays[name], [(0, n) for n in arrays[name].shape]
        parts, places = [whole], [number % files]
        if "Moe/Mlp" in name:
            step = EXPERTS // files
            parts = [[(i * step, (i + 1) * step), *whole[1:]] for i in range(files)]
            places = list(range(files))
        for where, place in zip(parts, places, strict=True):
            flat = array[tuple(slice(*pair) for pair in where)].reshape(-1)
            pieces = [
                packed(1, ((len(half),), "float32", half.tobytes()))
                for half in (flat[:5], flat[5:])
            ]
            held[place].setdefault(str(number), []).append([pieces, packed(6, slices(where))])
        shape = msgpack.packb((array.shape, "float32", False, {}))
        entry = packed(8, (shape, [msgpack.packb(slices(w)) for w in parts], places))
        *folders, leaf = name.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), folders, index)[leaf] = entry
    for place, content in enumerate(held):
        file = prefix.with_name(f"{prefix.name}.data-{place:05d}-of-{files:05d}")
        file.write_bytes(msgpack.packb(content))
    path = prefix.with_name(f"{prefix.name}.index")
    path.write_bytes(msgpack.packb({"shard_count": files, "index": index}))
    return path


def run_google(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """Logits (B, K) of a checkpoint as `google_npz` makes it, with the exact GELU."""
    moe = "Encoder/encoder_norm/scale" in arrays
    root = "Encoder" if moe else "Transformer"
    attention = "SelfAttention" if moe else "MultiHeadDotProductAttention_1"
    second, mlp = ("LayerNorm_1", "Mlp") if moe else ("LayerNorm_2", "MlpBlock_3")
    x = np.einsum("bnpqc,pqcd->bnd", patches(images), arrays["embedding/kernel"])
    x = np.concatenate([np.repeat(arrays["cls"], len(x), 0), x + arrays["embedding/bias"]], 1)
    x = x + arrays[f"{root}/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        start = f"{root}/encoderblock_{i}/"
        own = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
        y = norm(x, own["LayerNorm_0/scale"], own["LayerNorm_0/bias"])
        q, k, v = (
            np.einsum("bnd,dhc->bnhc", y, own[f"{attention}/{name}/kernel"])
            + own[f"{attention}/{name}/bias"]
            for name in ("query", "key", "value")
        )
        shares = softmax(np.einsum("bnhc,bmhc->bhnm", q, k) / np.sqrt(q.shape[-1]), -1)
        y = np.einsum("bhnm,bmhc->bnhc", shares, v)
        x = x + np.einsum("bnhc,hcd->bnd", y, own[f"{attention}/out/kernel"])
        x = x + own[f"{attention}/out/bias"]
        y = norm(x, own[f"{second}/scale"], own[f"{second}/bias"])
        if "Moe/Router/dense/kernel" in own:
            x = x + _experts(own, y)
            continue
        y = gelu(y @ own[f"{mlp}/Dense_0/kernel"] + own[f"{mlp}/Dense_0/bias"])
        x = x + y @ own[f"{mlp}/Dense_1/kernel"] + own[f"{mlp}/Dense_1/bias"]
    x = norm(x, arrays[f"{root}/encoder_norm/scale"], arrays[f"{root}/encoder_norm/bias"])
    return x[:, 0] @ arrays["head/kernel"] + arrays["head/bias"]


def _experts(own: Arrays, y: np.ndarray) -> np.ndarray:
    """Two experts of each token, weighted by a softmax over all of them."""
    gates = softmax(y @ own["Moe/Router/dense/kernel"], -1)
    gates = np.where(gates >= np.sort(gates, -1)[..., -2:-1], gates, 0)
    layers = [own[f"Moe/Mlp/Dense_{j}/{leaf}"] for j in (0, 1) for leaf in ("kernel", "bias")]
    hidden = gelu(np.einsum("bnd,edf->ebnf", y, layers[0]) + layers[1][:, None, None])
    rows = np.einsum("ebnf,efd->ebnd", hidden, layers[2]) + layers[3][:, None, None]
    return np.einsum("ebnd,bne->bnd", rows, gates)
