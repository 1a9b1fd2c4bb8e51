"""A job of this package as a PyTorch program: chains, loss, training step.

It reads what benchmarks/peers/export.py writes, and imports no jax. The step does what ours does,
but for the statistics of routers, which ours logs: normalise, erase, mix; frozen stages shared by
student and teacher once; loss, backward, norm of the gradient, clipping, AdamW.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import nac
from benchmarks.peers.layers import Rates
from benchmarks.peers.vit import ViTStage
from benchmarks.peers.vmoe import VMoEStage
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.vit_spec import ViTSpec

# Largest relative difference of logits and loss, float32. The deepest chain has 24 blocks, whose
# order of summation differs; in bfloat16 three digits agree.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
STUDENTS = {
    "readin": nac.ReadInStudent,
    "mediator": nac.MediatorStudent,
    "readout": nac.ReadOutStudent,
}


def build_stage(facts: dict[str, Any], literal: bool = False, timm: bool = False) -> nn.Module:
    """A stage from its description in job.json."""
    facts = dict(facts)
    kind = facts.pop("kind")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.pop("spec").items()}
    if kind == "vit":
        return ViTStage(ViTSpec(**fields), **facts, timm=timm)
    if kind == "vmoe":
        return VMoEStage(VMoESpec(**{**fields, "vit": ViTSpec(**fields["vit"])}), **facts)
    spec, options = NACSpec(**fields), {"literal": literal}
    if kind == "nac":
        return nac.NAC(spec, **options)
    return STUDENTS[kind](spec, **facts, **(options if kind == "readin" else {}))


class Job:
    """The program of a directory that benchmarks/peers/export.py wrote.

    Args:
        directory: that one.
        literal: the read-in of a NAC as published.
        timm: timm's blocks in dense transformers.
        device: where to compute.
    """

    def __init__(
        self, directory: Path, literal: bool = False, timm: bool = False, device: str = "cpu"
    ):
        self.facts = json.loads((directory / "job.json").read_text())
        self.directory, self.device = directory, torch.device(device)
        self.half = self.facts["dtype"] == "bfloat16"
        with torch.device("meta"):
            described = self.facts["stages"].items()
            stages = {name: build_stage(facts, literal, timm) for name, facts in described}
        self.stages = nn.ModuleDict(stages).to_empty(device=self.device)
        self.load()
        for name, stage in self.stages.items():
            if name not in self.facts["trainable"] or self.facts["predict"]:
                stage.requires_grad_(False)
        self.trained = {n: p for n, p in self.stages.named_parameters() if p.requires_grad}
        self.run_loss = self.loss
        self.run_logits = self.logits
        self.optimizer: torch.optim.Optimizer | None = None

    def load(self) -> None:
        """Loads every array. Raises RuntimeError where names or shapes are not exactly ours."""
        index = json.loads((self.directory / "arrays.json").read_text())
        own = self.stages.state_dict()
        if own.keys() != index.keys():
            raise RuntimeError(f"names differ: {sorted(own.keys() ^ index.keys())[:4]}")
        for name, tensor in own.items():
            value = torch.from_numpy(np.load(self.directory / index[name]))
            if tensor.shape != value.shape:
                raise RuntimeError(f"{name}: {tuple(value.shape)}, here {tuple(tensor.shape)}")
            tensor.copy_(value)

    def prepare(self, compiled: bool) -> None:
        """Optimizer, random images and, if asked for, torch.compile."""
        facts, batch = self.facts, self.facts["batch"]
        if compiled:
            self.run_loss, self.run_logits = torch.compile(self.loss), torch.compile(self.logits)
        if self.half:  # ours stores frozen parameters in bfloat16 too
            for name, stage in self.stages.items():
                if name not in facts["trainable"]:
                    stage.to(torch.bfloat16)
        shape, recipe = (batch, facts["image_size"], facts["image_size"], 3), facts["recipe"]
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        self.labels = torch.randint(0, facts["classes"], (batch,), device=self.device)
        self.mean, self.std = (
            torch.tensor(facts[name], device=self.device).view(3, 1, 1) for name in ("mean", "std")
        )
        if not facts["predict"]:
            decayed, parts = set(facts["decayed"]), ([], [])
            for name, parameter in self.trained.items():
                parts[name in decayed].append(parameter)
            decays = (0.0, recipe["weight_decay"])
            groups = [
                {"params": part, "weight_decay": decay}
                for part, decay in zip(parts, decays, strict=True)
                if part
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], fused=True)

    def run(
        self,
        names: Sequence[str],
        x: torch.Tensor,
        rates: Sequence[Rates] | None = None,
        train: bool = False,
    ) -> torch.Tensor:
        """Runs stages in order."""
        for i, name in enumerate(names):
            x = self.stages[name](x, rates[i] if rates else None, train)
        return x

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Evaluation: (B, 3, H, W), normalised -> (B, K)."""
        with self.autocast():
            return self.run(self.facts["student"], images)

    def loss(self, images: torch.Tensor, target: torch.Tensor, train: bool = True) -> torch.Tensor:
        """The loss, see docs/reference.md#losses; without `train`, without noise."""
        facts = self.facts
        shared, rates = facts["shared"], facts["rates"]
        with self.autocast():
            with torch.no_grad():
                x = self.run(facts["student"][:shared], images)
                imitated = None
                if facts["teacher"]:
                    imitated = self.run(facts["teacher"][shared:], x)
            rates = rates[shared:] if rates else None
            logits = self.run(facts["student"][shared:], x, rates, train)
        loss = F.cross_entropy(logits, target)
        if imitated is not None:
            alpha, temperature = facts["alpha"], facts["temperature"]
            log_p, log_q = ((x / temperature).log_softmax(-1) for x in (imitated, logits))
            divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            divergence = divergence * temperature**2 / logits.numel()
            loss = (1.0 - alpha) * loss + alpha * divergence
        if facts["regulariser"]:
            wanted = facts["regulariser"]
            loss = loss + wanted["weight"] * self.stages["nac"].hinge(wanted["hinge"])
        return loss

    def check(self) -> dict[str, float]:
        """Relative differences from our logits and loss without noise, and parameter counts.

        Raises:
            RuntimeError: they are not the same; there is nothing to time.
        """
        facts, known = self.facts, np.load(self.directory / "check.npz")
        images = torch.from_numpy(known["images"]).permute(0, 3, 1, 2).to(self.device)
        target = torch.from_numpy(known["target"]).to(self.device)
        with torch.no_grad():
            logits = self.logits(images).cpu().numpy()
            loss = float(self.loss(images, target, train=False))
        scale = max(float(np.abs(known["logits"]).max()), 1e-12)
        found = {
            "logits": float(np.abs(logits - known["logits"]).max()) / scale,
            "loss": abs(loss - float(known["loss"])) / abs(float(known["loss"])),
        }
        bad = {k: v for k, v in found.items() if not v <= TOLERANCE[facts["dtype"]]}
        counts = {"trained_parameters": 0, "frozen_parameters": 0}
        for name, stage in self.stages.items():
            kind = "trained" if name in facts["trainable"] else "frozen"
            counts[f"{kind}_parameters"] += sum(p.numel() for p in stage.parameters())
        bad |= {k: v for k, v in counts.items() if v != facts[k]}
        if bad:
            raise RuntimeError(f"not timed, the peer is not equal to ours: {bad}")
        return {**found, **counts}

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, normalised, erased and mixed, and targets; see docs/reference.md#mixing."""
        facts, recipe = self.facts, self.facts["recipe"]
        images = self.images.permute(0, 3, 1, 2).float()
        images = images.div_(255.0).sub_(self.mean).div_(self.std)
        erase(images, facts["erase"])
        target = torch.full((len(images), facts["classes"]), recipe["smoothing"] / facts["classes"])
        target = target.to(self.device)
        target[torch.arange(len(images)), self.labels] += 1.0 - recipe["smoothing"]
        return mix(images, target, recipe)

    def step(self) -> None:
        """One training step, or one evaluation."""
        if self.optimizer is None:
            images = self.images.permute(0, 3, 1, 2).float().div_(255.0)
            with torch.inference_mode():
                self.run_logits(images)
            return
        images, target = self.batch()
        loss = self.run_loss(images, target)
        loss.backward()
        clip, parameters = self.facts["recipe"]["clip"], list(self.trained.values())
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        else:
            nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def steps(self, count: int) -> tuple[float, float]:
        """Runs steps. Returns wall-clock and CPU seconds per step."""
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        return wall / count, cpu / count


