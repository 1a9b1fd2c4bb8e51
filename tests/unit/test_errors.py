"""The helpers for messages to the user."""

import pytest

from m2mkd_jax.errors import UserError, closest, did_you_mean, printable, require


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
