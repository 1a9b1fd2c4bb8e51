"""The work of `python -m m2mkd_jax.export`.

Axes: B batch, S side of an image, N tokens, D channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax import export
from m2mkd_jax.checkpoint.files import replace_file, write_json
from m2mkd_jax.errors import UserError
from m2mkd_jax.export.onnx_file import OnnxProgram
from m2mkd_jax.export.stablehlo import StableHLOProgram
from m2mkd_jax.files.outputs import check_file, refuse_inputs
from m2mkd_jax.files.paths import at_home
from m2mkd_jax.inference import Model, load_network

TOLERANCE = 1e-4
# Protocol buffers and flat buffers, which the two formats are, end at 2 GiB.
LARGEST = 2**31 - 2**24


def run(args: argparse.Namespace) -> None:
    """Exports one network.

    Raises:
        UserError: the input is wrong, or the network cannot be exported; nothing is left.
    """
    target = at_home(args.target)
    described = target.with_name(f"{target.name}.json")
    _check(args, (target, described))
    model = load_network(args.checkpoint, args.module, arch=args.arch)
    if 4 * model.parameters > LARGEST:
        raise UserError(
            f"{args.checkpoint} has {4 * model.parameters / 2**30:.1f} GiB of weights; a file of "
            f"{args.format} ends at 2 GiB: export it by --module=I, or convert it to safetensors"
        )
    shape, function = _shape(model, args), _function(model, args.pixels)
    dtype = np.dtype(np.uint8 if args.pixels else np.float32)
    maker = StableHLOProgram if args.format == "stablehlo" else OnnxProgram
    program: StableHLOProgram | OnnxProgram = maker(
        function, (args.batch, *shape), dtype, args.platforms
    )
    error = _difference(program, model, args.batch, shape, dtype)
    if not error <= TOLERANCE:
        raise UserError(
            f"{args.checkpoint}: what {args.format} computes differs by {error:.1e} of the largest "
            f"output, more than {TOLERANCE:.0e}; nothing is written"
        )
    content, facts = program.content(), _facts(model, args, shape)
    replace_file(target, lambda tmp: _write(tmp, content))
    try:
        write_json(described, facts | program.facts())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    taken = f"{facts['input']['type']} {facts['input']['shape']}"
    print(
        f"{args.checkpoint} -> {args.target}: {args.format}, {len(content):,} bytes, takes "
        f"{taken}, gives {facts['output']['shape']}; equal within {error:.1e} of the largest output"
    )


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _check(args: argparse.Namespace, written: Sequence[Path]) -> None:
    """Refuses arguments, and files to write, before anything is loaded. Raises UserError."""
    if args.batch < 0:
        raise UserError(f"--batch={args.batch}: give a number from 1 on, or 0 for any")
    if args.format == "onnx" and args.platforms != export.PLATFORMS:
        raise UserError(
            "--platforms is for --format=stablehlo; ONNX runs wherever its runtime does"
        )
    for path in written:
        refuse_inputs(path, (args.checkpoint, args.arch), str(path))
        check_file(path, str(path))
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} is there already; choose another OUT or add --overwrite")


def _shape(model: Model, args: argparse.Namespace) -> tuple[int, ...]:
    """The shape of one input. Raises UserError where arguments do not fit it."""
    side = model.image_size
    if side and args.tokens:
        raise UserError("--tokens is for middle modules; this network takes images")
    if not side and args.pixels:
        raise UserError(f"--pixels: {args.checkpoint} takes tokens, no images")
    if not side and args.tokens < 1:
        raise UserError(f"{args.checkpoint} takes tokens (B, N, {model.width}); give N, --tokens=N")
    return (side, side, model.channels) if side else (args.tokens, model.width)


def _function(model: Model, pixels: bool) -> Callable[[jax.Array], jax.Array]:
    """The network as a function to export; `pixels`: of images that it normalises itself."""
    network = model.portable()
    if not pixels:
        return network
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (model.mean, model.std))
    return lambda x: network((x.astype(jnp.float32) / 255.0 - mean) / std)


def _difference(
    program: StableHLOProgram | OnnxProgram,
    model: Model,
    batch: int,
    shape: Sequence[int],
    dtype: np.dtype,
) -> float:
    """The largest difference of the program's outputs to the network's, of the largest output.

    Programs of a free batch are tried with two batches.
    """
    generator, found = np.random.default_rng(0), 0.0
    for count in (batch,) if batch else (1, 3):
        if dtype == np.uint8:
            x = generator.integers(0, 256, (count, *shape), np.uint8)
            inputs = (x / np.float32(255) - model.mean) / np.asarray(model.std)
        else:
            inputs = x = generator.standard_normal((count, *shape), np.float32)
        mine, theirs = np.asarray(model(inputs.astype(np.float32))), program.call(x)
        if theirs.shape != mine.shape or not np.isfinite(theirs).all():
            return float("inf")
        found = max(found, float(np.abs(mine - theirs).max() / max(np.abs(mine).max(), 1e-12)))
    return found


def _facts(model: Model, args: argparse.Namespace, shape: Sequence[int]) -> dict[str, Any]:
    """What OUT.json says."""
    batch: int | str = args.batch or "B"
    given: list[int | str] = [batch, model.classes]
    if not model.classes:
        like = jax.ShapeDtypeStruct((args.batch or 1, *shape), jnp.float32)
        given = [batch, *jax.eval_shape(model.portable(), like).shape[1:]]
    return {
        "network": model.description["kind"],
        "input": {"shape": [batch, *shape], "type": "uint8" if args.pixels else "float32"},
        "normalised_inside": args.pixels,
        "output": {"shape": given, "type": "float32"},
        "mean": list(model.mean),
        "std": list(model.std),
        "class_names": list(model.class_names),
    }
