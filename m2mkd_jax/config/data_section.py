"""Keys of a config that say which images there are and how they are augmented."""

from __future__ import annotations

from m2mkd_jax.config.keys import (
    ABOVE_0,
    BELOW_1,
    DEVIATIONS,
    FROM_0,
    FROM_MINUS_1,
    MEANS,
    SAMPLERS,
    SEED,
    SHARE,
    Key,
    Keys,
)

DATA: Keys = {
    "name": Key(
        "",
        "data set: digits, fashion_mnist, image_folder (one's own), tiny_imagenet, imagenet, "
        "cifar100, cub, imagenet_r, tiny_imagenet_r; data/sources.py",
    ),
    "root": Key("", 'directory; "": where the data set is looked for by default'),
    "image_size": Key(0, "side of an image in pixels; must be given"),
    "classes": Key(0, "classes of the data set; must be given"),
    "channels": Key(
        3,
        "of an image: 3 RGB, 1 grey, 4 RGB and opacity; these and other numbers from .npy files; "
        "docs/data.md",
        ABOVE_0,
    ),
    "train_images": Key(0, "training images, a class-balanced subset; 0: all", FROM_0),
    "test_images": Key(0, "test images, a class-balanced subset; 0: all", FROM_0),
    "validation": Key(
        0.0,
        "share of the training images held out by class for validation, which every evaluation "
        "during training looks at, eval at the test images; 0: all look at the test images",
        BELOW_1,
    ),
    "validation_seed": Key(0, "which images are held out", SEED),
    "numeric_order": Key(
        False, "classes with whole numbers for names in the order of the numbers: 2 before 10"
    ),
    "orientation": Key(
        False, "turn images as their EXIF tag says; False: as stored, as in the published code"
    ),
    "image_column": Key(
        "", 'column, or key of a WebDataset sample, that holds the image; "": found by itself'
    ),
    "label_column": Key("", 'column that holds the class; "": found by itself'),
    "sampler": Key(
        "shuffle",
        "shuffle: every image once an epoch; balanced: every class equally often, images of small "
        "classes repeated",
        SAMPLERS,
    ),
    "workers": Key(
        -1,
        "processes that decode images; 0: threads of the main process; -1: as fits the machine",
        FROM_MINUS_1,
    ),
    "damaged_share": Key(
        0.001,
        "share of the images that may be undecodable: in training another stands in for each, in "
        "evaluation it is left out; more are an error",
        SHARE,
    ),
    "mean": Key(
        (0.485, 0.456, 0.406),
        "mean of each channel, of pixels from 0 to 1; the default is ImageNet's",
        MEANS,
    ),
    "std": Key(
        (0.229, 0.224, 0.225),
        "standard deviation of each channel, likewise",
        DEVIATIONS,
    ),
    "repeated_augmentation": Key(
        1,
        "copies of an image in an epoch, each augmented anew; an epoch of n copies has one n-th "
        "of the images; 1: off; 3 as published",
        ABOVE_0,
    ),
    "augment": {
        "crop": Key("none", "none, shift, random_resized"),
        "shift": Key(0, "largest shift in pixels, for crop shift", FROM_0),
        "scale": Key(
            (0.08, 1.0), "smallest and largest share of the image's area, for crop random_resized"
        ),
        "flip": Key(False, "mirror half of the images"),
        "rand_augment": Key(
            "", 'RandAugment policy, such as rand-m9-mstd0.5-inc1, the published one; "": off'
        ),
        "color_jitter": Key(
            0.0,
            "largest relative change of brightness, contrast and saturation; only without "
            "rand_augment",
        ),
        "erase": Key(0.0, "probability of erasing a random box of an image"),
    },
}
