"""The work of m2mkd-report."""

from __future__ import annotations

import argparse
from pathlib import Path

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.files.paths import as_path
from m2mkd_jax.report.analysis import FOLDER, Analysis, analyse, kept_analysis
from m2mkd_jax.report.charts import require_matplotlib
from m2mkd_jax.report.page import page
from m2mkd_jax.report.records import RunRecord, read_run


def make_report(args: argparse.Namespace) -> Path:
    """Writes the page.

    Returns:
        Where it is.

    Raises:
        UserError: a directory is no run, matplotlib is missing, or the page cannot be written.
    """
    if args.images < 1:
        raise UserError(f"--images is {args.images}; it must be above 0")
    require_matplotlib()
    runs = [read_run(as_path(given).expanduser()) for given in args.directories]
    found = [_analysis(record, args) for record in runs]
    out = as_path(args.out).expanduser() if args.out else runs[0].path / FOLDER / "index.html"
    text = page(runs, found)
    replace_file(out, lambda tmp: _write(tmp, text))
    return out


def _analysis(record: RunRecord, args: argparse.Namespace) -> Analysis:
    if args.no_analysis:
        return kept_analysis(record)
    return analyse(record, args.images)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Writes the page and says where. Raises UserError as `make_report` does."""
    print(printable(f"report: {make_report(args)}"))
