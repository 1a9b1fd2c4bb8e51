"""RandAugment and colour jitter, one image at a time.

Axes: B batch, H height, W width, C channels (3), L layers (operations per image).

Source: docs/reference.md#rand-augment.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from m2mkd_jax.data import image_ops
from m2mkd_jax.errors import UserError

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
LARGEST = 10.0  # largest magnitude
PROBABILITY = 0.5  # that a drawn operation is applied
_WORD = re.compile(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)")
_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": image_ops.auto_contrast,
    "Equalize": image_ops.equalize,
    "Invert": image_ops.invert,
    "Rotate": image_ops.rotate,
    "Posterize": image_ops.posterize,
    "Solarize": image_ops.solarize,
    "SolarizeAdd": image_ops.solarize_add,
    "Color": image_ops.color,
    "Contrast": image_ops.contrast,
    "Brightness": image_ops.brightness,
    "Sharpness": image_ops.sharpness,
    "ShearX": image_ops.shear_x,
    "ShearY": image_ops.shear_y,
    "TranslateX": image_ops.translate_x,
    "TranslateY": image_ops.translate_y,
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """A RandAugment policy.

    Attributes:
        magnitude: mean magnitude, 0 to 10.
        layers: operations drawn per image, with replacement.
        spread: standard deviation of the magnitude.
        increasing: whether Posterize, Solarize and the blends become stronger with the magnitude
            (`inc1`).
    """

    magnitude: float = 10.0
    layers: int = 2
    spread: float = 0.0
    increasing: bool = False

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Reads a string like rand-m9-mstd0.5-inc1; missing parts have their defaults.

        Raises:
            UserError: an invalid part; names its position.
        """
        name, *words = text.split("-")
        if name != "rand":
            raise _bad(text, 0, name, 'a policy starts with "rand"')
        fields: dict[str, float] = {}
        position = len(name) + 1
        for word in words:
            found = _WORD.fullmatch(word)
            if not found:
                raise _bad(text, position, word, "use mNUMBER, nNUMBER, mstdNUMBER or incNUMBER")
            key, value = found[1], float(found[2])
            if key in fields:
                raise _bad(text, position, word, f"{key} is given twice")
            if key == "m" and value > LARGEST:
                raise _bad(text, position, word, "the magnitude is 0 to 10")
            if key == "n" and (value < 1 or value != int(value)):
                raise _bad(text, position, word, "n is a whole number, at least 1")
            if key == "inc" and value not in (0, 1):
                raise _bad(text, position, word, "inc is 0 or 1")
            fields[key] = value
            position += len(word) + 1
        return cls(
            fields.get("m", cls.magnitude),
            int(fields.get("n", cls.layers)),
            fields.get("mstd", cls.spread),
            bool(fields.get("inc", cls.increasing)),
        )


def _bad(text: str, position: int, word: str, reason: str) -> UserError:
    return UserError(
        f'data.augment.rand_augment is "{text}": cannot read "{word}" at position {position}:'
        f" {reason} (the published policy is rand-m9-mstd0.5-inc1)"
    )


@dataclasses.dataclass(frozen=True)
class Choices:
    """The random numbers of the operations of B images.

    Attributes:
        operation: (B, L), uniform in [0, 1).
        applied: (B, L), uniform in [0, 1).
        sign: (B, L), uniform in [0, 1).
        magnitude: (B, L), standard normal.
    """

    operation: np.ndarray
    applied: np.ndarray
    sign: np.ndarray
    magnitude: np.ndarray

    @classmethod
    def of(cls, rng: np.random.Generator, batch_size: int, layers: int) -> "Choices":
        """Draws the numbers for `batch_size` images with `layers` operations each."""
        uniform = rng.random((3, batch_size, layers))
        magnitude = rng.standard_normal((batch_size, layers))
        return cls(uniform[0], uniform[1], uniform[2], magnitude)

    def __getitem__(self, part: int | slice) -> "Choices":
        """The draws of one or some of the images."""
        return Choices(*(getattr(self, f.name)[part] for f in dataclasses.fields(self)))


def operations(policy: Policy, choices: Choices) -> list[tuple[str, float | None]]:
    """The operations applied to one image: (name, argument), None for operations without one.

    Args:
        policy: the policy.
        choices: of one image, arrays (L,).
    """
    number = np.floor(choices.operation * len(OPERATIONS)).astype(int)
    strength = np.clip(policy.magnitude + policy.spread * choices.magnitude, 0, LARGEST)
    sign = np.where(choices.sign < 0.5, -1.0, 1.0)
    return [
        (
            OPERATIONS[number[i]],
            argument(OPERATIONS[number[i]], strength[i], sign[i], policy.increasing),
        )
        for i in np.flatnonzero(choices.applied < PROBABILITY)
    ]


def argument(name: str, magnitude: float, sign: float, increasing: bool) -> float | None:
    """The argument of an operation.

    Args:
        name: one of OPERATIONS.
        magnitude: 0 to 10.
        sign: 1 or -1.
        increasing: see `Policy`.

    Returns:
        Degrees, kept bits, a threshold, an added value, a blend factor, a shear, or a share of the
        image's side; None for operations without argument.

    Source: docs/reference.md#rand-augment.
    """
    share = magnitude / LARGEST
    if name == "Rotate":
        return sign * 30 * share
    if name == "Posterize":
        return 4 - int(4 * share) if increasing else int(4 * share)
    if name == "Solarize":
        return 256 - int(256 * share) if increasing else int(256 * share)
    if name == "SolarizeAdd":
        return int(110 * share)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return 1 + sign * 0.9 * share if increasing else 0.1 + 1.8 * share
    if name in ("ShearX", "ShearY"):
        return sign * 0.3 * share
    if name in ("TranslateX", "TranslateY"):
        return sign * 0.45 * share
    return None


def apply(image: np.ndarray, steps: Sequence[tuple[str, float | None]]) -> np.ndarray:
    """Applies the steps of `operations` to a copy of the image uint8 (H, W, C)."""
    for name, value in steps:
        function = _FUNCTIONS[name]
        image = function(image) if value is None else function(image, value)
    return image


def jitter(image: np.ndarray, strength: float, draws: np.ndarray) -> np.ndarray:
    """Changes brightness, contrast and saturation, in random order, by factors of 1 +- strength.

    Args:
        image: uint8 (H, W, C).
        strength: 0 to 1.
        draws: (2, 3), uniform in [0, 1): the factors, and the sort keys of the order.

    Source: docs/reference.md#color-jitter.
    """
    functions = (image_ops.brightness, image_ops.contrast, image_ops.color)
    factors = 1 + strength * (2 * draws[0] - 1)
    for number in np.argsort(draws[1]):
        image = functions[number](image, factors[number])
    return image
