"""Random erasing of a batch that is cut over devices is that of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.parallel.mesh import batch_sharding, make_mesh
from m2mkd_jax.train.erasing import erase


def test_devices_draw_the_same_boxes_and_numbers():
    images = jnp.zeros((16, 8, 8, 3))
    mesh = make_mesh()
    step = jax.jit(lambda images: erase(jax.random.key(0), images, 0.5))
    alone = step(jax.device_put(images, jax.devices()[0]))
    cut = step(jax.device_put(images, batch_sharding(mesh)))
    assert len(cut.sharding.device_set) == 8 and (np.asarray(alone) != 0).any()
    np.testing.assert_array_equal(alone, cut)
