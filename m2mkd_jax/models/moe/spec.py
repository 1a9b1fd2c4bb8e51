"""Hyperparameters of a V-MoE, and which of its blocks have the same structure.

Source: Riquelme et al. 2021 (arXiv 2106.05974), section 2; docs/reference.md#vmoe,
docs/reference.md#vmoe-stitches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.vit_spec import ViTSpec

ROUTERS = ("published", "vmoe", "expert_choice")  # router.py
DISPATCHES = ("dropless", "capacity")  # dispatch.py


@dataclass(frozen=True)
class RouterSpec:
    """Hyperparameters of a router.

    Attributes:
        kind: one of ROUTERS, see router.py.
        experts: number of experts E.
        top_k: experts per token K.
        noise: standard deviation of the 'vmoe' router's training noise, in units of 1 / E.
        capacity_factor: slots per expert over its even share of the tokens.
    """

    kind: str
    experts: int
    top_k: int = 2
    noise: float = 1.0
    capacity_factor: float = 1.25

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the logits; 0 for routers without noise."""
        return self.noise / self.experts if self.kind == "vmoe" else 0.0

    def capacity(self, tokens: int) -> int:
        """Slots per expert for a group of `tokens`: its even share times the capacity factor.

        A token chooses an expert at most once, so more slots than tokens are never used.

        Source: Riquelme et al. 2021 (arXiv 2106.05974), section 2; docs/reference.md#vmoe.
        """
        share = self.capacity_factor * tokens * self.top_k / self.experts
        return min(math.ceil(share), tokens)


@dataclass(frozen=True)
class VMoESpec:
    """Hyperparameters of a V-MoE. Block numbers count through the whole network.

    Attributes:
        vit: the vision transformer around the experts.
        moe_pos: blocks whose MLP is a mixture of experts.
        experts: experts per block.
        top_k: experts per token.
        router: one of ROUTERS (models/moe/router.py).
        noise: of the router, see `RouterSpec`.
        dispatch: one of DISPATCHES (models/moe/dispatch.py), in training; evaluation is dropless.
        capacity_factor: slots per expert over its even share; 'capacity' and expert choice only.
        group_images: images that share these slots in training; 0 for all images of a device.
            Ignored where no slots are shared.
        stitch_dim: width of the meta model, which the stitches map from and to.
        pre_stitch_pos: blocks that start with a stitch.
        post_stitch_pos: blocks that end with a stitch.
    """

    vit: ViTSpec
    moe_pos: tuple[int, ...]
    experts: int
    top_k: int = 2
    router: str = "published"
    noise: float = 1.0
    dispatch: str = "dropless"
    capacity_factor: float = 1.25
    group_images: int = 0
    stitch_dim: int = 0
    pre_stitch_pos: tuple[int, ...] = ()
    post_stitch_pos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field, value, known in (
            ("router", self.router, ROUTERS),
            ("dispatch", self.dispatch, DISPATCHES),
        ):
            if value not in known:
                raise UserError(f"vmoe.{field}: no {field} {value!r}; one of {', '.join(known)}")
        if not 1 <= self.top_k <= self.experts:
            raise UserError(
                f"vmoe.top_k: {self.top_k} choices among {self.experts} experts; "
                "use 1 to the number of experts"
            )
        for field in ("noise", "group_images", "stitch_dim"):
            if getattr(self, field) < 0:
                raise UserError(f"vmoe.{field}: {getattr(self, field)} must not be negative")
        if self.capacity_factor <= 0:
            raise UserError(f"vmoe.capacity_factor: {self.capacity_factor} must be above 0")
        if (self.pre_stitch_pos or self.post_stitch_pos) and not self.stitch_dim:
            raise UserError("vmoe.stitch_dim: stitches need the width of the meta model")

    @property
    def group(self) -> int:
        """Images whose tokens compete for slots in training; 0: those of one device, or none."""
        shared = self.dispatch == "capacity" or self.router == "expert_choice"
        return self.group_images if shared else 0

    def is_dropless(self, training: bool) -> bool:
        """Whether every choice of a token is served."""
        return self.dispatch == "dropless" or not training

    def sorts_rows(self, training: bool) -> bool:
        """Whether each expert has as many rows as chose it, sorted by expert, on one device."""
        return self.is_dropless(training) and self.router != "expert_choice"

    def router_spec(self) -> RouterSpec:
        """Hyperparameters of every block's router."""
        return RouterSpec(self.router, self.experts, self.top_k, self.noise, self.capacity_factor)

    def kind(self, block: int) -> BlockKind:
        """Structure of a block, by its number in the network."""
        return BlockKind(
            block in self.moe_pos, block in self.pre_stitch_pos, block in self.post_stitch_pos
        )


@dataclass(frozen=True)
class BlockKind:
    """Structure of a block; blocks of one kind can be stacked.

    Attributes:
        moe: it has experts in place of an MLP.
        pre: it starts with a stitch.
        post: it ends with a stitch.
    """

    moe: bool
    pre: bool
    post: bool


def segments(spec: VMoESpec, start: int, depth: int) -> list[tuple[BlockKind, int]]:
    """Runs of neighbouring blocks of one kind among blocks [start, start + depth).

    Args:
        spec: hyperparameters of the network.
        start: number of the first block.
        depth: number of blocks.

    Returns:
        Kind and length of every run.
    """
    kinds = [spec.kind(block) for block in range(start, start + depth)]
    return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]


def student_spec(spec: VMoESpec, depths: Sequence[int], stitch_dim: int) -> VMoESpec:
    """The network with stitches of the meta model's width at every boundary between modules.

    Source: docs/reference.md#vmoe-students.

    Args:
        spec: hyperparameters of the network.
        depths: blocks of every module.
        stitch_dim: width of the meta model.
    """
    ends = tuple(itertools.accumulate(depths))[:-1]
    return dataclasses.replace(
        spec,
        stitch_dim=stitch_dim,
        pre_stitch_pos=ends,
        post_stitch_pos=tuple(end - 1 for end in ends),
    )
