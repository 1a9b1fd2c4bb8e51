"""m2mKD in JAX: module-to-module knowledge distillation for modular transformers.

The method is that of arXiv 2402.16918.
"""

__version__ = "0.1.0"
