"""Keys of a config that say how a phase trains."""

from __future__ import annotations

from m2mkd_jax.config.keys import (
    ABOVE_0,
    ABOVE_0_TO_1,
    BELOW_1,
    CLASS_WEIGHTS,
    FROM_0,
    NAMES,
    SHARE,
    Key,
    Keys,
)

RECIPE: Keys = {
    "epochs": Key(0.0, "epochs of training; must be given for the phases that run"),
    "batch": Key(
        0,
        "images per optimizer update, over all devices, a multiple of devices x accumulate; must "
        "be given likewise",
    ),
    "accumulate": Key(1, "parts that a batch is computed in, one after the other", ABOVE_0),
    "optimizer": Key(
        "adamw",
        "adamw, sgd (with Nesterov momentum), lion, lamb, adafactor, muon (adamw for all but the "
        "matrices between hidden layers)",
    ),
    "momentum": Key(0.9, "of sgd", BELOW_1),
    "lr": Key(5e-4, "peak learning rate, for lr_per images per batch", FROM_0),
    "lr_per": Key(512, "images: the rate used is lr * batch / lr_per; 0: lr itself", FROM_0),
    "min_lr": Key(1e-5, "learning rate at the end", FROM_0),
    "scale_min_lr": Key(False, "scale min_lr with the batch as well"),
    "warmup_lr": Key(1e-6, "learning rate at the start of the warmup, never scaled", FROM_0),
    "warmup_epochs": Key(0.0, "epochs of linear warmup, part of epochs"),
    "schedule": Key(
        "clean",
        "cosine, also called clean: warmup, then a cosine, per update; linear; constant; "
        "one_cycle, which rises for warmup_epochs; published, published_nac: the original's, per "
        "epoch; train/schedule.py",
    ),
    "layer_decay": Key(
        1.0,
        "factor of the learning rate from one block to the one before it, in pt, ft and e2e; 1: "
        "off",
        ABOVE_0_TO_1,
    ),
    "freeze": Key(
        (),
        'patterns of paths of parameters that stay as they are, such as "module_0/*" or '
        '"*/pos_embed"; jobs/JOB/parameters.txt lists paths',
        NAMES,
    ),
    "train_only": Key((), "patterns of paths of the only parameters that are trained", NAMES),
    "linear_probe": Key(
        False, "train the layer that gives the logits alone, in pt, ft and e2e; train_only of it"
    ),
    "weight_decay": Key(0.05, "weight decay; decoupled from the gradient for adamw", FROM_0),
    "decay_rule": Key(
        "published",
        "which parameters decay: published (no biases, norms, embeddings), published_stage (with "
        "embeddings), all, none; train/optimizer.py",
    ),
    "clip": Key(0.0, "largest global norm of the gradient; 0: no clipping", FROM_0),
    "drop_path": Key(
        0.0,
        "drop-path rate of the last block; rates grow linearly from 0 over the blocks (in m2mkd "
        "the student's own: one of a single block has none); a NAC's propagators all have it",
        BELOW_1,
    ),
    "ema": Key(
        0.0,
        "decay per update of a moving average of the weights, which is then evaluated and kept; "
        "0: off",
        BELOW_1,
    ),
    "mixup": Key(0.8, "alpha of mixup's Beta distribution; 0: no mixup", FROM_0),
    "cutmix": Key(1.0, "alpha of cutmix's Beta distribution; 0: no cutmix", FROM_0),
    "switch_prob": Key(0.5, "share of cutmix among mixed batches, where both are on", SHARE),
    "mix_prob": Key(1.0, "share of batches that are mixed", SHARE),
    "smoothing": Key(0.1, "label smoothing", BELOW_1),
    "class_weights": Key(
        "none",
        "weights of the classes in the loss of the labels; balanced: N / (K n) for a class of n of "
        "the N training images of K classes",
        CLASS_WEIGHTS,
    ),
    "stop_within": Key(
        0.0,
        "stop a module once its hybrid's accuracy is within this of its reference (mt: the meta "
        "model's, m2mkd: the teacher hybrid's), looked at every evaluation.every epochs; 0: never",
        FROM_0,
    ),
    "importance_weight": Key(
        0.0, "weight of the routers' importance loss (V-MoE), summed over the blocks", FROM_0
    ),
    "load_weight": Key(
        0.0, "weight of the routers' load loss (V-MoE), summed over the blocks", FROM_0
    ),
    "modules": Key({}, 'other values for single modules of mt and m2mkd: {"0": {"epochs": 12}}'),
}
