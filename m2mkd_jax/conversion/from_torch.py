"""Weights from the published layouts into our trees.

A tree is filled tensor by tensor, each dropped from memory when it is in place, and written before
the next tree is begun: memory stays near the size of the largest stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2mkd_jax.conversion import infer
from m2mkd_jax.conversion.arch_flag import check_fields, read_arch
from m2mkd_jax.conversion.infer_nac import assembled_spec
from m2mkd_jax.conversion.lazy_tensor import Tensor, same
from m2mkd_jax.conversion.name_tables import leaf, place, table
from m2mkd_jax.conversion.names import Entry, nac_names, read_layout
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.conversion.resize_positions import resize_positions
from m2mkd_jax.conversion.torch_layouts import is_stitch, published_layout, whole_name
from m2mkd_jax.conversion.torch_weights import TorchWeights, read_torch_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, registry
from m2mkd_jax.models.nac import priors
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.students import assemble

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_DISTILLED = ("dist_token", "head_dist.weight", "head_dist.bias")


class Trees(Mapping):
    """Trees by name, each made when it is asked for and kept by nobody."""

    def __init__(self, makers: dict[str, Callable[[], dict]]):
        self.makers = makers

    def __getitem__(self, name: str) -> dict:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@dataclasses.dataclass
class Converted:
    """Weights in our trees, made on demand; `report` is complete once all have been."""

    description: dict
    trees: Trees
    report: Report


def read_converted(path: Path, arch: str = "", image_size: int = 0, seed: int = 0) -> Converted:
    """Opens torch weights (a file, or a directory of modules) as our trees; nothing is read yet.

    Args:
        path: .pth, .pt or .safetensors, or a directory of such files.
        arch: what `--arch` says; "" lets the weights decide.
        image_size: resize the position embedding for images of this size; 0: as `arch` or the
            weights say.
        seed: of what a NAC has and its students do not bring, and of a student's codes and states
            where the file has none (the published ones do not).

    Raises:
        UserError: see read_torch_weights, arch.read_arch, infer.describe; or a tensor is
            missing, unknown, or of another shape than the network's.
    """
    source = read_torch_weights(path)
    blocks = sum(source.depths) if source.depths else None
    given = read_arch(arch, source.kind, blocks) if arch else {}
    if image_size:
        given = given | check_fields({"image_size": image_size}, "--image_size")
    return convert(source, given, path, seed)


def convert(source: TorchWeights, given: dict[str, Any], path: Path, seed: int = 0) -> Converted:
    """`read_converted` for weights that are open and fields that are read."""
    report = Report(str(path), dict(source.ignored), dict(source.aliases))
    if "dist_token" in source.tensors:
        _drop_distillation(source, report)
    description, notes = infer.describe(source, given, str(path))
    report.notes += notes
    tensors = _network_tensors(source, description, report)
    if source.kind in ("vit", "vmoe"):
        _fit_positions(tensors, description, report)
    description["normalisation"] = IMAGENET
    description["torch"] = source.layout | {"dtypes": _dtypes(tensors)}
    makers = _makers(source, description, tensors, path, seed, report)
    if (source.kind, given.get("kind")) == ("nac_student", "nac"):
        return _assembled(Trees(makers), description, given, path, seed, report)
    return Converted(description, Trees(makers), report)


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The types that are not float32, which all trees are."""
    return {name: t.dtype for name, t in tensors.items() if t.dtype != "float32"}


def _drop_distillation(source: TorchWeights, report: Report) -> None:
    """A distilled DeiT without its second token: what of it fits a plain vision transformer."""
    for name in _DISTILLED:
        if source.tensors.pop(name, None) is not None:
            report.ignore(name, "distillation token and its head: no place in a plain ViT")
    whole = source.tensors.get("pos_embed")
    if whole is None or len(whole.shape) != 3:
        return  # refused later, by its name
    shape = (1, whole.shape[1] - 1, whole.shape[2])
    keep = [0, *range(2, whole.shape[1])]
    source.tensors["pos_embed"] = dataclasses.replace(
        whole, shape=shape, read=lambda: whole.read()[:, keep], mapped=False
    )
    report.notes.append("pos_embed: the distillation token's position is left out")
    source.layout = published_layout(list(source.tensors), None)  # written back, a plain ViT


