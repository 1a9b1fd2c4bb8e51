"""What a network says of test images: confusion, calibration, samples."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2mkd_jax.evaluate.calibration import reliability, scores, softmax
from m2mkd_jax.report.analysis import Analysis
from m2mkd_jax.report.charts import (
    COLOURS,
    DASHES,
    GRID,
    SHAPES,
    Figure,
    draw,
    image_tag,
    legend_below,
)
from m2mkd_jax.report.heat import heat_map
from m2mkd_jax.report.records import ARMS
from m2mkd_jax.report.tables import percent, table

WORST = 10  # classes of the confusion matrix


def prediction_figures(found: Analysis) -> list[str | Figure]:
    """All figures of predictions; [] where the pass has none."""
    logits = {
        name.partition("/")[2]: array
        for name, array in found.arrays.items()
        if name.startswith("logits/")
    }
    if not logits or "labels" not in found.arrays:
        return []
    labels, names = found.arrays["labels"], found.numbers["class_names"]
    main = found.numbers["main"]
    return [
        _confusion(main, logits[main], labels, names),
        _reliability(logits, labels),
        _scores(logits, labels, found.numbers.get("split", "test")),
        _samples(found, main, logits[main], labels, names),
    ]


def _title(job: str) -> str:
    return ARMS.get(job, job)


def _scores(logits: Mapping[str, np.ndarray], labels: np.ndarray, split: str) -> str:
    rows = []
    for job, own in logits.items():
        found = scores(own, labels)
        five = found.get("top5")
        rows.append(
            [
                f"{_title(job)} ({job})",
                percent(found["top1"]),
                percent(five) if five is not None else None,
                found["ece"],
                found["brier"],
                found["nll"],
            ]
        )
    return table(
        ("network", "top-1", "top-5", "ECE", "Brier", "NLL"),
        rows,
        f"Scores on {len(labels)} {split} images. ECE: mean distance of confidence and accuracy "
        "over bins of equally many images; Brier: squared distance of the probabilities from the "
        "truth, 0 to 2; NLL: negative log-likelihood in nats. Lower is better for these three.",
    )


def _reliability(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    bins = max(min(10, len(labels) // 20), 1)

    def plot(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.2)
        for job, own in logits.items():
            number = list(ARMS).index(job) if job in ARMS else 7
            found = reliability(softmax(own), labels, bins)
            axes.plot(
                found.confidence,
                found.accuracy,
                marker=SHAPES[number],
                linestyle=DASHES[number],
                color=COLOURS[number],
                label=_title(job),
            )
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        legend_below(axes)

    errors = "; ".join(
        f"{_title(j)} ECE {scores(own, labels)['ece']:.3f}" for j, own in logits.items()
    )
    return draw(
        "Reliability",
        f"Images in {bins} bins of equal count by the probability of the predicted class. Points "
        "under the grey diagonal: the network is surer than it is right; over it: less sure.",
        f"Reliability diagram: {errors}.",
        plot,
    )


def _confusion(job: str, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    classes, guess = len(names), logits.argmax(-1)
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, guess), 1)
    wrong = counts.sum(1) - counts.diagonal()
    if classes <= WORST:
        chosen = np.arange(classes)
    else:
        misses = counts - np.diag(counts.diagonal())
        chosen = np.sort(np.argsort(-(misses + misses.T).sum(1), kind="stable")[:WORST])
    shown = counts[np.ix_(chosen, chosen)]
    shares = shown / np.maximum(counts.sum(1)[chosen, None], 1)

    def plot(axes: Any) -> None:
        own = [names[int(i)] for i in chosen]
        heat_map(axes, shares, own, own, shown)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")

    worst = int(np.argmax(wrong))
    which = "all classes" if classes <= WORST else f"the {WORST} classes with most confusions"
    return draw(
        f"Confusion, {_title(job)}",
        f"Images by true class (row) and predicted class (column), {which}; the deeper, the larger "
        "the share of the row. Off the diagonal are the errors.",
        f"Confusion matrix of {which}; most errors are of class {names[worst]}, {wrong[worst]} of "
        f"{counts[worst].sum()} images.",
        plot,
        size=(4.4, 4.0),
    )


def _samples(
    found: Analysis, job: str, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Figure:
    pixels, chosen = found.arrays["sample_images"], found.arrays["samples"]
    probabilities = softmax(logits)
    items: dict[bool, list[str]] = {True: [], False: []}
    for image, index in zip(pixels, chosen, strict=True):
        guess, truth = int(probabilities[index].argmax()), int(labels[index])
        sure = probabilities[index, guess]
        text = f"{names[guess]} ({sure:.2f})" + ("" if guess == truth else f", is {names[truth]}")
        items[guess == truth].append(
            f"<li>{image_tag(image, f'test image of class {names[truth]}')}{html.escape(text)}</li>"
        )
    body = "".join(
        f'<p class="title">{title}</p><ul class="samples">{"".join(items[right])}</ul>'
        for right, title in ((True, "Right"), (False, "Wrong"))
        if items[right]
    )
    return Figure(
        f"Sample predictions, {_title(job)}",
        body,
        "The predicted class with its probability. The wrong ones are those of most confidence.",
        wide=True,
    )
