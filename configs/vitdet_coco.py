"""ViTDet-B on COCO 2017: Mask R-CNN on a plain ViT-B, the dense network beside vmoe_coco.

Command:  python -m m2mkd_jax.main --config=configs/vitdet_coco.py --workdir=DIR \
              --config.init.teacher=CHECKPOINT
Hardware: not run; a step is planned with --dry_run, without weights that of detect_scratch
          (--config.phases="('detect_scratch',)").
Time:     not run.
Result:   not run; published from a masked autoencoder: box AP 51.6, mask AP 45.9.

The backbone is the dense network of config.init.teacher, a classifier of ImageNet at 224 px; with
"ft" in config.phases this run trains it.
Source: docs/detection.md#vitdet, docs/detection.md#optimizer.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base


def get_config() -> ConfigDict:
    config = base()
    config.name = "vitdet_coco"
    config.family = "vmoe"
    config.phases = ("detect", "eval")
    config.detection.network = "ft"
    presets.imagenet(config.data)
    config.teacher.variant, config.teacher.depths = "vit_base_patch16_224", (3, 3, 3, 3)
    vmoe = config.vmoe
    vmoe.patch, vmoe.width, vmoe.heads, vmoe.depths = 16, 768, 12, (3, 3, 3, 3)
    presets.published_teaching(config)
    presets.large_scale_jitter(config)
    return config
