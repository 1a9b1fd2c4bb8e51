"""Standard streams that are closed or full, in processes of their own."""

import os
import subprocess
import sys

import pytest

BEGIN = "from m2mkd_jax import streams; streams.open_missing(); import sys, os;"


def run(code, **options):
    return subprocess.run([sys.executable, "-c", BEGIN + code], timeout=60, **options)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_closed_stream_leads_to_nothing_and_no_file_gets_its_number(number, tmp_path):
    code = (
        "print('a'); print('b', file=sys.stderr); sys.stdout.flush(); sys.stdout.isatty();"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2;"
        "os.write(1, b'c'); os.write(2, b'd')"
    )
    shell = ["sh", "-c", f'exec "$0" -c "$1" {number}>&-', sys.executable, BEGIN + code]
    assert subprocess.run(shell, timeout=60).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_an_output_that_takes_nothing_is_known_and_abandoned():
    code = "assert streams.output_failed(); print('more', flush=True); sys.exit(3)"
    with open("/dev/full", "w") as full:
        done = run(code, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (3, b"")
    assert run("assert not streams.output_failed()", stdout=subprocess.DEVNULL).returncode == 0


def test_a_terminal_that_closes_is_left_and_a_file_is_not(tmp_path):
    main, terminal = os.openpty()
    code = "streams.leave_terminal(); print('gone', flush=True); print('kept', file=sys.stderr)"
    with open(tmp_path / "log", "w") as log:
        assert run(code, stdout=terminal, stderr=log).returncode == 0
    os.close(terminal)
    assert (tmp_path / "log").read_text() == "kept\n"
    with pytest.raises(OSError):  # nothing was written before it was closed
        os.read(main, 10)
    os.close(main)