def erase(images: torch.Tensor, probability: float) -> None:
    """Random erasing in place; see docs/reference.md#erasing."""
    if not probability:
        return
    height, width = images.shape[-2:]
    for image in images:
        if random.random() >= probability:
            continue
        for _ in range(10):
            pixels = random.uniform(0.02, 0.33) * height * width
            aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
            tall, wide = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if tall < height and wide < width:
                top, left = random.randint(0, height - tall), random.randint(0, width - wide)
                image[:, top : top + tall, left : left + wide].normal_()
                break


def mix(
    images: torch.Tensor, target: torch.Tensor, recipe: dict[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or cutmix of the batch with its reverse; see docs/reference.md#mixing."""
    mixup, cutmix = recipe["mixup"], recipe["cutmix"]
    if not (mixup or cutmix) or random.random() >= recipe["mix_prob"]:
        return images, target
    if cutmix and (not mixup or random.random() < recipe["switch_prob"]):
        share = random.betavariate(cutmix, cutmix)
        size, box = images.shape[-2:], []
        for side in size:
            half, centre = int(side * math.sqrt(1.0 - share)) // 2, random.randrange(side)
            box.append((max(centre - half, 0), min(centre + half, side)))
        (top, bottom), (left, right) = box
        part = images[..., top:bottom, left:right]
        images[..., top:bottom, left:right] = part.flip(0)
        share = 1.0 - (bottom - top) * (right - left) / (size[0] * size[1])
    else:
        share = random.betavariate(mixup, mixup)
        images = torch.lerp(images.flip(0), images, share)
    return images, torch.lerp(target.flip(0), target, share)
