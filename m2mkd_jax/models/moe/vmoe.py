"""V-MoE: a vision transformer with experts, in stages, and its students.

Axes: B images, T tokens of an image, D width, X stitch width, L blocks, E experts.

A network is divided into stages like a ViT. A student is a stage of the same network with a stitch
at each boundary to another module: the assembled network with its stitches kept is exactly the
chain of the students.

Source: Riquelme et al. 2021 (arXiv 2106.05974), section 2, and arXiv 2402.16918, section 3;
docs/reference.md#vmoe, docs/reference.md#vmoe-students.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import batching, chain, layers
from m2mkd_jax.models.moe import assembly, experts
from m2mkd_jax.models.moe.assembly import assemble, upcycle
from m2mkd_jax.models.moe.blocks import Block
from m2mkd_jax.models.moe.spec import BlockKind, VMoESpec, segments, student_spec
from m2mkd_jax.models.vit import Attention

__all__ = [
    "VMoESpec",
    "VMoEStage",
    "assemble",
    "build",
    "build_stage",
    "build_student",
    "student_spec",
    "upcycle",
]


class Segment(nnx.Module):
    """Neighbouring blocks of one kind, stacked along a leading axis L.

    Args:
        spec, kind, attention, rngs: as for `Block`.
        count: L.
    """

    def __init__(
        self,
        spec: VMoESpec,
        kind: BlockKind,
        count: int,
        *,
        attention: Callable[..., Attention] = Attention,
        rngs: nnx.Rngs,
    ):
        self.count, self.remat, self.spec = count, spec.vit.remat, spec
        self.blocks = layers.stack(
            lambda rngs: Block(spec, kind, attention=attention, rngs=rngs), count, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        rates: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the blocks one after another.

        Args:
            x: tokens (B, T, D or X).
            rates: (L,), of drop-path; None for no drop-path.
            keys: (L,), one per block; None in evaluation, see `blocks.MoE`.

        Returns:
            Tokens (B, T, D or X), and the blocks' auxiliary outputs with a leading axis L.
        """
        return layers.scan_stack(
            self.blocks,
            x,
            (rates, keys),
            lambda block, x, inputs: block(x, *inputs),
            remat=self.remat,
            uncopied=experts.reads_in_stack if self.spec.sorts_rows(keys is not None) else None,
        )


class VMoEStage(chain.Stage):
    """Blocks [start, start + depth) of a V-MoE.

    The first stage has the embedding before its blocks, the last one norm and head after them.

    Raises:
        UserError: a stitch without its counterpart, within the stage or at the network's ends.
    """

    def __init__(
        self, spec: VMoESpec, start: int, depth: int, *, first: bool, last: bool, rngs: nnx.Rngs
    ):
        self.spec, self.start, self.depth = spec, start, depth
        self.first, self.last = first, last
        _check_stitches(spec, start, depth, first, last)
        vit = spec.vit
        if first:
            self.patch_embed = layers.Patches(vit.patch, vit.channels, vit.width, rngs=rngs)
            self.cls_token = nnx.Param(layers.transformer_init(rngs.params(), (1, 1, vit.width)))
            shape = (1, vit.tokens, vit.width)
            self.pos_embed = nnx.Param(layers.transformer_init(rngs.params(), shape))
        for i, (kind, count) in enumerate(segments(spec, start, depth)):
            setattr(self, f"segment_{i}", Segment(spec, kind, count, rngs=rngs))
        if last:
            self.norm = layers.layer_norm(vit.width, vit.eps, rngs=rngs)
            self.head = nnx.Linear(
                vit.width, vit.classes, kernel_init=layers.transformer_init, rngs=rngs
            )

    def embed(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, C) -> tokens (B, T, D)."""
        patches = rearrange(self.patch_embed(images), "b h w d -> b (h w) d")
        cls = jnp.broadcast_to(self.cls_token[...], (images.shape[0], 1, self.spec.vit.width))
        tokens = jnp.concatenate([cls.astype(patches.dtype), patches], 1)
        return batching.add_to_images(tokens, self.pos_embed[...])

    def features(self, tokens: jax.Array) -> jax.Array:
        """Tokens (B, T, D) -> normalised class token (B, D), the head's input."""
        return self.norm(tokens)[:, 0]

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Images (B, H, W, C) or tokens (B, T, D or X) -> tokens (B, T, D or X) or logits."""
        return self.with_aux(x, rates=rates, key=key, train=train)[0]

    def with_aux(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the stage's output and also returns auxiliary outputs.

        Args:
            x, rates, key, train: as for `chain.Stage.__call__`.

        Returns:
            The output, and of the M blocks with experts, in their order, 'load' (M, E), 'dropped',
            'dead', 'entropy', 'importance_loss' and 'load_loss' (M,): see blocks.MoE and
            router.Router. Empty without such blocks.
        """
        keys = jax.random.split(key, self.depth) if train and key is not None else None
        dropping = keys is not None and rates is not None and any(rates)
        block_rates = jnp.asarray(rates) if dropping else None
        if self.first:
            x = self.embed(x)
        auxiliary, at = [], 0
        for i, (kind, count) in enumerate(segments(self.spec, self.start, self.depth)):
            own = slice(at, at + count)
            x, aux = getattr(self, f"segment_{i}")(
                x, *(None if a is None else a[own] for a in (block_rates, keys))
            )
            auxiliary += [aux] if kind.moe else []
            at += count
        if self.last:
            x = self.head(self.features(x)).astype(jnp.float32)
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *auxiliary) if auxiliary else {}

    def join(self, after: chain.Stage) -> VMoEStage | None:
        """Joins this stage and the next one; equal segments at the seam become one loop."""
        if self.last or not isinstance(after, VMoEStage) or after.first or after.spec != self.spec:
            return None
        if after.start != self.start + self.depth:
            return None
        mine, theirs = chain.split(self).params, chain.split(after).params
        stacks, more = assembly.stacks(mine), assembly.stacks(theirs)
        kinds = [segments(self.spec, stage.start, stage.depth) for stage in (self, after)]
        if stacks and more and kinds[0][-1][0] == kinds[1][0][0]:
            seam = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacks.pop(), more.pop(0))
            stacks.append(seam)
        graph = _graph(self.spec, self.start, self.depth + after.depth, self.first, after.last)
        params = assembly.ends(mine) | assembly.ends(theirs) | assembly.segments(stacks + more)
        return chain.merge(graph, params, {})


