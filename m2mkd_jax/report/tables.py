"""Tables of the page, whose columns can be sorted, and numbers as people read them."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Any

MISSING = "\N{EN DASH}"
_numbers = itertools.count(1)


def cell(shown: str, value: Any = None) -> tuple[str, Any]:
    """A cell that is sorted by another value than the text that it shows."""
    return shown, value


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """A sortable table.

    Args:
        heads: of the columns.
        rows: a cell is text, a number, None (nothing is known), or of `cell`.
        caption: how to read it.
    """
    columns = "".join(
        f'<th scope="col"><button type="button">{html.escape(head)}</button></th>' for head in heads
    )
    body = "".join(f"<tr>{''.join(_cell(entry) for entry in row)}</tr>" for row in rows)
    # Names of regions differ on a page, or a screen reader cannot tell them apart.
    label = html.escape(f"Table {next(_numbers)}: {caption.partition('.')[0]}", quote=True)
    return (
        '<figure class="listed"><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{label}">'
        f'<table class="sortable"><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>'
        f"</div><figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _cell(entry: Any) -> str:
    shown, value = entry if isinstance(entry, tuple) else (entry, None)
    if shown is None:
        return f'<td data-value="">{MISSING}</td>'
    if isinstance(shown, float):
        shown, value = f"{shown:.4f}", shown if value is None else value
    key = "" if value is None else f' data-value="{html.escape(str(value), quote=True)}"'
    return f"<td{key}>{html.escape(str(shown))}</td>"


def percent(share: float | None) -> tuple[str, Any]:
    """A share as a cell in percent."""
    return (MISSING, "") if share is None else (f"{100 * share:.1f}%", share)


def duration(seconds: float) -> tuple[str, float]:
    """Seconds as a cell."""
    return shown_duration(seconds), seconds


def shown_duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
