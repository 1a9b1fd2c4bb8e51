"""FLOPs of what libraries and kernels of our own compute; a multiply-add counts as two."""

from __future__ import annotations

import math

# Products in each attention kernel of models/nac/fused; its backward pass computes scores and the
# weights' gradient twice.
OWN_PRODUCTS = {
    "attention_forward": 2,
    "attention_backward_receivers": 3,
    "attention_backward_senders": 4,
}


def attention_flops(products: int, operands: list[tuple[int, ...]]) -> int:
    """FLOPs of fused attention: queries and keys are (B, N, H, C) or (B, N, HC); two forward.

    Backward there are five: scores again, and gradients of weights, values, queries and keys.
    """
    return products * 2 * math.prod(operands[0]) * operands[1][1]


def convolution_flops(
    target: str, labels: str, operands: list[tuple[int, ...]], result: tuple[int, ...]
) -> int:
    """FLOPs of a convolution; in either direction each output has one product per weight."""
    weights, output = operands[1], result
    if target.endswith("BackwardFilter"):
        weights, output = result, operands[1]
    elif target.endswith("BackwardInput"):
        output = operands[0]
    out_axis = labels.split("_")[1].partition("->")[0].index("o")
    return 2 * math.prod(output) * math.prod(weights) // weights[out_axis]