def _check_stitches(spec: VMoESpec, start: int, depth: int, first: bool, last: bool) -> None:
    kinds = [spec.kind(block) for block in range(start, start + depth)]
    if spec.stitch_dim == spec.vit.width or not kinds:
        return
    wrong = [start + i for i in range(1, depth) if kinds[i].pre != kinds[i - 1].post]
    wrong += [start] if first and kinds[0].pre else []
    wrong += [start + depth] if last and kinds[-1].post else []
    if wrong:
        raise UserError(
            f"vmoe: before block {wrong[0]} the width is not what that block takes; a stitch after "
            "block i (post_stitch_pos) needs one before block i + 1 (pre_stitch_pos)"
        )


@functools.cache
def _graph(spec: VMoESpec, start: int, depth: int, first: bool, last: bool) -> nnx.GraphDef:
    """Structure of a stage; cached, since tracing is slow."""
    return chain.abstract(
        lambda rngs: VMoEStage(spec, start, depth, first=first, last=last, rngs=rngs)
    ).graph


def build(spec: VMoESpec, depths: Sequence[int], *, rngs: nnx.Rngs) -> list[VMoEStage]:
    """The network as stages of the given depths."""
    return [build_stage(spec, i, depths, rngs=rngs) for i in range(len(depths))]


def build_stage(spec: VMoESpec, index: int, depths: Sequence[int], *, rngs: nnx.Rngs) -> VMoEStage:
    """Stage `index` of the network; with a `student_spec`, the student of that number.

    Args:
        spec: hyperparameters of the whole network.
        index: number of the stage.
        depths: blocks of every stage.
        rngs: source of the initial values.
    """
    first, last = index == 0, index == len(depths) - 1
    start = sum(depths[:index])
    return VMoEStage(spec, start, depths[index], first=first, last=last, rngs=rngs)


def build_student(
    spec: VMoESpec, index: int, depths: Sequence[int], stitch_dim: int, *, rngs: nnx.Rngs
) -> VMoEStage:
    """Student `index`: embedding in the first, head in the last, stitches at every other end.

    Source: docs/reference.md#vmoe-students.

    Args:
        spec: hyperparameters of the whole network, without stitches.
        index: number of the student.
        depths: blocks of every student.
        stitch_dim: width of the meta model.
        rngs: source of the initial values.

    Raises:
        UserError: the index is out of range.
    """
    if not 0 <= index < len(depths):
        raise UserError(f"m2mkd/{index}: there are {len(depths)} modules, 0 to {len(depths) - 1}")
    return build_stage(student_spec(spec, depths, stitch_dim), index, depths, rngs=rngs)
