"""The paper's NAC on Tiny-ImageNet, taught by a ViT-H on ImageNet.

Command:  python -m m2mkd_jax.main --config=configs/nac_tinyimnet.py[:PRIOR] --workdir=DIR
          PRIOR: scale (default), erdos, planted or ring.
Hardware: not run in full. On one H100 an end-to-end step of 128 images takes 57 ms in bfloat16.
Time:     not run in full.
Result:   not run in full; published top-1 from scratch (scale): 60.76, on Tiny-ImageNet-R 19.52;
          with m2mKD up to 5.6 and 4.2 more.

Needs ImageNet for pt, mt, ft and m2mkd, and Tiny-ImageNet for e2e; config.init.teacher and
config.init.meta make pt, mt and ft unnecessary.
Source: docs/reference.md#nac-configs, docs/reference.md#recipe-table, docs/reference.md#results.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base


def get_config(prior: str = "scale") -> ConfigDict:
    config = base()
    config.name = f"nac_{prior or 'scale'}_tinyimnet"
    data = config.data
    data.name, data.image_size, data.classes = "tiny_imagenet", 64, 200
    presets.published_augmentation(data)
    presets.imagenet(config.teaching_data)
    presets.vit_huge_teacher(config)
    nac = config.nac
    nac.state_dim = nac.code_dim = 384
    nac.heads, nac.ffn_capacity = 6, 2.0
    nac.input_latents, nac.mediator_latents, nac.output_latents = 64, 256, 64
    presets.nac_prior(config, prior or "scale")
    presets.published_teaching(config)
    presets.published_nac_end_to_end(config, epochs=400, batch=1024, decay=0.075)
    config.evaluation.every = 10.0
    return config
