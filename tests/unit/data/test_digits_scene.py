"""Generated scenes: no digit hides too much of another."""

import numpy as np

from m2mkd_jax.data.digits_scene import LEAST_VISIBLE, _place


def test_a_digit_leaves_enough_of_the_others_to_be_seen():
    rng = np.random.default_rng(0)
    other = np.zeros((32, 32), bool)
    other[:16, :16] = True
    square = np.ones((20, 20), bool)
    places = [_place(rng, square, 32, [other], [256]) for _ in range(50)]
    found = [place for place in places if place is not None]
    assert found
    for place in found:
        assert place.sum() == 400
        assert (other & ~place).sum() >= LEAST_VISIBLE * 256
    # Of a digit that is hidden already nothing more may be hidden.
    assert _place(rng, np.ones((32, 32), bool), 32, [other], [256]) is None
