"""Views of training images: fixed by seed, view and image, whatever batch an image comes in."""

import numpy as np

from m2mkd_jax.config.defaults import base
from m2mkd_jax.data.array_source import ArrayImageSource
from m2mkd_jax.data.pipeline import train_batches, view_batches

IMAGES, SIZE, BATCH, SEED = 12, 8, 4, 5


def source_and_config():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, SIZE, SIZE, 3), np.uint8)
    images[1] = images[0]
    # A label for each image: it tells which one a batch has where.
    source = ArrayImageSource(
        images, np.arange(IMAGES, dtype=np.int32), tuple(map(str, range(IMAGES)))
    )
    data = base().data
    data.image_size, data.classes, data.workers = SIZE, IMAGES, 0
    data.augment.crop, data.augment.flip = "random_resized", True
    data.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    return source, data


def view_of(view, **options):
    """The images of a view, by label."""
    options = {"batch_size": 5, "start": 0, "seed": SEED} | options
    found = {}
    for batch in view_batches(*source_and_config(), view=view, **options):
        found |= dict(zip(batch["label"].tolist(), batch["image"], strict=True))
    return found


def test_a_view_has_every_image_once_and_is_fixed():
    first, again = view_of(0), view_of(0, batch_size=3)
    assert first.keys() == set(range(IMAGES))
    assert all((first[i] == again[i]).all() for i in first)
    assert (first[0] != first[1]).any(), "equal images, augmented by their numbers"
    rest = view_of(0, start=7)
    assert rest.keys() == set(range(7, IMAGES))
    assert all((first[i] == rest[i]).all() for i in rest)
    assert any((first[i] != view_of(1)[i]).any() for i in first)
    assert any((first[i] != view_of(0, seed=6)[i]).any() for i in first)


def test_epochs_show_the_views_in_turn_in_orders_of_their_own():
    views, steps = [view_of(0), view_of(1)], IMAGES // BATCH
    batches = train_batches(
        *source_and_config(), batch_size=BATCH, total_steps=3 * steps, seed=SEED, views=2
    )
    orders = []
    for step, batch in enumerate(batches):
        shown = views[step // steps % 2]
        for label, image in zip(batch["label"].tolist(), batch["image"], strict=True):
            assert (image == shown[label]).all()
        orders.append(batch["label"].tolist())
    assert len(orders) == 9 and orders[:steps] != orders[2 * steps :]
