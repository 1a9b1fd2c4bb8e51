"""The paper's NAC on ImageNet, taught by a ViT-H.

Command:  python -m m2mkd_jax.main --config=configs/nac_imnet.py[:PRIOR] --workdir=DIR
          PRIOR: scale (default), erdos, planted or ring.
Hardware: not run in full. On one H100 an end-to-end step of 32 images takes 84 ms in bfloat16.
Time:     not run in full.
Result:   not run in full; published gain of m2mKD: about 1 point on ImageNet and on ImageNet-R.

Needs ImageNet; config.init.teacher and config.init.meta make pt, mt and ft unnecessary.
Source: docs/reference.md#nac-configs, docs/reference.md#recipe-table.
"""

from ml_collections import ConfigDict

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base


def get_config(prior: str = "scale") -> ConfigDict:
    config = base()
    config.name = f"nac_{prior or 'scale'}_imnet"
    presets.imagenet(config.data)
    presets.vit_huge_teacher(config)
    nac = config.nac
    nac.state_dim = nac.code_dim = 512
    nac.heads, nac.ffn_capacity = 8, 1.0
    nac.input_latents, nac.mediator_latents, nac.output_latents = 192, 768, 64
    presets.nac_prior(config, prior or "scale")
    presets.published_teaching(config)
    presets.published_nac_end_to_end(config, epochs=110, batch=256, decay=0.05)
    presets.published_few_shot(config)
    config.evaluation.every = 10.0
    return config
