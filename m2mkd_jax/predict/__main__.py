"""python -m m2mkd_jax.predict."""

import sys

from m2mkd_jax.predict import main

if __name__ == "__main__":
    sys.exit(main())
