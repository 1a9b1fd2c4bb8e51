"""The cases of benchmarks/speed.py: a job of a shipped config at a batch that one device holds.

The NACs on ImageNet and Tiny-ImageNet get signatures without a graph prior here: fitting signatures
to a graph of 768 mediators takes many minutes, and the time of a step does not depend on their
values.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from ml_collections import ConfigDict


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        config: name of a file in configs/.
        argument: of its get_config; "": none.
        job: name of a job.
        cpu: images per step on a CPU.
        accelerator: images per step on a GPU or TPU.
        predict: the logits of an evaluation in place of a training step.
    """

    config: str
    argument: str
    job: str
    cpu: int
    accelerator: int
    predict: bool = False


CASES = {
    "nac_digits": Case("nac_digits", "", "e2e_scratch", 50, 50),
    "nac_tinyimnet": Case("nac_tinyimnet", "", "e2e_scratch", 8, 128),
    "nac_imnet": Case("nac_imnet", "", "e2e_scratch", 2, 32),
    "nac_imnet_m2mkd": Case("nac_imnet", "", "m2mkd/1", 2, 64),
    "nac_m2mkd": Case("nac_imnet", "", "m2mkd/4", 2, 64),  # the teacher is a ViT-H
    "vmoe_digits": Case("vmoe_digits", "", "e2e_scratch", 48, 48),
    "vmoe_imnet": Case("vmoe_imnet", "base", "e2e_scratch", 4, 64),
    "vmoe_imnet_m2mkd": Case("vmoe_imnet", "base", "m2mkd/1", 4, 64),
    "mt_vit_large": Case("vmoe_imnet", "base", "mt/0", 4, 64),
    "predict_vit": Case("vmoe_imnet", "base", "ft", 4, 64, predict=True),  # a ViT-L
    "predict_nac": Case("nac_imnet", "", "e2e_scratch", 4, 64, predict=True),
    "predict_vmoe": Case("vmoe_imnet", "base", "e2e_scratch", 4, 64, predict=True),
}
REMAT = ("config", "auto", "always", "never")
FUSED = ("auto", "always", "never")


def make_config(case: Case, batch: int, remat: str = "config", fused: str = "auto") -> ConfigDict:
    """The config of a case.

    Args:
        case: the case.
        batch: images per step.
        remat: for the keys of that name; 'config': what they are.
        fused: of a NAC, for the key of that name.
    """
    get_config = importlib.import_module(f"configs.{case.config}").get_config
    config = get_config(*[case.argument] if case.argument else [])
    recipe = config.recipes[case.job.split("/")[0].partition("_")[0]]
    recipe.batch, recipe.accumulate = batch, 1
    if case.config in ("nac_imnet", "nac_tinyimnet"):
        config.nac.prior, config.nac.options = "none", {}
    if config.family == "nac":
        config.nac.fused = fused
    if remat != "config":
        for section in (config.teacher, config[config.family]):
            section.remat = remat
    return config
