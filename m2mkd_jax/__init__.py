"""m2mKD in JAX: module-to-module knowledge distillation for modular transformers.

The method is that of arXiv 2402.16918.
"""

__version__ = "0.1.0"


def load(path, module=None, *, arch="", seed=0):
    """A network with its weights: `load(CHECKPOINT)(images)`; see m2mkd_jax/inference.py."""
    from m2mkd_jax import inference  # noqa: PLC0415 (importing the package loads no jax)

    return inference.load(path, module, arch=arch, seed=seed)
