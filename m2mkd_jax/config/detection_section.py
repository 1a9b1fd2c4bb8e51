"""Keys of a config that say what a detector is, on which scenes and how it is trained."""

from __future__ import annotations

from m2mkd_jax.config.keys import (
    ABOVE_0,
    COUNTS,
    DEVIATIONS,
    FROM_0,
    FROM_MINUS_1,
    INDICES,
    MEANS,
    NUMBERS,
    POSITIVE_NUMBERS,
    SEED,
    SHARE,
    Key,
    Keys,
)

DETECTION_DATA: Keys = {
    "name": Key("", "digits_scene (generated), coco; data/scenes.py"),
    "root": Key("", 'directory of coco; "": $M2MKD_DATA/coco'),
    "train_json": Key("annotations/instances_train2017.json", "instances of the training images"),
    "train_folder": Key("train2017", "training images, below root"),
    "test_json": Key("annotations/instances_val2017.json", "instances of the test images"),
    "test_folder": Key("val2017", "test images, below root"),
    "classes": Key(0, "classes of the data set; must be given"),
    "train_images": Key(0, "training images, the first ones; 0: all of coco", FROM_0),
    "test_images": Key(0, "test images, likewise", FROM_0),
    "image_size": Key(0, "side of the square that images are padded to; must be given"),
    "objects": Key(100, "objects of an image in training; of more the largest are kept", ABOVE_0),
    "seed": Key(0, "of generated scenes", SEED),
    "mean": Key((0.485, 0.456, 0.406), "mean of each channel, of pixels from 0 to 1", MEANS, 3),
    "std": Key((0.229, 0.224, 0.225), "standard deviation, likewise", DEVIATIONS, 3),
    "workers": Key(
        -1,
        "processes that decode images; 0: threads of the main process; -1: as fits the machine",
        FROM_MINUS_1,
    ),
    "damaged_share": Key(
        0.001,
        "share of the images that may be unusable: in training another stands in for each, in "
        "evaluation it is left out; more are an error",
        SHARE,
    ),
    "repeat_threshold": Key(
        0.0,
        "images with a class that fewer than this share of the images have are drawn more often "
        "(repeat-factor sampling); 0: off",
        SHARE,
    ),
    "augment": {
        "resize": Key(
            "jitter",
            "jitter: large-scale jitter; plain: the short edge drawn from `edges`; none: as is",
        ),
        "scale": Key((0.1, 2.0), "smallest and largest scale, for jitter", POSITIVE_NUMBERS, 2),
        "edges": Key((640, 672, 704, 736, 768, 800), "short edges in pixels, for plain", COUNTS),
        "test_edge": Key(800, "short edge of test images, for plain", ABOVE_0),
        "longest": Key(1333, "largest long edge in pixels, for plain", ABOVE_0),
        "flip": Key(True, "mirror half of the images"),
    },
}

# Fields of detection/spec.py.
DETECTION_MODEL: Keys = {
    "window": Key(0, "side of the attention windows in tokens; 0: every block is global", FROM_0),
    "global_blocks": Key((), "blocks that attend globally although there are windows", INDICES),
    "relative_positions": Key(False, "decomposed relative position tables, zero at the start"),
    "channels": Key(256, "of the pyramid's levels", ABOVE_0),
    "anchor_sizes": Key((32, 64, 128, 256, 512), "of p2 to p6, in pixels", COUNTS, 5),
    "aspect_ratios": Key((0.5, 1.0, 2.0), "height / width of the anchors", POSITIVE_NUMBERS),
    "rpn_budget": Key(256, "anchors of an image in the proposal network's loss", ABOVE_0),
    "pre_nms": Key(
        (2000, 1000), "proposals of a level before suppression: training, test", COUNTS, 2
    ),
    "post_nms": Key((1000, 1000), "proposals of an image after it, likewise", COUNTS, 2),
    "roi_budget": Key(512, "regions of an image in the heads' losses", ABOVE_0),
    "fc_width": Key(1024, "of the box head's linear layer", ABOVE_0),
    "score_threshold": Key(0.05, "least score of a detection", SHARE),
    "nms": Key(0.5, "overlap beyond which the lesser detection of a class is dropped", SHARE),
    "detections": Key(100, "most detections of an image", ABOVE_0),
}

DETECTION_RECIPE: Keys = {
    "epochs": Key(0.0, "epochs of training; must be given"),
    "batch": Key(0, "images per optimizer update, over all devices; must be given"),
    "accumulate": Key(1, "parts that a batch is computed in, one after the other", ABOVE_0),
    "optimizer": Key("adamw", "adamw"),
    "lr": Key(1e-4, "peak learning rate, for lr_per images per batch", FROM_0),
    "lr_per": Key(64, "images: the rate used is lr * batch / lr_per; 0: lr itself", FROM_0),
    "warmup_epochs": Key(0.0, "epochs of linear warmup, part of epochs"),
    "warmup_factor": Key(0.001, "share of the rate at the start of the warmup", SHARE),
    "milestones": Key((), "epochs, rising, from each of which on the rate is a tenth", NUMBERS),
    "layer_decay": Key(0.7, "factor of the rate from one layer to the one below", SHARE),
    "layer_rule": Key("block", "layers counted as: block, published (within their stage)"),
    "weight_decay": Key(0.1, "decoupled weight decay", FROM_0),
    "decay_rule": Key(
        "published",
        "which parameters decay: published (not the transformer's norms and positions), all, none",
    ),
    "clip": Key(0.0, "largest global norm of the gradient; 0: no clipping", FROM_0),
    "drop_path": Key(0.0, "drop-path rate of the last block; rates grow linearly from 0", SHARE),
    "ema": Key(0.0, "decay per update of a moving average of the weights; 0: none", SHARE),
}

DETECTION: Keys = {
    "network": Key(
        "e2e", "job whose network becomes the backbone of detect: an end-to-end one, or ft"
    ),
    "seeds": Key(1, "repetitions of every detection phase: detect, detect/1, ...", ABOVE_0),
    "evaluation_batch": Key(8, "images per evaluation step, over all devices", ABOVE_0),
    "pictures": Key(8, "test images that are drawn with their detections", FROM_0),
    "data": DETECTION_DATA,
    "model": DETECTION_MODEL,
    "recipe": DETECTION_RECIPE,
}
