"""Mask R-CNN on COCO 2017 with the V-MoE-Base that m2mKD has trained on ImageNet as backbone.

Command:  python -m m2mkd_jax.main --config=configs/vmoe_coco.py --workdir=DIR \
              --config.init.network=RUN_OR_CHECKPOINT
Hardware: not run; a step is planned with --dry_run, without weights that of detect_scratch
          (--config.phases="('detect_scratch',)").
Time:     not run.
Result:   not run.

The published recipe, its faults corrected: the checkpoint is loaded; images are RGB, jittered in
scale at 1024 px and padded to that square, not cropped to 224; the position embedding is the
checkpoint's, resized; learning rates fall by true block numbers (layer_rule="published": within
stages); the rate of 1e-4 belongs to 64 images, and follows the batch; objects that overlap no
anchor make none positive; blocks attend in windows of 14 with relative positions, but for 2, 5, 8
and 11, and drop-path is 0.1, as in ViTDet. Runs see 100 epochs, as published.

The backbone is config.init.network, or e2e of vmoe_imnet in the same directory.
Source: docs/detection.md#optimizer, docs/detection.md#data, docs/detection.md#faults.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base


def get_config() -> ConfigDict:
    config = base()
    config.name = "vmoe_coco"
    config.family = "vmoe"
    config.phases = ("detect", "eval")
    presets.imagenet(config.data)
    presets.vit_large_teacher(config)
    vmoe = config.vmoe
    vmoe.patch, vmoe.width, vmoe.heads, vmoe.depths = 16, 768, 12, (3, 3, 3, 3)
    presets.published_teaching(config)
    presets.published_vmoe_end_to_end(config)
    presets.large_scale_jitter(config)
    return config
