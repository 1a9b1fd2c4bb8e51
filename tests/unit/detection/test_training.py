"""Batches of scenes, and the multi-step schedule."""

import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.data.annotations import Scene
from m2mkd_jax.data.digits_scene import digits_scene
from m2mkd_jax.data.scene_batches import collate
from m2mkd_jax.detection.training import inside, multi_step_rate
from m2mkd_jax.errors import UserError


def test_batches_hold_the_scenes():
    scenes = [digits_scene(0, "train", i, side=64 + 8 * i) for i in range(3)]
    scenes.append(Scene(np.ones((30, 70, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, int), []))
    batch = collate(scenes, (96, 96), limit=2)
    for i, scene in enumerate(scenes):
        h, w = scene.size
        np.testing.assert_array_equal(batch["image"][i, :h, :w], scene.image)
        assert not batch["image"][i, h:].any() and not batch["image"][i, :, w:].any()
        count = int(batch["valid"][i].sum())
        assert count == min(2, len(scene.classes))
        for j in range(count):
            number = (scene.boxes == batch["boxes"][i, j]).all(1).argmax()
            assert batch["classes"][i, j] == scene.classes[number]
            masks = np.unpackbits(batch["masks"][i, j], axis=-1)
            np.testing.assert_array_equal(masks[:h, :w], scene.masks[number])
    pixels = inside(jnp.asarray(batch["size"]), 96, 96)
    assert pixels.sum((1, 2)).tolist() == [64 * 64, 72 * 72, 80 * 80, 30 * 70]


def test_the_largest_objects_are_kept():
    boxes = np.array([[0, 0, 2, 2], [0, 0, 9, 9], [0, 0, 5, 5]], float)
    masks = [np.zeros((10, 10), bool)] * 3
    scene = Scene(np.zeros((10, 10, 3), np.uint8), boxes, np.array([1, 2, 3]), masks)
    assert collate([scene], (32, 32), 2)["classes"].tolist() == [[2, 3]]


def test_schedule_of_the_published_run():
    # docs/detection.md#optimizer
    rate = multi_step_rate(1e-4, 2000, (1_311_112, 1_420_368))
    steps = [0, 1000, 2000, 1_311_111, 1_311_112, 1_420_367, 1_420_368]
    factors = [0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01]
    found = [float(rate(step)) for step in steps]
    np.testing.assert_allclose(found, np.array(factors) * 1e-4, rtol=1e-6)
    with pytest.raises(UserError, match="must rise"):
        multi_step_rate(1e-4, 10, (9, 20))
