"""Huge pages are asked for where they help, once, and where nobody has said otherwise."""

import os
import sys

import pytest

from m2mkd_jax.parallel import huge_pages
from m2mkd_jax.parallel.huge_pages import HUGE_PAGES, TUNABLES, with_huge_pages

ASKED = "always [madvise] never\n"


def test_the_tunable_is_added():
    before = {"A": "b"}
    assert with_huge_pages(before, (2, 36), ASKED) == {"A": "b", TUNABLES: f"{HUGE_PAGES}=1"}
    assert before == {"A": "b"}
    others = {TUNABLES: "glibc.malloc.arena_max=1"}
    found = with_huge_pages(others, (2, 35), ASKED)
    assert found == {TUNABLES: f"glibc.malloc.arena_max=1:{HUGE_PAGES}=1"}


@pytest.mark.parametrize(
    ("tunables", "glibc", "setting"),
    [
        (f"{HUGE_PAGES}=0", (2, 36), ASKED),
        (f"{HUGE_PAGES}=1", (2, 36), ASKED),
        ("", (2, 31), ASKED),
        ("", (), ASKED),
        ("", (2, 36), "[always] madvise never\n"),
        ("", (2, 36), "always madvise [never]\n"),
        ("", (2, 36), ""),
    ],
)
def test_nothing_is_changed(tunables, glibc, setting):
    assert with_huge_pages({TUNABLES: tunables}, glibc, setting) is None


def test_the_command_starts_again_as_it_was_called(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(huge_pages, "_setting", lambda: ASKED)
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 36))
    monkeypatch.delenv(TUNABLES, raising=False)
    called = ["python", "-X", "dev", "-m", "m2mkd_jax.main", "--config=a b", "--only=pt"]
    monkeypatch.setattr(sys, "orig_argv", called)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=a b", "--only=pt"])
    huge_pages.start_again()
    ((path, arguments, environment),) = calls
    assert path == sys.executable and arguments == [sys.executable, *called[1:]]
    assert environment[TUNABLES] == f"{HUGE_PAGES}=1"
    # A program that calls the command with other arguments stays.
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=other"])
    huge_pages.start_again()
    assert len(calls) == 1
