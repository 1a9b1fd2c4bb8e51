"""The helpers for messages to the user."""

import pytest

from m2mkd_jax.errors import UserError, closest, did_you_mean, is_finite, printable, require


def test_the_closest_word():
    assert closest("vmeo", ["nac", "vmoe"]) == "vmoe"
    assert closest("resnet", ["nac", "vmoe"]) == ""


def test_did_you_mean():
    assert did_you_mean("vmeo", ("nac", "vmoe")) == 'did you mean "vmoe"?'
    assert did_you_mean("resnet", ("nac", "vmoe")) == "known: nac, vmoe"
    assert did_you_mean("resnet", iter(("nac", "vmoe")), "see the docs") == "see the docs"


def test_require():
    require(True, "fine")
    with pytest.raises(UserError, match=r"^wrong$"):
        require(False, "wrong")


def test_control_characters_are_escaped():
    assert printable("ä b") == "ä b"
    assert printable("a\n\x1b[31m\ud800") == r"a\n\x1b[31m\ud800"


def test_finite_numbers_are_those_that_floats_hold():
    assert all(map(is_finite, (0, -1.5, 10**300)))
    assert not any(map(is_finite, (10**400, float("nan"), float("inf"), True, "1", None)))
