"""The page: one HTML file with all that is known of some runs."""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence

from m2mkd_jax import __version__
from m2mkd_jax.report import curves, detection, modules, overview, predictions, robustness
from m2mkd_jax.report.analysis import Analysis
from m2mkd_jax.report.charts import Figure
from m2mkd_jax.report.records import RunRecord
from m2mkd_jax.report.style import CSS, SCRIPT

Part = str | Figure
_BEGINNING, _TITLE = "<!DOCTYPE html>", ": m2mKD report</title>"
_SUMMARY = "<summary>What differs in their configs</summary>"


def page(runs: Sequence[RunRecord], found: Sequence[Analysis]) -> str:
    """The whole page.

    Args:
        runs: at least one.
        found: what the analysis pass has of each.
    """
    title = ", ".join(str(run.config.get("name") or run.path.name) for run in runs)
    parts = [_header(title, runs)]
    if len(runs) > 1:
        parts.append(_compare(runs))
    for number, (run, own) in enumerate(zip(runs, found, strict=True)):
        parts.append(_run(run, own, number))
    return (
        f'{_BEGINNING}\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}{_TITLE}<style>{CSS}</style></head>"
        f"<body>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def is_page(content: bytes) -> bool:
    """Whether the content of a file is such a page."""
    return content.startswith(_BEGINNING.encode()) and _TITLE.encode() in content


def _header(title: str, runs: Sequence[RunRecord]) -> str:
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    links = "".join(
        f'<a href="#run-{i}">{html.escape(str(run.path))}</a>' for i, run in enumerate(runs)
    )
    several = f'<nav aria-label="Runs">{links}</nav>' if len(runs) > 1 else ""
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="soft">Module-to-module knowledge distillation; m2mkd_jax {__version__}, '
        f"page made {made}.</p>{several}</header><main>"
    )


def _compare(runs: Sequence[RunRecord]) -> str:
    differences = overview.config_differences(runs)
    same = "<p>The configs of these runs are the same.</p>"
    listed = f"<details>{_SUMMARY}{_figures([differences])}</details>" if differences else same
    return (
        f"<section><h2>Runs side by side</h2>{_figures([overview.comparison(runs)])}{listed}"
        "</section>"
    )


def _run(run: RunRecord, found: Analysis, number: int) -> str:
    sections: list[tuple[str, Sequence[Part]]] = [
        ("Pipeline", [overview.pipeline(run)]),
        ("Does teaching help?", overview.results(run)),
        ("Accuracy and compute", curves.against_compute(run, found.costs)),
        ("Learning curves", curves.learning_curves(run)),
        ("Modules", modules.health(run, found)),
        ("The circuit", modules.circuit(found)),
        ("Experts", [*curves.routers(run), *modules.experts(found)]),
        ("Predictions", predictions.prediction_figures(found)),
        ("Robustness", robustness.figures(run)),
        ("Detection", detection.figures(run)),
        ("Costs", [overview.costs(run, found.costs)]),
    ]
    shown = [(title, parts) for title, parts in sections if parts]
    anchors = [f"run-{number}-{title.lower().replace(' ', '-').strip('?')}" for title, _ in shown]
    links = "".join(
        f'<a href="#{anchor}">{title}</a>'
        for anchor, (title, _) in zip(anchors, shown, strict=True)
    )
    body = "".join(
        f'<h3 id="{anchor}">{title}</h3>{_figures(parts)}'
        for anchor, (title, parts) in zip(anchors, shown, strict=True)
    )
    return (
        f'<section id="run-{number}"><h2>{html.escape(run.title)}</h2>{_notes(run, found)}'
        f'<nav aria-label="Parts of {html.escape(run.title, quote=True)}">{links}</nav>{body}'
        "</section>"
    )


def _notes(run: RunRecord, found: Analysis) -> str:
    """What is unfinished, missing or not computed."""
    notes = []
    if run.unfinished:
        states = ", ".join(
            f"{name} ({overview.WORDS_PER_STATUS[run.jobs[name].status]})"
            for name in run.unfinished
        )
        notes.append(f"This run is not finished: {states}. The same command goes on with it.")
    notes += [*run.notes, *found.notes]
    listed = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f'<div class="notes">{listed}</div>' if listed else ""


def _figures(parts: Sequence[Part]) -> str:
    return f'<div class="figures">{"".join(_figure(part) for part in parts)}</div>'


def _figure(part: Part) -> str:
    if isinstance(part, str):
        return part
    kind = " class=wide" if part.wide else ""
    title = f'<p class="title">{html.escape(part.title)}</p>' if part.title else ""
    return (
        f"<figure{kind}>{title}"
        f"{part.body}<figcaption>{html.escape(part.caption)}</figcaption></figure>"
    )
