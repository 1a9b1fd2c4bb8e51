"""Keys of a config that say how a run is kept, shown and watched, whatever it trains."""

from __future__ import annotations

from m2mkd_jax.config.keys import ABOVE_0, FROM_0, NAMES, WATCHDOG, Key, Keys

RUN: Keys = {
    "checkpoint_minutes": Key(
        10.0,
        "minutes between checkpoints at the most; there is one at every evaluation",
        FROM_0,
    ),
    "log_every": Key(50, "optimizer updates between two lines of the log", ABOVE_0),
    "log_seconds": Key(
        10.0,
        "seconds between two lines on the screen where it is no terminal, at the least; every "
        "evaluation has one",
        FROM_0,
    ),
    "trackers": Key(
        (),
        "programs that get the numbers of the log: tensorboard, wandb, trackio, or a class of "
        'one\'s own, "package.module:Class"; jobs/trackers.py',
        NAMES,
    ),
    "max_skipped_steps": Key(
        0,
        "steps of a job whose loss or gradient may be not finite: they change no weights; one "
        "more ends the job; none in fewshot",
        FROM_0,
    ),
    "watchdog_seconds": Key(
        300.0,
        "seconds for which one of several processes may be silent, or keep the others waiting, "
        "before all end and it is named; longer than reading a checkpoint takes",
        WATCHDOG,
    ),
    "precision": Key(
        "auto",
        "of activations: float32, bfloat16; auto: bfloat16 on GPU and TPU, float32 on CPU",
    ),
}
