"""The work of m2mkd-report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.files.outputs import check_file, refuse_inputs, whole
from m2mkd_jax.files.paths import at_home, in_bucket
from m2mkd_jax.report.analysis import FOLDER, Analysis, analyse, kept_analysis
from m2mkd_jax.report.charts import require_matplotlib
from m2mkd_jax.report.page import is_page, page
from m2mkd_jax.report.records import RunRecord, read_run


def make_report(args: argparse.Namespace) -> Path:
    """Writes the page.

    Returns:
        Where it is.

    Raises:
        UserError: a directory is no run, matplotlib is missing, or the page cannot be written
            there.
    """
    if args.images < 1:
        raise UserError(f"--images is {args.images}; it must be above 0")
    require_matplotlib()
    runs = [read_run(at_home(given)) for given in args.directories]
    out = at_home(args.out) if args.out else runs[0].path / FOLDER / "index.html"
    _check_out(out, runs)
    found = [_analysis(record, args) for record in runs]
    text = page(runs, found)
    _check_out(out, runs)  # the analysis writes files too
    replace_file(out, lambda tmp: _write(tmp, text))
    return out


def _check_out(out: Path, runs: Sequence[RunRecord]) -> None:
    """Refuses a place for the page that holds anything but an earlier one, or belongs to a run.

    Raises:
        UserError: names the file.
    """
    if not in_bucket(out):
        check_file(out, f"--out: {out}")
    if out.exists() and not is_page(out.read_bytes()):
        raise UserError(f"--out: {out} is there already, and is no report; choose another file")
    if whole(out).parent not in [whole(run.path / FOLDER) for run in runs]:
        refuse_inputs(out, [run.path for run in runs], f"--out: {out}")


def _analysis(record: RunRecord, args: argparse.Namespace) -> Analysis:
    if args.no_analysis:
        return kept_analysis(record)
    return analyse(record, args.images)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Writes the page and says where. Raises UserError as `make_report` does."""
    print(printable(f"report: {make_report(args)}"))
