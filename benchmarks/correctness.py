"""Whether the fused forms that this device gets have the gradients of the written-out ones.

    python -m benchmarks.correctness [--rehearsal] [--json=OUT]

Every form gets 16-bit arguments; its result and gradients are compared with those of the same
arguments in float32, written out, at full precision. The written-out form in 16 bit shows how far
rounding alone leads: a fused form may be three times as far off, or a hundredth, and holds no NaN.
Among the cases is what cuDNN's attention with a bias is known to get wrong in some versions:
receivers without any sender, and numbers of senders that are 64 modulo 128. A bias that all heads
share is tried as well, as information: the network does not use it.

Exit code 1 if a form fails. --rehearsal: small sizes, for a CPU, which has no fused form.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.dispatch import sizes_of
from m2mkd_jax.config.networks import nac_spec
from m2mkd_jax.models import attention as softmax_attention
from m2mkd_jax.models.moe.grouped import grouped_linear
from m2mkd_jax.models.nac.attention import attend
from m2mkd_jax.models.nac.fused import agreement
from m2mkd_jax.models.nac.fused.choice import takes

HALF = jnp.bfloat16
FACTOR, ENOUGH = 3.0, 1e-2
# images, receivers, senders, heads, channels of a head
KERNEL_SHAPES = {
    "nac_tinyimnet": (16, 256, 320, 6, 64),
    "nac_imnet": (4, 768, 960, 8, 64),
    "192 senders": (8, 128, 192, 4, 64),
    "256 senders": (8, 128, 256, 4, 64),
    "odd, written out": (8, 127, 321, 4, 64),
}
TRANSFORMER_SHAPES = {
    "ViT-B": (16, 197, 197, 12, 64),
    "ViT-H": (8, 257, 257, 16, 80),
    "even": (8, 256, 256, 8, 64),
}
SMALL_KERNEL = {"small": (2, 64, 80, 2, 8), "odd, written out": (2, 65, 81, 2, 8)}
SMALL_TRANSFORMER = {"small": (2, 65, 65, 2, 8)}
# rows, experts, channels in, channels out
EXPERT_SHAPE, SMALL_EXPERT_SHAPE = (25216, 8, 768, 3072), (400, 4, 24, 40)

Arguments = tuple[jax.Array, ...]


def normal(number: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape, HALF)


def gradients(function: Callable, arguments: Arguments, weight: jax.Array) -> Arguments:
    """The function's result, and the gradients of its weighted sum by every argument."""

    def loss(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        result = function(*arguments).astype(jnp.float32)
        return (result * weight).sum(), result

    numbers = tuple(range(len(arguments)))
    found, result = jax.jit(jax.grad(loss, argnums=numbers, has_aux=True))(*arguments)
    return (result, *found)


def distances(found: Arguments, expected: Arguments) -> list[float]:
    """Norms of the differences, as shares of the expected arrays' norms; NaN counts as infinity."""
    shares = []
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        share = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        shares.append(float(share) if np.isfinite(share) else float("inf"))
    return shares


def compare(name: str, fused: Callable, written_out: Callable, arguments: Arguments) -> dict:
    """One form: distances of result and gradients from those in float32.

    Args:
        name: of the form, for the table.
        fused: the form of this device.
        written_out: the same computation, written out.
        arguments: 16-bit.

    Returns:
        'name', 'fused' and 'rounding' (distances of both from float32), 'good'.
    """
    began = time.monotonic()
    whole = tuple(a.astype(jnp.float32) for a in arguments)
    with jax.default_matmul_precision("highest"):
        shape = jax.eval_shape(written_out, *whole).shape
        weight = jax.random.normal(jax.random.key(99), shape)
        expected = gradients(written_out, whole, weight)
    rounding = distances(gradients(written_out, arguments, weight), expected)
    found = distances(gradients(fused, arguments, weight), expected)
    limits = [max(FACTOR * r, ENOUGH) if np.isfinite(r) else ENOUGH for r in rounding]
    return {
        "name": name,
        "fused": found,
        "rounding": rounding,
        "good": all(f <= limit for f, limit in zip(found, limits, strict=True)),
        "seconds": round(time.monotonic() - began, 1),
    }


def without_cudnn(function: Callable) -> Callable:
    """The function, traced as where there is no cuDNN."""

    @functools.wraps(function)
    def traced(*arguments: jax.Array) -> jax.Array:
        with mock.patch.object(softmax_attention, "fits_cudnn", lambda q, k: False):
            return function(*arguments)

    return traced


def log_kernels(images: int, u: int, v: int) -> dict[str, tuple[jax.Array, np.ndarray]]:
    """Log kernels by what is special about them, and which of their links are truncated."""
    key = jax.random.split(jax.random.key(5), 3)
    logs = -2.0 * jax.random.uniform(key[0], (images, u, v), HALF)
    links = np.array(jax.random.uniform(key[1], (images, u, v)) < 0.7)
    links[..., 0] = True
    alone = links.copy()
    alone[:, 3] = False
    everywhere = np.ones_like(links)
    return {
        "no truncation": (logs, everywhere),
        "one kernel for all images": (logs[0], everywhere[0]),
        "30% truncated": (logs, links),
        "a receiver without senders": (logs, alone),
    }


def kernel_cases(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict]:
    """Attention under a kernel; the gradient of the kernel is that of its untruncated links."""
    for name, (images, u, v, heads, c) in shapes.items():
        for special, (logs, links) in log_kernels(images, u, v).items():

            def attention(q, k, v, logs, links=links):
                return attend(q, k, v, jnp.where(links, logs, -jnp.inf))

            q, k = normal(1, images, u, heads, c), normal(2, images, v, heads, c)
            arguments = (q, k, normal(3, images, v, heads, c), logs)
            result = compare(
                f"kernel, {name}: {special}", attention, without_cudnn(attention), arguments
            )
            even = u % 2 == v % 2 == 0
            yield result | {"by": "cuDNN" if even and softmax_attention.fits_cudnn(q, k) else "XLA"}


def transformer_cases(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict]:
    for name, (images, n, _, heads, c) in shapes.items():
        arguments = tuple(normal(i, images, n, heads, c) for i in (1, 2, 3))
        attention = softmax_attention.self_attention
        result = compare(f"tokens, {name}", attention, without_cudnn(attention), arguments)
        yield result | {"by": "cuDNN" if softmax_attention.fits_cudnn(*arguments[:2]) else "XLA"}


def expert_cases(shape: tuple[int, int, int, int]) -> Iterator[dict]:
    """Rows of experts: nearly as many for each, and unevenly many, for one of them none."""
    rows, experts, c, d = shape
    uneven = sizes_of(rows, experts, 0.5)
    uneven[1], uneven[2] = uneven[1] + uneven[2], 0
    arguments = (
        normal(1, rows, c),
        normal(2, experts, c, d) * jnp.asarray(c**-0.5, HALF),
        normal(3, experts, d),
    )
    for name, sizes in (("even", sizes_of(rows, experts, 0.1)), ("uneven", uneven)):
        owner = jnp.asarray(np.repeat(np.arange(experts), sizes))

        def written_out(rows, kernel, bias, owner=owner):
            def add(total, expert):
                number, own, own_bias = expert
                inside = (owner == number)[:, None]
                return total + jnp.where(inside, rows @ own + own_bias[None], 0), None

            zeros = jnp.zeros((len(rows), d), rows.dtype)
            return jax.lax.scan(add, zeros, (jnp.arange(experts), kernel, bias))[0]

        for method in ("batched", "ragged"):

            def grouped(rows, kernel, bias, method=method, sizes=sizes):
                return grouped_linear(rows, kernel, bias, jnp.asarray(sizes), method)

            result = compare(f"experts, {method}, {name}", grouped, written_out, arguments)
            yield result | {"by": "XLA"}


def propagator_cases(names: Sequence[str]) -> Iterator[dict]:
    """A NAC's propagator by fused kernels: its result and the gradients of all its arrays.

    Args:
        names: of configs.
    """
    for name in names:
        config = importlib.import_module(f"configs.{name}").get_config()
        spec = nac_spec(config, config.data)
        if not takes(spec, HALF):
            spec = dataclasses.replace(spec, input_latents=64, mediator_latents=64, head_dim=32)
        began = time.monotonic()
        apart = agreement.distances(spec, jnp.dtype(HALF))
        yield {
            "name": f"propagator, {name}",
            "fused": [d.own / max(d.whole, 1e-30) for d in apart.values()],
            "rounding": [d.by_xla / max(d.whole, 1e-30) for d in apart.values()],
            "arrays": list(apart),
            "good": all(d.is_rounding for d in apart.values()),
            "seconds": round(time.monotonic() - began, 1),
            "by": "Triton" if jax.default_backend() == "gpu" else "Triton, interpreted",
        }


def shared_bias(shape: tuple[int, ...]) -> dict:
    """Whether the library takes a bias that all heads share, (B, 1, U, V), and is right."""
    images, u, v, heads, c = shape
    arguments = (
        normal(1, images, u, heads, c),
        normal(2, images, v, heads, c),
        normal(3, images, v, heads, c),
        log_kernels(images, u, v)["no truncation"][0][:, None],
    )

    def attention(q, k, v, bias, implementation):
        return softmax_attention.dot_product_attention(
            q, k, v, bias=bias, implementation=implementation
        )

    forms = [functools.partial(attention, implementation=i) for i in ("cudnn", "xla")]
    name = "for information: cuDNN with one bias for all heads"
    try:
        return compare(name, *forms, arguments) | {"by": "cuDNN", "information": True}
    except Exception as error:  # whatever the library raises is the answer
        said = f"refused: {type(error).__name__}: {error}".splitlines()[0][:200]
        return {"name": name, "by": said, "good": False, "information": True}


def cases(rehearsal: bool) -> Iterator[dict]:
    yield from propagator_cases(["nac_digits"] if rehearsal else ["nac_tinyimnet", "nac_imnet"])
    yield from transformer_cases(SMALL_TRANSFORMER if rehearsal else TRANSFORMER_SHAPES)
    shapes = SMALL_KERNEL if rehearsal else KERNEL_SHAPES
    yield from kernel_cases(shapes)
    yield from expert_cases(SMALL_EXPERT_SHAPE if rehearsal else EXPERT_SHAPE)
    yield shared_bias(next(iter(shapes.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearsal", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    results = []
    for result in cases(options.rehearsal):
        results.append(result)
        verdict = "good" if result["good"] else "info" if result.get("information") else "BAD"
        numbers = " ".join(f"{share:.1e}" for share in result.get("fused", ()))
        rounding = " ".join(f"{share:.1e}" for share in result.get("rounding", ()))
        print(
            f"{verdict:4s} {result['name']} (by {result['by']}): result and gradients off by "
            f"{numbers or '-'}; 16 bit written out {rounding or '-'}",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    bad = [r["name"] for r in results if not r["good"] and not r.get("information")]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(results)} forms are wrong: {'; '.join(bad)}")
    print(f"all {sum(not r.get('information') for r in results)} forms are right")


if __name__ == "__main__":
    main()
