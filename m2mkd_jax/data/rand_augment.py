"""RandAugment and colour jitter, one image at a time (reference section 6).

Axes: B batch, H height, W width, C channels (3), L layers (operations per image).
"""

import dataclasses
import re

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
LARGEST = 10.0  # magnitude
PROBABILITY = 0.5  # of each drawn operation to be applied
_WORD = re.compile(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)")
_FUNCTIONS = {
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
    """What a policy string says.

    magnitude: mean strength, 0 to 10; layers: operations drawn per image, with replacement;
    spread: standard deviation of the strength; increasing: whether Posterize, Solarize and the
    blends become stronger with the magnitude (`inc1`).
    """

    magnitude: float = 10.0
    layers: int = 2
    spread: float = 0.0
    increasing: bool = False

    @classmethod
    def parse(cls, text):
        """Reads a string like rand-m9-mstd0.5-inc1; parts left out keep their defaults.

        Raises: UserError with the position of the first part that makes no sense.
        """
        name, *words = text.split("-")
        if name != "rand":
            raise _bad(text, 0, name, 'a policy starts with "rand"')
        fields, position = {}, len(name) + 1
        for word in words:
            found = _WORD.fullmatch(word)
            if not found:
                raise _bad(text, position, word, "use mNUMBER, nNUMBER, mstdNUMBER or incNUMBER")
            key, value = found[1], float(found[2])
            if key in fields:
                raise _bad(text, position, word, f"{key} stands there twice")
            if key == "m" and value > LARGEST:
                raise _bad(text, position, word, "the magnitude is 0 to 10")
            if key == "n" and (value < 1 or value != int(value)):
                raise _bad(text, position, word, "n is a whole number from 1 on")
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


def _bad(text, position, word, reason):
    return UserError(
        f'data.augment.rand_augment is "{text}": cannot read "{word}" at position {position}:'
        f" {reason} (the published policy is rand-m9-mstd0.5-inc1)"
    )


@dataclasses.dataclass(frozen=True)
class Choices:
    """The random numbers behind the operations of B images.

    operation, applied, sign: (B, L), uniform in [0, 1); magnitude: (B, L), standard normal.
    """

    operation: np.ndarray
    applied: np.ndarray
    sign: np.ndarray
    magnitude: np.ndarray

    @classmethod
    def of(cls, rng, batch_size, layers):
        """Draws from an np.random.Generator."""
        uniform = rng.random((3, batch_size, layers))
        return cls(*uniform, rng.standard_normal((batch_size, layers)))

    def __getitem__(self, part):
        """The draws of one image, or of some (a slice)."""
        return Choices(*(getattr(self, f.name)[part] for f in dataclasses.fields(self)))


def operations(policy, choices):
    """What happens to one image: a list of (name, argument), argument None where there is none.

    Args: policy; choices of one image, arrays (L,).
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


def argument(name, magnitude, sign, increasing):
    """The published argument of an operation at a magnitude 0..10 and a sign of +-1.

    Degrees, kept bits, a threshold, an added value, a blend factor, a shear, or a share of the
    image's side; None for operations without.
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


def apply(image, steps):
    """Applies `operations` to uint8 (H, W, C), which stays as it is; the same shape comes back."""
    for name, value in steps:
        function = _FUNCTIONS[name]
        image = function(image) if value is None else function(image, value)
    return image


def jitter(image, strength, draws):
    """Brightness, contrast and saturation, in random order, by factors of 1 +- strength.

    Args: image uint8 (H, W, C); strength 0 to 1; draws (2, 3) uniform in [0, 1): the factors, and
      what the order is sorted by.
    """
    functions = (image_ops.brightness, image_ops.contrast, image_ops.color)
    factors = 1 + strength * (2 * draws[0] - 1)
    for number in np.argsort(draws[1]):
        image = functions[number](image, factors[number])
    return image
