"""python -m m2mkd_jax.push."""

import sys

from m2mkd_jax.push import main

if __name__ == "__main__":
    sys.exit(main())
