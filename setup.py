"""What pyproject.toml cannot say: the folder configs/ goes into the wheel as a package's data."""

from setuptools import find_packages, setup

SHIPPED = "m2mkd_jax.shipped_configs"

setup(
    packages=[*find_packages(include=["m2mkd_jax", "m2mkd_jax.*"]), SHIPPED],
    package_dir={SHIPPED: "configs"},
)
