"""python -m m2mkd_jax.main."""

from m2mkd_jax.main import start

if __name__ == "__main__":
    start()
