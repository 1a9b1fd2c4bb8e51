"""How a training step's time and memory grow with the work: batch, tokens, mediators, experts.

    python -m benchmarks.growth [SWEEP ...] [--steps=3] [--out=FILE.json] [--plot=FILE.png]

One quantity grows, the others stay; the networks are end to end and fresh, images random. An
exponent is the slope of log(seconds) over log(quantity), by least squares over all sizes and
between the largest two. --plot draws what --out holds, with the sweeps of this call replaced.
Needs the extra `report`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import machine
from benchmarks.cases import CASES, make_config
from m2mkd_jax.jobs.fitting import planned_bytes
from m2mkd_jax.jobs.setup import fresh_setup

JOB = "e2e_scratch"


def small_nac(config: ConfigDict, mediators: int) -> None:
    """nac_tinyimnet with two propagators in place of eight."""
    config.nac.iterations, config.nac.mediator_latents = 2, mediators


def small_vmoe(config: ConfigDict, size: int = 224, experts: int = 8, width: int = 768) -> None:
    """V-MoE-Base with four blocks in place of twelve."""
    config.vmoe.depths, config.vmoe.experts = (1, 1, 1, 1), experts
    config.data.image_size = size
    if width != config.vmoe.width:
        config.vmoe.width, config.vmoe.heads = width, width // 64


@dataclass(frozen=True)
class Sweep:
    """Steps of networks that differ in one quantity.

    Attributes:
        case: of benchmarks/cases.py.
        quantity: what grows.
        sizes: of it.
        batch: size -> images in a step.
        change: (config, size) -> None, gives the config a size.
        amount: size -> what is on the axis.
    """

    case: str
    quantity: str
    sizes: tuple[int, ...]
    batch: Callable[[int], int]
    change: Callable[[ConfigDict, int], None]
    amount: Callable[[int], int] = lambda size: size


SWEEPS = {
    "nac_batch": Sweep(
        "nac_tinyimnet",
        "images",
        (2, 4, 8, 16, 32),
        lambda size: size,
        lambda config, size: small_nac(config, 256),
    ),
    "nac_mediators": Sweep(
        "nac_tinyimnet", "mediators", (256, 512, 1024, 2048, 4096), lambda size: 1, small_nac
    ),
    "vmoe_batch": Sweep(
        "vmoe_imnet",
        "images",
        (1, 2, 4, 8, 16),
        lambda size: size,
        lambda config, size: small_vmoe(config),
    ),
    "vmoe_tokens": Sweep(
        "vmoe_imnet",
        "tokens",
        (112, 160, 224, 320, 448),
        lambda size: 2,
        lambda config, size: small_vmoe(config, size),
        lambda size: (size // 16) ** 2 + 1,
    ),
    "vmoe_experts": Sweep(
        "vmoe_imnet",
        "experts",
        (8, 16, 32, 64),
        lambda size: 4,
        lambda config, size: small_vmoe(config, experts=size, width=384),
    ),
}


def measure(sweep: Sweep, size: int, steps: int) -> dict[str, float]:
    """Seconds of the fastest of some steps, and the bytes that the compiler plans for one."""
    config = make_config(CASES[sweep.case], sweep.batch(size))
    sweep.change(config, size)
    setup = fresh_setup(config, JOB)
    data, batch = setup.phase.data, sweep.batch(size)
    draw = np.random.default_rng(0)
    shape = (batch, data.image_size, data.image_size, 3)
    inputs = {
        "image": jnp.asarray(draw.integers(0, 256, shape, np.uint8)),
        "label": jnp.asarray(draw.integers(0, data.classes, batch, np.int32)),
    }
    state, step = setup.initial_state(), setup.make_step()
    planned = planned_bytes(step.lower(state, setup.frozen, inputs).compile())
    seconds = []
    for _ in range(steps + 1):  # the first warms up
        began = time.perf_counter()
        state, metrics = step(state, setup.frozen, inputs)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    return {"amount": sweep.amount(size), "seconds": min(seconds[1:]), "bytes": planned}


def exponents(points: Sequence[dict[str, float]], of: str) -> tuple[float, float]:
    """Slopes of log(points[of]) over log(amount): over all sizes, between the largest two."""
    x, y = (np.log([point[name] for point in points]) for name in ("amount", of))
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def row(name: str, points: Sequence[dict[str, float]]) -> str:
    """A line of the table in RESULTS.md."""
    cells = [f"{point['amount']:g}: {point['seconds']:.3g} s" for point in points]
    fits = ["{:.2f} ({:.2f})".format(*exponents(points, of)) for of in ("seconds", "bytes")]
    return f"| {name} | {', '.join(cells)} | {' | '.join(fits)} |"


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draws seconds over the quantity of each sweep, on logarithmic axes."""
    columns = len(found)
    figure = Figure(figsize=(2.6 * columns, 2.6))
    axes = figure.subplots(1, columns, squeeze=False)
    for axis, (name, points) in zip(axes[0], found.items(), strict=True):
        amounts, seconds = ([p[key] for p in points] for key in ("amount", "seconds"))
        axis.loglog(amounts, seconds, "o-")
        axis.set_xlabel(SWEEPS[name].quantity)
        axis.set_ylabel("s per step")
        axis.set_title(f"{name}: slope {exponents(points, 'seconds')[0]:.2f}", fontsize=9)
        axis.set_xticks(amounts, [f"{amount:g}" for amount in amounts])
        low, high = math.floor(math.log2(min(seconds))), math.ceil(math.log2(max(seconds)))
        ticks = [2.0**i for i in range(low, high + 1)]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if unknown := [name for name in options.sweeps if name not in SWEEPS]:
        parser.error(f"no sweep {', '.join(unknown)}; known: {', '.join(SWEEPS)}")
    found: dict[str, list[dict[str, float]]] = {}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text())["sweeps"]
    print("| sweep | seconds per step | exponent of the time | of the planned memory |")
    print("|---|---|---|---|")
    for name in options.sweeps or SWEEPS:
        sweep = SWEEPS[name]
        found[name] = [measure(sweep, size, options.steps) for size in sweep.sizes]
        print(row(name, found[name]), flush=True)
        if options.out:
            result = {"machine": machine.describe(), "sweeps": found}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