def _network_tensors(source: TorchWeights, description: dict, report: Report) -> dict[str, Tensor]:
    """The tensors under the names that the network's tables use."""
    tensors = dict(source.tensors)
    if source.kind != "vmoe":
        return tensors
    if "" not in source.layout["files"]:  # students of a directory become the whole network
        renamed = {name: whole_name(name, source.depths) for name in tensors}
        tensors = {renamed[name]: tensor for name, tensor in tensors.items()}
        report.rename(renamed)
    kept = set(description["spec"]["pre_stitch_pos"]), set(description["spec"]["post_stitch_pos"])
    for name in list(tensors):
        for word, blocks in zip((".pre_stitch.", ".post_stitch."), kept, strict=True):
            if is_stitch(name) and word in name and int(name.split(".")[1]) not in blocks:
                report.ignore(name, "stitch, dropped")
                del tensors[name]
    return tensors


def _fit_positions(tensors: dict[str, Tensor], description: dict, report: Report) -> None:
    spec = registry.spec_of(description)
    vit = getattr(spec, "vit", spec)
    embedding = tensors.get("pos_embed")
    if embedding is None or len(embedding.shape) != 3 or embedding.shape[1] == vit.tokens:
        return
    side = vit.image_size // vit.patch
    tensors["pos_embed"] = dataclasses.replace(
        embedding,
        shape=(1, vit.tokens, embedding.shape[2]),
        # NaN and infinite numbers are refused before they are multiplied.
        read=lambda: resize_positions(embedding.array().astype(np.float32), side).astype(
            embedding.dtype
        ),
        mapped=False,
    )
    report.notes.append(
        f"pos_embed: {embedding.shape[1] - 1} positions resized to {vit.tokens - 1}, bicubic"
    )


def _makers(
    source: TorchWeights, description: dict, tensors: dict, path: Path, seed: int, report: Report
) -> dict[str, Callable[[], dict]]:
    makers, known = {}, set()
    grouped = source.kind == "nac_student" and "" not in source.layout["files"]
    for name in registry.tree_names(description):
        parts = chain.abstract(registry.builder(description, name))
        entries = table(description, name)
        if grouped:
            entries = [dataclasses.replace(e, torch=f"{name}/{e.torch}") for e in entries]
        known |= {entry.torch for entry in entries}
        _check(entries, tensors, parts.params, path)
        extra = {
            key: source.extra[where]
            for key in ("codes", "states")
            if (where := f"{name}/{key}" if grouped else key) in source.extra
        }
        fixed = _fixed(parts.fixed, extra, name, seed, report)
        states = fixed.get("states")
        if states is not None:
            description["states"] = int(states.shape[0])

        def make(name=name, entries=entries, params=parts.params, fixed=fixed) -> dict:
            tree = {"params": _fill(entries, tensors, params, name, report)}
            return tree | ({"fixed": fixed} if fixed else {})

        makers[name] = make
    unknown = [name for name in tensors if name not in known]
    if unknown:
        more = f", nor have {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f'{path}: tensor "{report.shown(unknown[0])}" has no place in this network{more}'
        )
    return makers


def _check(entries: list[Entry], tensors: dict[str, Tensor], params: dict, path: Path) -> None:
    """Every target has its tensor, of the right shape."""
    missing = [entry.torch for entry in entries if entry.torch not in tensors]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f'{path}: tensor "{missing[0]}" is missing{more}')
    filled: dict[tuple, dict[tuple, str]] = {}
    for entry in entries:
        tensor, target = tensors[entry.torch], leaf(params, entry.path)
        wanted = target.shape[len(place(entry.index)) :]
        try:
            shape = _read_shape(tensor.shape, entry.layout)
        except (ValueError, IndexError):
            shape = None
        if shape != wanted:
            raise UserError(
                f'{path}: tensor "{entry.torch}" has shape {tensor.shape}; in this network '
                f"{'/'.join(entry.path)} is {wanted}"
            )
        first = filled.setdefault(entry.path, {}).setdefault(place(entry.index), entry.torch)
        if first != entry.torch and not same(tensors[first], tensor):
            raise UserError(f'{path}: "{first}" and "{entry.torch}" are shared here, and differ')
    for leaf_path, places in filled.items():
        shape = leaf(params, leaf_path).shape
        stacked = len(next(iter(places)))
        assert len(places) == int(np.prod(shape[:stacked])), leaf_path  # a gap in our own table
    assert len(filled) == len(jax.tree.leaves(params))


