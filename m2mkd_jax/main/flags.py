"""The flags of m2mkd, and what --help prints of them; loads no jax."""

from __future__ import annotations

import textwrap

from absl import flags
from ml_collections import config_flags

from m2mkd_jax.config.files import shipped_configs

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "a shipped config by name, or the path of a config file; :ARGUMENT where it takes one",
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "directory of the run, or gs://BUCKET/...: checkpoints, logs, results; what is done stays done",
)
ONLY = flags.DEFINE_string(
    "only", "", "run these jobs alone, such as m2mkd/3,e2e; a phase's name means all of its jobs"
)
REDO = flags.DEFINE_string(
    "redo", "", "delete the results of these jobs and of all that depend on them, and start again"
)
EXTEND = flags.DEFINE_string(
    "extend", "", "go on with these jobs, finished or not, whose recipes' epochs were raised"
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "print jobs, networks, memory and missing data; needs no data, writes nothing"
)
LIST_KEYS = flags.DEFINE_bool(
    "list_keys", False, "print every key of the config with its value and its meaning"
)
FLAGS = (CONFIG, WORKDIR, ONLY, REDO, EXTEND, DRY_RUN, LIST_KEYS)


def usage() -> str:
    """What --help prints."""
    lines = ["usage: m2mkd --config=CONFIG --workdir=DIR [--config.KEY=VALUE ...]", ""]
    texts = {flag.name: flags.FLAGS[flag.name].help for flag in FLAGS}
    texts["config.KEY"] = "another value for a key; keys are listed in docs/config.md"
    texts |= {"help": "this text; --helpfull: every flag", "version": "the version"}
    for name, text in texts.items():
        lines += textwrap.wrap(
            text, 98, initial_indent=f"  --{name:14}", subsequent_indent=" " * 18
        )
    lines += ["", f"shipped configs: {', '.join(shipped_configs())}"]
    lines += ["exit codes: 0 done; 2 wrong input; 3 stopped by a signal, run the command again;"]
    lines += ["            4 another process of the run has died or hangs, run it again"]
    return "\n".join(lines)
