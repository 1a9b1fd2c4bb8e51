"""The paper's NAC on ImageNet, taught by a ViT-H.

    python -m m2mkd_jax.main --config=configs/nac_imnet.py[:PRIOR] --workdir=DIR

PRIOR: scale (default), erdos, planted or ring. Needs ImageNet; config.init.teacher and
config.init.meta make pt, mt and ft unnecessary. Published gain of m2mKD: about 1 point, on
ImageNet and on ImageNet-R. Not run here in full.
"""

from m2mkd_jax.config import presets
from m2mkd_jax.config.defaults import base


def get_config(prior: str = "scale"):
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
