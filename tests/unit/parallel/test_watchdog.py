"""Who is dead and who hangs, as the beats of the processes say it."""

import pytest

from m2mkd_jax.parallel.watchdog import Beat, Beats


def beats_of(*reached, number):
    return {
        index: Beat(number, count, f"step {count} of pt", f"host{index}", 100 + index)
        for index, count in enumerate(reached)
    }


@pytest.fixture
def beats():
    return Beats(own=0, seconds=10)


def test_processes_that_go_on_are_neither_dead_nor_hung(beats):
    for second in range(100):
        beats.note(beats_of(second, second // 2, number=second), float(second))
        assert not beats.dead(second + 5.0, 10) and not beats.hung(second + 5.0)


def test_a_silent_process_is_dead_but_not_this_one(beats):
    beats.note(beats_of(3, 3, 2, number=1), 0.0)
    beats.note({1: beats_of(4, 4, number=2)[1]}, 8.0)
    assert not beats.dead(10.0, 10)
    line = beats.dead(11.0, 10)
    assert line.startswith(
        "process 2 (host2, pid 102) is dead or cut off: nothing from it for 11 s"
    )
    assert line.endswith("the last step it reported is step 2 of pt")


def test_who_is_behind_and_does_not_move_hangs(beats):
    for second in range(12):
        beats.note(beats_of(5, 4, 5, number=second), float(second))
    assert not beats.hung(10.0)
    assert beats.hung(10.5).startswith("process 1 (host1, pid 101) hangs")
    # All wait, as while they compile: nobody is behind.
    beats.note(beats_of(5, 5, 5, number=13), 12.0)
    assert not beats.hung(100.0)


def test_who_has_ended_is_not_missed(beats):
    beats.note(beats_of(5, 4, number=1), 0.0)
    beats.note({1: None}, 1.0)
    assert not beats.dead(100.0, 10) and not beats.hung(100.0)
