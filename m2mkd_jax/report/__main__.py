"""m2mkd-report DIR [DIR ...] [--out=FILE]: one page that shows runs, for a browser.

`python -m m2mkd_jax.report` is the same command. DIR is the --workdir of a run: finished, under
way, stopped, or of an earlier version; what is there is shown. The page is one file, needs no
network, and has no more than a few lines of script, which sort tables.

Some figures need the networks: they run once on test images, and what they give is kept in
DIR/report/. --no_analysis leaves that out, and uses what is kept.

exit codes: 0 done; 2 the input is wrong (one line on stderr)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from m2mkd_jax.command_line import Parser, run_module


def _parser() -> Parser:
    """The command's arguments."""
    parser = Parser("report", __doc__)
    parser.add_argument("directories", metavar="DIR", nargs="+", help="a run's --workdir")
    parser.add_argument(
        "--out", default="", metavar="FILE", help="the page; by default DIR/report/index.html"
    )
    parser.add_argument(
        "--images", type=int, default=500, metavar="N", help="test images that networks run on"
    )
    parser.add_argument(
        "--no_analysis", action="store_true", help="run no network; use what is kept in DIR/report"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. `argv`: arguments, by default those of the process."""
    return run_module("report", _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
