"""Accuracy with exact counts.

Axes: B batch, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.losses.classification import top_k_correct
from m2mkd_jax.train.step import normalise


def make_counter(
    logits: Callable, mean, std, out_shardings=None
) -> Callable[[dict, dict, dict, jax.Array], jax.Array]:
    """(trainable, frozen, batch, key) -> (4,) sums over the images that are not padding.

    The sums: images, right answers, right among the first five, negative log-likelihood.
    `logits` is (trainable, frozen, images, key) -> (B, K); the batch has "image" uint8
    (B, H, W, 3), "label" (B,) and "mask" (B,), 0 for padding. `out_shardings`: where the sums are
    wanted; with several processes, whole in each.
    """

    def count(trainable, frozen, batch, key):
        images = normalise(batch["image"], mean, std)
        outputs = logits(trainable, frozen, images, key)
        label, mask = batch["label"], batch["mask"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(outputs), label[:, None], -1)[:, 0]
        sums = (
            jnp.ones_like(mask),
            top_k_correct(outputs, label, 1),
            top_k_correct(outputs, label, 5),
            nll,
        )
        return jnp.stack([jnp.sum(value * mask) for value in sums])

    return jax.jit(count, out_shardings=out_shardings)


def evaluate(count: Callable, trainable: dict, frozen: dict, batches: Iterable[dict], key) -> dict:
    """Metrics over all batches: every image counts once; the host waits once, at the end."""
    sums = [count(trainable, frozen, b, jax.random.fold_in(key, i)) for i, b in enumerate(batches)]
    images, top1, top5, nll = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return {
        "eval_accuracy": top1 / images,
        "eval_top5": top5 / images,
        "eval_loss": nll / images,
        "eval_images": int(images),
    }