def _read_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return read_layout(np.broadcast_to(np.float32(0), shape), layout).shape


def _fill(
    entries: list[Entry], tensors: dict[str, Tensor], shapes: dict, tree: str, report: Report
) -> dict:
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    for entry in entries:
        tensor = tensors[entry.torch]
        try:
            array = tensor.array()
        except UserError as error:
            file = report.shown(entry.torch).rpartition(": ")[0]  # where there are several
            raise UserError(f"{report.source}: {file and file + ': '}{error}") from None
        leaf(params, entry.path)[place(entry.index)] = read_layout(array, entry.layout)
        report.used(entry, tensor, tree)
        tensor.release(array)
    return params


def _fixed(shapes: dict, extra: dict[str, Tensor], name: str, seed: int, report: Report) -> dict:
    """A student's codes and states: from the file, or drawn."""
    fixed = {}
    for i, (key, shape) in enumerate(sorted(shapes.items())):
        if key in extra:
            fixed[key] = np.array(extra[key].array(), np.float32)
            report.notes.append(f"{name}/{key}: from the file")
            if fixed[key].shape[1:] != shape.shape[1:]:
                raise UserError(
                    f'{report.source}: "{key}" has shape {fixed[key].shape}, not {shape.shape}'
                )
            continue
        draw = np.random.default_rng([seed, i, registry.index_of(name)])
        fixed[key] = draw.standard_normal(shape.shape, np.float32)
        report.notes.append(f"{name}/{key}: not in the file; drawn from seed {seed}")
    return fixed


def carried(taught: Mapping[str, Any], network: NACSpec, published: str) -> tuple:
    """Whether the students' positional grid and output pooling come along (None: if it fits).

    The published program knows two cases, told by a word, `student_type`: both (ImageNet) or none
    (Tiny-ImageNet, for which it expects the word "tinynet"; its configs say "tinyimnet", with which
    the grid comes along, or stops the program where it does not fit). Without the word: both where
    both fit, for then students and network have one task.
    """
    same_task = (taught["image_size"], taught["classes"]) == (network.image_size, network.classes)
    words = {"imagenet": (True, True), "tinynet": (False, False), "tinyimnet": (None, False)}
    return words.get(published, (same_task, same_task))


def _assembled(
    students: Trees, description: dict, given: dict, path: Path, seed: int, report: Report
) -> Converted:
    """A NAC with the students' weights; what they do not bring is fresh."""
    spec = assembled_spec(description, given, str(path))
    whole = {"kind": "nac", "spec": dataclasses.asdict(spec), "normalisation": IMAGENET}
    build = registry.builder(whole, "nac")
    grid, pooling = carried(description["spec"], spec, given.get("student_type", ""))

    def make() -> dict:
        fresh = jax.tree.map(np.array, chain.initialise(build, jax.random.key(seed)).params)
        prior = given.get("prior", "none")
        if prior != "none":
            options = dict(given.get("prior_options") or {})
            count, dim = spec.mediator_latents, spec.signature_dim
            signatures = priors.prior_signatures(prior, count, dim, options, seed)
            fresh["mediator_latents"]["signatures"] = np.array(signatures)
        taught = [students[name]["params"] for name in students]
        params, _ = assemble(fresh, taught, carry_grid=grid, carry_pooling=pooling)
        params = jax.tree.map(np.asarray, params)
        targets = {(e.path, e.index): e.torch for e in nac_names(spec)}
        # What no student replaced is still the same array.
        kept = {t for t in targets if leaf(params, t[0]) is leaf(fresh, t[0])}
        report.assembled(targets, kept, len(taught), seed)
        return {"params": params}

    return Converted(whole, Trees({"nac": make}), report)
