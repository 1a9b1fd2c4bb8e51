"""Accuracy with exact counts.

Axes: B batch, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.evaluate.calibration import binned, gap
from m2mkd_jax.losses.classification import top_k_correct
from m2mkd_jax.parallel import backend
from m2mkd_jax.train.batch import normalise

# Enough that the device never waits, few enough that an evaluation can be stopped.
IN_FLIGHT = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """What an evaluation keeps of a batch.

    Attributes:
        sums: (5,), over the images that count: images, top-1 correct, top-5 correct, negative
            log-likelihood, squared distance of the probabilities from the truth.
        confidence: (B,), the largest probability of each image.
        correct: (B,), whether it is that of the label.
        mask: (B,), whether the image counts.
    """

    sums: jax.Array
    confidence: jax.Array
    correct: jax.Array
    mask: jax.Array


def make_counter(
    logits: Callable[[dict, dict, jax.Array, jax.Array], Any],
    mean: Sequence[float],
    std: Sequence[float],
    out_shardings: Any = None,
) -> Callable[[dict, dict, dict, jax.Array], Any]:
    """A compiled function that gives the results of a batch.

    Args:
        logits: (trainable, frozen, images, key) -> (B, K), or several of these by name.
        mean: (C,), of the pixels.
        std: (C,).
        out_shardings: of the results; with several processes they must be replicated.

    Returns:
        (trainable, frozen, batch, key) -> `Counts`; for several logits one each, by name. The
        batch has "image" uint8 (B, H, W, C), "label" int32 (B,) and "mask" float32 (B,), 1 for
        images that count.

    Source: docs/reference.md#evaluation.
    """

    def count(trainable: dict, frozen: dict, batch: dict, key: jax.Array) -> Any:
        images = normalise(batch["image"], mean, std)
        outputs = logits(trainable, frozen, images, key)
        label, mask = batch["label"], batch["mask"].astype(jnp.float32)
        return jax.tree.map(lambda own: _counts(own, label, mask), outputs)

    return backend.jit(count, out_shardings=out_shardings)


def _counts(outputs: jax.Array, label: jax.Array, mask: jax.Array) -> Counts:
    """What a counter gives, from the logits (B, K) of its images."""
    log = jax.nn.log_softmax(outputs)
    nll = -jnp.take_along_axis(log, label[:, None], -1)[:, 0]
    probabilities = jnp.exp(log)
    truth = jax.nn.one_hot(label, outputs.shape[-1], dtype=probabilities.dtype)
    sums = (
        jnp.ones_like(mask),
        top_k_correct(outputs, label, 1),
        top_k_correct(outputs, label, 5),
        nll,
        jnp.square(probabilities - truth).sum(-1),
    )
    return Counts(
        jnp.stack([jnp.sum(value.astype(jnp.float32) * mask) for value in sums]),
        probabilities.max(-1),
        jnp.argmax(outputs, -1) == label,
        mask > 0,
    )


def evaluate(
    count: Callable[[dict, dict, dict, jax.Array], Any],
    trainable: dict,
    frozen: dict,
    batches: Iterable[dict],
    key: jax.Array,
    images: int,
) -> dict[str, Any]:
    """Metrics over all batches; the host is at most IN_FLIGHT batches ahead of the device.

    Args:
        count: from `make_counter`.
        trainable: {stage: parameters}.
        frozen: {stage: parameters}.
        batches: the batches of `eval_batches`.
        key: random key.
        images: of the test split; those that the batches do not count are damaged.

    Returns:
        eval_accuracy, eval_top5, eval_loss, eval_brier (means over the images that count), eval_ece
        (see calibration.py), eval_images, how many count, and where there are any eval_damaged, the
        number of the others; of a counter of several logits one dict of these each, by name.

    Source: docs/reference.md#evaluation.
    """
    found: list[Any] = []
    for i, batch in enumerate(batches):
        found.append(count(trainable, frozen, batch, jax.random.fold_in(key, i)))
        if i >= IN_FLIGHT:
            jax.block_until_ready(found[i - IN_FLIGHT])
    return jax.tree.map(
        lambda *own: _metrics(own, images),
        *jax.device_get(found),
        is_leaf=lambda leaf: isinstance(leaf, Counts),
    )


def _metrics(batches: Sequence[Counts], images: int) -> dict[str, Any]:
    """The metrics that `evaluate` returns, from those of all batches."""
    totals = np.asarray([batch.sums for batch in batches], np.float64).sum(axis=0)
    counted, top1, top5, nll, brier = totals.tolist()
    counts = np.concatenate([batch.mask for batch in batches])
    confidence = np.concatenate([batch.confidence for batch in batches])[counts]
    correct = np.concatenate([batch.correct for batch in batches])[counts]
    means = {
        "eval_accuracy": top1 / counted,
        "eval_top5": top5 / counted,
        "eval_loss": nll / counted,
        "eval_brier": brier / counted,
        "eval_ece": gap(binned(confidence.astype(np.float64), correct)),
        "eval_images": int(counted),
    }
    damaged = images - int(counted)
    return means | ({"eval_damaged": damaged} if damaged else {})
