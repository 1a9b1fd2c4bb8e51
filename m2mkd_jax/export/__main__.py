"""python -m m2mkd_jax.export."""

import sys

from m2mkd_jax.export import main

if __name__ == "__main__":
    sys.exit(main())
