"""Text files that grow."""

import resource

import pytest

from m2mkd_jax.files.lines import Lines


def test_a_disk_that_is_full_at_the_start_costs_no_line_that_was_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = "".join(f"line {i}\n" for i in range(1000))
    path.write_text(kept)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError):
            Lines(path, kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == kept
    lines = Lines(path, kept)
    lines.add("one more")
    lines.close()
    assert path.read_text() == kept + "one more\n"
