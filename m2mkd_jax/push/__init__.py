"""Puts a network on the Hugging Face hub: safetensors, config.json and a model card.

CKPT is a directory of weights (converted, a job's or a run's), or a torch or safetensors file.
REPOSITORY is OWNER/NAME; it is made if it is not there. All files go there in one commit. The card
says what the network is, how it was trained, what a run measured, with 95% intervals over seeds, on
which data, under which licence, and how to load it: m2mkd_jax.load("hf://OWNER/NAME").

It needs the extra `hub`, and a token as huggingface_hub takes it (`hf auth login`, or $HF_TOKEN);
$HF_ENDPOINT chooses another hub.

examples:
  python -m m2mkd_jax.push runs/vmoe_digits me/vmoe-digits --license=apache-2.0
  python -m m2mkd_jax.push runs/nac me/nac --out=folder     # look at the files first

exit codes: 0 done; 2 the input is wrong, or the hub refuses (one line on stderr)
"""

from __future__ import annotations

from collections.abc import Sequence

from m2mkd_jax.command_line import Parser, run_module


def parser() -> Parser:
    """The command's arguments."""
    found = Parser("push", __doc__)
    found.add_argument("checkpoint", metavar="CKPT", help="the weights")
    found.add_argument("repository", metavar="REPOSITORY", help="OWNER/NAME on the hub")
    found.add_argument(
        "--license", default="", metavar="NAME", help="of the weights, such as apache-2.0"
    )
    found.add_argument("--private", action="store_true", help="for a repository that is made")
    found.add_argument("--message", default="", metavar="TEXT", help="of the commit")
    found.add_argument("--out", default="", metavar="DIR", help="write the files there; push none")
    found.add_argument("--arch", default="", help="the network of torch weights; see convert")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. `argv`: arguments, by default those of the process."""
    return run_module("push", parser(), argv)
