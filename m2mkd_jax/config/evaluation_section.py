"""The config's section for evaluation."""

from __future__ import annotations

from m2mkd_jax.config.keys import ABOVE_0, FROM_0, NAMES, Key, Keys

EVALUATION: Keys = {
    "batch": Key(500, "images per evaluation step, over all devices", ABOVE_0),
    "every": Key(0.0, "epochs between evaluations; 0: only at the end", FROM_0),
    "sampled": Key(False, "draw the NAC's seeder and pooling noise, as published; False: means"),
    "renditions": Key(
        (),
        "sets of renditions that the job eval measures as well: imagenet_r, tiny_imagenet_r",
        NAMES,
    ),
    "networks": Key(
        (),
        "jobs, or phases, whose networks the job eval measures, such as pt, m2mkd/3, e2e; (): the "
        "end-to-end ones",
        NAMES,
    ),
    "corruptions": Key(
        (),
        "kinds of corrupted test images that the job eval measures as well, at five severities: "
        "noise, blur, contrast, brightness, shift, pixelate, or all",
        NAMES,
    ),
    "reductions": Key(
        False,
        "let the job eval measure the end-to-end networks of one seed with parts removed too: a "
        "NAC's mediators (by connectivity, at random), a V-MoE's experts (by load) and choices",
    ),
}
