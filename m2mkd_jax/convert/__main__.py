"""python -m m2mkd_jax.convert."""

import sys

from m2mkd_jax.convert import main

if __name__ == "__main__":
    sys.exit(main())
