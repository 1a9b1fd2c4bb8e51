"""What a config may say: every key, its meaning, its default and its range. Loads no jax."""

from m2mkd_jax.config.defaults import base

__all__ = ["base"]
