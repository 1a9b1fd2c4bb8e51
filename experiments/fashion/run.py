"""Runs the experiments on Fashion-MNIST, and writes their table.

    python -m experiments.fashion.run FAMILY [--workdir=runs/fashion] [--arms=a,b] [--seeds=5] \
        [--arm_seeds=3]

FAMILY is vmoe or nac. The base run teaches a network and trains it beside scratch, logit
distillation and, for a V-MoE, sparse upcycling; then come the arms of arms.py, in directories of
their own, which take what they share with the base run from it. A second call goes on where the
first one ended. The table is written to WORKDIR/FAMILY/results.md and results.json after each run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from experiments.fashion import results
from experiments.fashion.arms import SCRATCH, TEACHERS, Arm, Compute, arms_of
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.plan import is_done
from m2mkd_jax.report.records import read_run

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    """Runs what is not done; returns the exit code of the first run that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("family", choices=("vmoe", "nac"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--arms", default="", help="names of arms.py, with commas; all by default")
    parser.add_argument("--seeds", type=int, default=5, help="end-to-end trainings of a network")
    parser.add_argument("--arm_seeds", type=int, default=0, help="of an arm; 0: as many")
    flags = parser.parse_args(argv)
    try:
        arms = _chosen(flags.arms, flags.family)
    except UserError as error:
        print(f"experiments.fashion.run: {error}", file=sys.stderr)
        return 2
    home = flags.workdir / flags.family
    base, seeds = home / "base", f"--config.e2e_seeds={flags.seeds}"
    if code := _train(flags.family, base, (*TEACHERS, "m2mkd"), seeds):
        return code
    results.write(home)
    compute = results.compute(base)
    seeds = f"--config.e2e_seeds={flags.arm_seeds or flags.seeds}"
    for arm in arms:
        directory, changes = _directory(base, arm), _changes(arm, compute, base)
        teaching = () if arm.charged else ("m2mkd",)
        if code := _train(flags.family, directory, teaching, seeds, *changes):
            return code
        results.write(home)
    print((home / "results.md").read_text(encoding="utf-8"))
    return 0


def _chosen(names: str, family: str) -> list[Arm]:
    """The arms of a family that were asked for. Raises UserError where there is none of a name."""
    known = arms_of(family)
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    for name in wanted:
        if name not in known:
            raise UserError(f'--arms: no arm "{name}"; known: {", ".join(known)}')
    return [known[name] for name in wanted]


def _train(family: str, workdir: Path, teaching: tuple[str, ...], *flags: str) -> int:
    """Runs all jobs of a directory; returns the exit code of the first call that fails.

    Nothing is chosen by the accuracies of the phases in `teaching`: they are measured once.
    """
    if teaching:
        once = ("--config.evaluation.every=0", f"--only={','.join(teaching)}")
        if code := _call(family, workdir, *flags, *once):
            return code
    return _call(family, workdir, *flags)


def _call(family: str, workdir: Path, *flags: str) -> int:
    """Runs the program as a user does; returns its exit code."""
    config = f"--config={HERE / f'{family}.py'}"
    command = [sys.executable, "-m", "m2mkd_jax.main", config, f"--workdir={workdir}", *flags]
    print(" ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode


def _directory(base: Path, arm: Arm) -> Path:
    """An arm's directory, with the finished jobs that it takes from the base run."""
    path = base.parent / arm.name
    for job in read_run(base).jobs.values():
        source, target = base / "jobs" / job.name, path / "jobs" / job.name
        if job.phase in arm.keeps and not target.exists() and is_done(base, job.name):
            beside = target.with_name(f".{target.name}.copy")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(source, beside)
            beside.rename(target)
    return path


def _changes(arm: Arm, compute: Compute, base: Path) -> list[str]:
    """The flags by which an arm's run differs from the base run."""
    before = () if arm.phase == SCRATCH else (*TEACHERS, "m2mkd")
    phases = (*before, arm.phase, "eval")
    flags = [f"--config.phases={phases}"]
    flags += [f"--config.{key}={value}" for key, value in arm.changes]
    if arm.charged:
        config = read_run(base).restored
        epochs = compute.epochs(config.recipes.e2e.epochs, arm.charged(compute))
        flags.append(f"--config.recipes.e2e.epochs={epochs}")
        # As often in all as the base run's networks are looked at.
        every = config.evaluation.every * epochs / config.recipes.e2e.epochs
        flags.append(f"--config.evaluation.every={every}")
    return flags


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
