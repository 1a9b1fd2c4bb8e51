"""m2mkd-report DIR [DIR ...] [--out=FILE]: one page that shows runs, for a browser.

`python -m m2mkd_jax.report` is the same command. DIR is the --workdir of a run: finished, under
way, stopped, or of an earlier version; what is there is shown. The page is one file, needs no
network, and has no more than a few lines of script, which sort tables.

Some figures need the networks: they run once on test images, and what they give is kept in
DIR/report/. --no_analysis leaves that out, and uses what is kept.

exit codes: 0 done; 2 the input is wrong (one line on stderr)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.command_line import Parser, run
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.files.paths import as_path
from m2mkd_jax.report.analysis import FOLDER, IMAGES, Analysis, analyse, read_kept
from m2mkd_jax.report.charts import require_matplotlib
from m2mkd_jax.report.page import page
from m2mkd_jax.report.records import RunRecord, read_run


def _parser() -> argparse.ArgumentParser:
    parser = Parser("report", __doc__)
    parser.add_argument("directories", metavar="DIR", nargs="+", help="a run's --workdir")
    parser.add_argument(
        "--out", default="", metavar="FILE", help="the page; by default DIR/report/index.html"
    )
    parser.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help="test images that networks run on"
    )
    parser.add_argument(
        "--no_analysis", action="store_true", help="run no network; use what is kept in DIR/report"
    )
    return parser


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
        return read_kept(record.path) or Analysis()
    return analyse(record, args.images)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. `argv`: arguments, by default those of the process."""

    def command() -> None:
        out = make_report(_parser().parse_args(argv))
        print(printable(f"report: {out}"))

    return run("report", command)


if __name__ == "__main__":
    sys.exit(main())
