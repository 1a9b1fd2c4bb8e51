"""RandAugment's policy strings, magnitudes and draws; colour jitter."""

import numpy as np
import pytest
from scipy import stats

from m2mkd_jax.data import image_ops
from m2mkd_jax.data.rand_augment import (
    OPERATIONS,
    Choices,
    Policy,
    apply,
    argument,
    jitter,
    operations,
)
from m2mkd_jax.errors import UserError

COUNT = 10_000
PUBLISHED = "rand-m9-mstd0.5-inc1"


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        (PUBLISHED, Policy(9, 2, 0.5, True)),
        ("rand", Policy(10, 2, 0, False)),
        ("rand-m7", Policy(magnitude=7)),
        ("rand-n3-m9", Policy(magnitude=9, layers=3)),
        ("rand-mstd0-inc0-m2.5", Policy(magnitude=2.5)),
        ("rand-inc1-mstd10-n1", Policy(layers=1, spread=10, increasing=True)),
    ],
)
def test_policies_are_parsed(text, policy):
    assert Policy.parse(text) == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ran-m9", 'cannot read "ran" at position 0'),
        ("rand-m9-x3", 'cannot read "x3" at position 8'),
        ("rand-m9-mstd-inc1", 'cannot read "mstd" at position 8'),
        ("rand-m9--inc1", 'cannot read "" at position 8'),
        ("rand-m9-inc1-m7", 'cannot read "m7" at position 13: m is given twice'),
        ("rand-m11", "position 5: the magnitude is 0 to 10"),
        ("rand-m9-n0", "position 8: n is a whole number"),
        ("rand-m9-n1.5", "position 8: n is a whole number"),
        ("rand-inc2", "position 5: inc is 0 or 1"),
        ("rand-m-9", 'cannot read "m" at position 5'),
        ("rand-m9 ", 'cannot read "m9 " at position 5'),
    ],
)
def test_bad_policies_are_refused_with_their_position(text, words):
    with pytest.raises(UserError) as error:
        Policy.parse(text)
    assert words in str(error.value) and "\n" not in str(error.value)


# Reference section 6, worked out by hand: name, magnitude, sign, increasing -> argument.
ARGUMENTS = [
    ("AutoContrast", 9, 1, True, None),
    ("Equalize", 9, 1, True, None),
    ("Invert", 9, 1, True, None),
    ("Rotate", 9, -1, True, -27),
    ("Posterize", 9, 1, True, 1),  # 4 - int(3.6)
    ("Posterize", 9, 1, False, 3),
    ("Posterize", 10, 1, True, 0),
    ("Solarize", 9, 1, True, 26),  # 256 - int(230.4)
    ("Solarize", 9, 1, False, 230),
    ("SolarizeAdd", 9.5, 1, True, 104),  # int(104.5)
    ("Color", 9, 1, True, 1.81),
    ("Contrast", 9, -1, True, 0.19),
    ("Brightness", 5, -1, True, 0.55),
    ("Sharpness", 9, -1, False, 1.72),  # 0.1 + 1.62, no sign
    ("ShearX", 9, 1, True, 0.27),
    ("ShearY", 9, -1, False, -0.27),
    ("TranslateX", 9, -1, True, -0.405),
    ("TranslateY", 10, 1, True, 0.45),
]


@pytest.mark.parametrize(("name", "magnitude", "sign", "increasing", "expected"), ARGUMENTS)
def test_arguments_at_a_magnitude(name, magnitude, sign, increasing, expected):
    found = argument(name, magnitude, sign, increasing)
    assert found == (None if expected is None else pytest.approx(expected))
    assert type(found) is not float or name not in ("Posterize", "Solarize", "SolarizeAdd")


def test_every_operation_has_its_own_effect():
    image = np.random.default_rng(0).integers(5, 250, (16, 16, 3), dtype=np.uint8)
    results = {
        apply(image, [(name, argument(name, 9.0, 1.0, True))]).tobytes() for name in OPERATIONS
    }
    assert len(results | {image.tobytes()}) == 16


def test_draws_follow_the_policy():
    """10,000 images: binomial counts, a normal cut at 10, fair signs, independent layers."""
    policy = Policy.parse(PUBLISHED)
    choices = Choices.of(np.random.default_rng(0), COUNT, policy.layers)
    drawn = [operations(policy, choices[i]) for i in range(COUNT)]
    # Two layers, each applied with probability a half.
    lengths = np.bincount([len(steps) for steps in drawn], minlength=3)
    assert stats.chisquare(lengths, COUNT * np.array([0.25, 0.5, 0.25])).pvalue > 1e-3
    names = [name for steps in drawn for name, _ in steps]
    assert stats.chisquare([names.count(name) for name in OPERATIONS]).pvalue > 1e-3
    # Drawn with replacement: twice the same in 1 of 15 pairs.
    pairs = [steps for steps in drawn if len(steps) == 2]
    twice = sum(first[0] == second[0] for first, second in pairs)
    assert stats.binomtest(twice, len(pairs), 1 / 15).pvalue > 1e-3
    # The magnitude behind Rotate's degrees: normal(9, 0.5) cut at 10, where 2.3% pile up.
    degrees = np.array([value for steps in drawn for name, value in steps if name == "Rotate"])
    strength = abs(degrees) / 3
    assert strength.max() == pytest.approx(10)
    at_ten = int((strength > 10 - 1e-9).sum())
    assert stats.binomtest(at_ten, len(strength), stats.norm.sf(2)).pvalue > 1e-3
    below = strength[strength < 10 - 1e-9]
    assert stats.kstest(below, stats.truncnorm(-np.inf, 2, 9, 0.5).cdf).pvalue > 1e-3
    assert stats.binomtest(int((degrees > 0).sum()), len(degrees)).pvalue > 1e-3


def test_without_spread_the_magnitude_is_fixed_and_never_below_zero():
    choices = Choices.of(np.random.default_rng(1), 500, 3)
    for text, expected in (("rand-m7-n3", {0.21}), ("rand-m0-n3", {0.0})):
        policy = Policy.parse(text)
        values = {
            round(abs(value), 9)
            for i in range(500)
            for name, value in operations(policy, choices[i])
            if name == "ShearX"
        }
        assert values == expected
    wide = Policy.parse("rand-m1-n3-mstd5")
    values = [v for i in range(500) for n, v in operations(wide, choices[i]) if n == "SolarizeAdd"]
    assert min(values) == 0 and max(values) > 11


def test_jitter_is_three_blends_in_the_drawn_order():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    draws = np.array([[0.0, 0.5, 1.0], [0.9, 0.1, 0.5]])
    expected = image_ops.contrast(image, 1.0)
    expected = image_ops.color(expected, 1.4)
    expected = image_ops.brightness(expected, 0.6)
    np.testing.assert_array_equal(jitter(image, 0.4, draws), expected)
    np.testing.assert_array_equal(jitter(image, 0.0, draws), image)
