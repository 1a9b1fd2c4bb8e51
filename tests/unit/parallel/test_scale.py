"""Traffic read out of the text of a compiled program, counted by hand."""

import sys

import pytest

from benchmarks import scale
from benchmarks.scale import group_size, traffic

PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %moved = (f32[1,5,8]{2,1,0}, f32[1,5,8]{2,1,0}) all-to-all(%x, %y), replica_groups={{0,1},{2,3}}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %whole = bf16[16,8]{1,0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}
  %loop = (s32[], f32[4]) while(%t), condition=%less, body=%inner.1, backend_config={"known_trip_count":{"n":"3"}}
}

%less (p: (s32[], f32[4])) -> pred[] {
  ROOT %small = pred[] compare(%i, %n), direction=LT
}

%rejects (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %again = (s32[], f32[4]) tuple(%i, %x)
}

ENTRY %main.9 (p: f32[4]) -> f32[] {
  %drawn = (s32[], f32[4]) while(%t), condition=%less, body=%rejects
  %looped = (s32[], f32[4]) while(%t), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %mirror = f32[2,3]{1,0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
  ROOT %total = f32[10]{0} all-reduce(%w), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}
"""  # noqa: E501 (lines as XLA writes them)


def test_loops_count_as_often_as_they_run():
    assert traffic(PROGRAM) == {
        "all-to-all": 5 * 3 * (2 * 5 * 8 * 4) // 2,
        "all-gather": 5 * (16 * 8 * 2) * 3 // 4,
        "collective-permute": 2 * 3 * 4,
        "all-reduce": 2 * (10 * 4) * 3 // 4,
    }


def test_a_loop_of_unknown_length_may_hold_no_collective():
    unknown = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    with pytest.raises(ValueError, match="unknown times"):
        traffic(unknown)


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1,2,3},{4,5,6,7}}, dimensions={0}", 4),
        ("[8,2]<=[2,8]T(1,0), dimensions={3}", 2),
        ("mesh['axis_0'=1,'axis_1'=8,'axis_2'=4] {'axis_1'}, dimensions={1}", 8),
        ("mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_0','axis_1'}, x={}", 16),
    ],
)
def test_group_sizes(groups, members):
    assert group_size(groups) == members


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices=8,12"], "divide the 12 devices"),
        (["--devices=64", "--group=64"], "the 8 experts of 'vmoe_base m2mkd/1'"),
    ],
)
def test_groups_that_do_not_fit_are_refused_before_compiling(monkeypatch, capsys, words, says):
    monkeypatch.setattr(sys, "argv", ["scale", *words])
    monkeypatch.setattr(scale, "compile_apart", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit):
        scale.main()
    assert says in capsys.readouterr().err
